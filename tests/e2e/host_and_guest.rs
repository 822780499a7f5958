//! A host and its guest on a veth of their own, as docs/host-and-guest.md has it. The host's kernel leaves checksums to a
//! device that is not there: the guest gets them whole.

use anyhow::{Context, Result};
use vnic_tests::daemon::{Daemon, DaemonOptions, port_socket};
use vnic_tests::lock::MachineLock;
use vnic_tests::netns::Netns;
use vnic_tests::process::run;
use vnic_tests::qemu::{self, Guest, GuestOptions, Vnic, endpoint, ping_from};
use vnic_tests::scene::{ECHO_PORT, guest_ipv4, guest_ipv6, guest_mac};
use vnic_tests::traffic::bulk::{self, BulkPlan, BulkServer};
use vnic_tests::traffic::udp::{self, UdpEcho, UdpPlan};

const HOST_END: &str = "guests";
const VNIC_END: &str = "guests-nic";
const HOST: [&str; 2] = ["10.77.0.1", "fd77::1"];
const BULK_PORT: u16 = 9;

fn offload(namespace: &Netns, interface: &str, feature: &str) -> Result<String> {
    let listed = run(namespace.command("ethtool").args(["-k", interface]))?;
    let line = listed
        .lines()
        .find(|line| line.trim().starts_with(&format!("{feature}:")));
    Ok(line
        .with_context(|| format!("no {feature}: {listed}"))?
        .trim()
        .to_owned())
}

#[test]
fn a_veth_connects_host_and_guest() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    qemu::prepare()?;
    let folder = tempfile::tempdir()?;
    let host = Netns::create("host")?;
    // As the document says, with all offloads as they come.
    host.ip(&["link", "add", HOST_END, "type", "veth", "peer", "name", VNIC_END])?;
    for end in [HOST_END, VNIC_END] {
        host.ip(&["link", "set", end, "up"])?;
    }
    host.add_address(HOST_END, &format!("{}/24", HOST[0]))?;
    host.add_address(HOST_END, &format!("{}/64", HOST[1]))?;
    assert_eq!(
        offload(&host, HOST_END, "tx-checksumming")?,
        "tx-checksumming: on"
    );
    assert_eq!(
        offload(&host, VNIC_END, "rx-vlan-offload")?,
        "rx-vlan-offload: on"
    );

    let options = DaemonOptions::new(&[("p0", &guest_mac(0))], &[VNIC_END.to_owned()], 1);
    let daemon = Daemon::start(&host, folder.path(), &options)?;
    // It answers once everything is set up.
    daemon.query("status")?;
    assert_eq!(
        offload(&host, VNIC_END, "rx-vlan-offload")?,
        "rx-vlan-offload: off"
    );
    let vnic = Vnic::new(port_socket(folder.path(), "p0"), &guest_mac(0));
    let guest = Guest::launch(folder.path(), &GuestOptions::new("g0", vec![vnic]))?
        .booted(1)
        .with_context(|| format!("the end of vnicd's log:\n{}", daemon.log_tail(30)))?;
    let addresses = [guest_ipv4(0), guest_ipv6(0)];
    guest.configure(
        "eth0",
        &[&format!("{}/24", addresses[0]), &format!("{}/64", addresses[1])],
    )?;

    guest.udp_echo(ECHO_PORT)?;
    guest.bulk_server(BULK_PORT)?;
    let (_udp, _bulk) = host.run(|| Ok((UdpEcho::start(ECHO_PORT)?, BulkServer::start(BULK_PORT)?)))?;
    let datagrams = |address: &str| -> Result<UdpPlan> {
        Ok(UdpPlan {
            target: endpoint(address, ECHO_PORT)?,
            flows: 3,
            datagrams: 5,
            bytes: 1001,
            patience_ms: 3000,
        })
    };
    let transfer = |address: &str| -> Result<BulkPlan> {
        Ok(BulkPlan {
            target: endpoint(address, BULK_PORT)?,
            bytes: 3_000_001,
            seed: 5,
        })
    };
    for address in HOST {
        assert_eq!(guest.ping(address, 3, 1400)?, 3, "from the guest to {address}");
        let report = guest.udp(datagrams(address)?)?;
        assert_eq!((report.echoed, report.corrupt), (15, 0), "{address}: {report:?}");
        assert!(guest.bulk(transfer(address)?)?.intact, "{address}");
    }
    for address in &addresses {
        assert_eq!(
            ping_from(&host, address, 3, 1400)?,
            3,
            "from the host to {address}"
        );
        let (datagrams, transfer) = (datagrams(address)?, transfer(address)?);
        let report = host.run(|| Ok(udp::probe(&datagrams)?))?;
        assert_eq!((report.echoed, report.corrupt), (15, 0), "{address}: {report:?}");
        let report = host.run(|| Ok(bulk::transfer(&transfer)?))?;
        assert!(report.intact, "{address}: {report:?}");
    }

    let (status, _) = daemon.terminate()?;
    assert!(status.success(), "{status}");
    assert_eq!(
        offload(&host, VNIC_END, "rx-vlan-offload")?,
        "rx-vlan-offload: on"
    );
    Ok(())
}
