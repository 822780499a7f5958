use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::config::{AttachMode, ZeroCopy};

fn nic(ifname: &str, queues: Option<u32>) -> NicConfig {
    NicConfig {
        ifname: ifname.into(),
        id: ifname.into(),
        queues,
        zerocopy: ZeroCopy::Auto,
        attach: AttachMode::Auto,
        weight: None,
        set_channels: false,
        probe: None,
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

/// Runs `test` in a network namespace of its own that ends with it, under a sysfs of that namespace (needs root).
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[track_caller]
fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

#[track_caller]
fn refused(nic: &NicConfig, fragments: &[&str]) {
    let message = check_nic(nic, false).unwrap_err().to_string();
    for fragment in fragments {
        assert!(
            message.contains(fragment),
            "`{fragment}` is missing in: {message}"
        );
    }
}

#[test]
fn a_veth_is_looked_up_and_its_faults_are_told() {
    in_namespace(|| {
        ip(
            "link add up0 numrxqueues 2 numtxqueues 2 address 02:00:00:00:00:01 mtu 9000 type veth peer name peer0",
        );
        refused(&nic("up0", None), &["up0", "is down", "ip link set dev up0 up"]);
        ip("link set up0 up");
        ip("link set peer0 up");
        let found = check_nic(&nic("up0", Some(2)), false).unwrap();
        assert_eq!(
            (found.mac.to_string().as_str(), found.mtu),
            ("02:00:00:00:00:01", 9000)
        );
        assert_eq!(
            (found.rx_queues, found.tx_queues, found.driver.as_deref()),
            (2, 2, None)
        );
        refused(
            &nic("up0", Some(3)),
            &["queues=3", "has 2", "ethtool -L up0 rx 3"],
        );
        refused(
            &nic("up0", Some(1)),
            &[
                "queues=1",
                "2 receive queues",
                "uncovered",
                "ethtool -L up0 rx 1",
                "set-channels=on",
            ],
        );

        ip("address add 10.9.8.1/24 dev up0");
        ip("route add default via 10.9.8.2");
        refused(&nic("up0", None), &["default route", "--allow-default-route-nic"]);
        assert!(check_nic(&nic("up0", None), true).unwrap().default_route);
        ip("route del default");

        ip("link add br0 type bridge");
        ip("link set br0 up");
        refused(&nic("br0", None), &["is a bridge", "member interfaces"]);
        ip("link set up0 master br0");
        refused(
            &nic("up0", None),
            &["belongs to br0", "ip link set dev up0 nomaster"],
        );
    });
}

#[test]
fn channels_are_set_and_restored() {
    use crate::host::channels::{ChannelsError, rx_queues, set};

    in_namespace(|| {
        ip("link add up0 numrxqueues 4 numtxqueues 4 type veth peer name peer0");
        ip("link set up0 up");
        let index = lookup("up0").unwrap().index;
        let before = rx_queues("up0").unwrap();
        let wanted = if before == 2 { 3 } else { 2 };
        let guard = set(index, "up0", wanted).unwrap().expect("something to change");
        assert_eq!(rx_queues("up0"), Some(wanted));
        assert!(set(index, "up0", wanted).unwrap().is_none(), "it is so already");
        let error = set(index, "up0", 5).unwrap_err();
        assert!(matches!(error, ChannelsError::TooMany { max: 4, .. }), "{error}");
        drop(guard);
        assert_eq!(rx_queues("up0"), Some(before));

        let guard = set(index, "up0", wanted).unwrap();
        ip("link del up0");
        drop(guard);
        ip("link add br0 type bridge");
        let bridge = lookup("br0").unwrap().index;
        let error = set(bridge, "br0", 2).unwrap_err();
        assert!(error.to_string().contains("leave `set-channels` out"), "{error}");
    });
}

#[test]
fn changes_of_links_are_heard() {
    use crate::host::netlink::link::{Link, LinkEvent, LinkWatch, all};

    in_namespace(|| {
        ip("link add up0 type veth peer name peer0");
        let mut watch = LinkWatch::open().unwrap();
        let index = lookup("up0").unwrap().index;
        let mut heard = || {
            let mut events = Vec::new();
            watch.drain(64, &mut events).unwrap();
            events
        };
        assert_eq!(heard(), []);
        ip("link set up0 name renamed0 mtu 1400 address 02:00:00:00:00:99");
        ip("link add br0 type bridge");
        ip("link set renamed0 master br0");
        let last = heard().into_iter().rev().find_map(|event| match event {
            LinkEvent::Now(link) if link.index == index => Some(link),
            _ => None,
        });
        let Link {
            name,
            mtu,
            mac,
            master,
            kind,
            ..
        } = last.unwrap();
        assert_eq!(
            (name.as_str(), mtu, kind.as_deref()),
            ("renamed0", 1400, Some("veth"))
        );
        assert_eq!(mac.unwrap().to_string(), "02:00:00:00:00:99");
        assert_eq!(master, Some(lookup("br0").unwrap().index));
        ip("link set renamed0 nomaster");
        assert!(
            !heard().contains(&LinkEvent::Gone(index)),
            "no port of a bridge any more, but there"
        );
        ip("link del renamed0");
        assert!(heard().contains(&LinkEvent::Gone(index)));
        assert!(all().unwrap().iter().any(|link| link.name == "br0"));
    });
}

#[test]
fn carrier_of_a_real_interface() {
    use crate::host::carrier::CarrierWatch;

    in_namespace(|| {
        ip("link add up0 type veth peer name peer0");
        ip("link set up0 up");
        ip("link set peer0 up");
        let mut watch = CarrierWatch::new("up0").unwrap();
        let is = |watch: &CarrierWatch| (watch.state().usable, watch.state().carrier);
        let losses = watch.state().losses;
        assert_eq!(is(&watch), (true, true));
        assert!(!watch.glance());
        ip("link set peer0 down");
        assert!(watch.glance() && watch.poll());
        assert_eq!(is(&watch), (true, false));
        ip("link set peer0 up");
        assert!(watch.poll());
        assert_eq!(is(&watch), (true, true));
        ip("link set peer0 down");
        ip("link set peer0 up");
        assert!(watch.glance() && watch.poll(), "a flap is not missed");
        assert_eq!(is(&watch), (true, true));
        assert_eq!(watch.state().losses, losses + 2);
        ip("link set up0 down");
        assert!(watch.poll() && !watch.state().usable);
        ip("link set up0 up");
        assert!(watch.poll());
        assert_eq!(is(&watch), (true, true));
        ip("link set up0 name renamed0");
        assert!(!watch.poll(), "a new name changes nothing");
        ip("link del renamed0");
        assert!(watch.glance() && watch.poll() && watch.vanished());
    });
}

#[test]
fn another_namespaces_sysfs_is_noticed() {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip("link add up0 type veth peer name peer0");
        refused(
            &nic("up0", None),
            &["up0", "sysfs shows another network namespace", "ip netns exec"],
        );
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
