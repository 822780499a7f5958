use super::*;
use crate::config::{AttachMode, ZeroCopy};

fn nic(ifname: &str, queues: Option<u32>) -> NicConfig {
    NicConfig {
        ifname: ifname.into(),
        id: ifname.into(),
        queues,
        zerocopy: ZeroCopy::Auto,
        attach: AttachMode::Auto,
        weight: 1,
    }
}

#[test]
fn unknown_and_loopback_are_refused() {
    let message = check_nic(&nic("nosuchnic0", None), false)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("nosuchnic0") && message.contains("these exist") && message.contains("lo"),
        "{message}"
    );
    let message = check_nic(&nic("lo", None), true).unwrap_err().to_string();
    assert!(message.contains("loopback"), "{message}");
}

#[test]
fn default_routes_are_found_in_both_tables() {
    let v4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
              eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
              eth1\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
              eth2\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0\n";
    assert!(default_route_v4(v4, "eth0"));
    assert!(!default_route_v4(v4, "eth1"), "a route to a network");
    assert!(!default_route_v4(v4, "eth2"), "a reject route");
    let zero = "0".repeat(32);
    let v6 = format!(
        "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n\
         {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n\
         fe800000000000000000000000000000 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001     eth1\n"
    );
    assert!(default_route_v6(&v6, "eth0"));
    assert!(!default_route_v6(&v6, "lo") && !default_route_v6(&v6, "eth1"));
}
