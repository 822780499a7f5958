//! A guest without a configured address may learn only one that is nobody else's; and frames that its NIC cannot send are counted.

use anyhow::{Context, Result};
use vnic_tests::daemon::{Daemon, DaemonOptions, port_socket};
use vnic_tests::fabric::Fabric;
use vnic_tests::lag::Distribution;
use vnic_tests::lock::MachineLock;
use vnic_tests::qemu::{Guest, GuestOptions, Vnic, prepare};
use vnic_tests::scene::{guest_ipv4, guest_mac, guest_mac_bytes, wait};
use vnic_tests::traffic::raw::experimental_frame;

fn bytes(mac: &str) -> Result<[u8; 6]> {
    let mut out = [0; 6];
    for (byte, text) in out.iter_mut().zip(mac.split(':')) {
        *byte = u8::from_str_radix(text, 16)?;
    }
    Ok(out)
}

#[test]
fn only_an_address_of_nobody_else_is_learned() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    prepare()?;
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(1, 1, Distribution::Lag)?;
    // The host has the guest's address itself, on an interface that is no NIC.
    fabric
        .host
        .ip(&["link", "add", "br0", "address", &guest_mac(0), "type", "bridge"])?;
    let mut options = DaemonOptions::new(&[("p0", ""), ("p1", "52:54:00:00:77:01")], &fabric.nics(), 1);
    options.ports[0].mac = None;
    let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    let vnic = Vnic::new(port_socket(folder.path(), "p0"), &guest_mac(0));
    let guest = Guest::launch(folder.path(), &GuestOptions::new("g0", vec![vnic]))?
        .booted(1)
        .with_context(|| daemon.log_tail(30))?;
    guest.configure("eth0", &[&format!("{}/24", guest_ipv4(0))])?;

    let refused = || -> Result<u64> {
        let stats = daemon.query("stats")?;
        Ok(stats["ports"][0]["drops"]["mac_refused"].as_u64().unwrap_or(0))
    };
    let nic = bytes(&fabric.host.mac("up0")?)?;
    fabric
        .host
        .ip(&["link", "set", "up0", "address", "02:00:00:00:00:55"])?;
    wait("up0's new address", || {
        Ok((daemon.nic("up0")?["changes"] == 1).then_some(()))
    })?;
    let taken = [
        ("the host's", guest_mac_bytes(0)),
        ("the NIC's", [2, 0, 0, 0, 0, 0x55]),
        ("the NIC's former", nic),
        ("another port's", [0x52, 0x54, 0, 0, 0x77, 1]),
        ("multicast", [1, 0, 0x5e, 0, 0, 1]),
        ("zero", [0; 6]),
    ];
    for (whose, source) in taken {
        let before = refused()?;
        guest.send_frame("eth0", experimental_frame([0xff; 6], source, b"x"), 3)?;
        wait(&format!("refusal of an address that is {whose}"), || {
            Ok((refused()? >= before + 3).then_some(()))
        })?;
        let port = &daemon.query("ports")?["ports"][0];
        assert!(port["mac"].is_null(), "{whose}: {port}");
    }

    // Once the host has given the address up, the guest has it.
    fabric.host.ip(&["link", "del", "br0"])?;
    wait("the guest's address", || {
        guest.send_frame("eth0", experimental_frame([0xff; 6], guest_mac_bytes(0), b"x"), 1)?;
        Ok((daemon.query("ports")?["ports"][0]["mac"] == guest_mac(0)).then_some(()))
    })?;

    fabric.host.ip(&["link", "set", "up0", "mtu", "1000"])?;
    wait("up0's new MTU", || {
        Ok((daemon.nic("up0")?["mtu"] == 1000).then_some(()))
    })?;
    let peer = bytes(&fabric.peer.mac("peer0")?)?;
    let frame = experimental_frame(peer, guest_mac_bytes(0), &[7; 1400]);
    guest.send_frame("eth0", frame, 5)?;
    wait("frames too long for the NIC", || {
        let stats = daemon.query("stats")?;
        Ok((stats["nics"][0]["drops"]["too_long"] == 5).then_some(()))
    })
}
