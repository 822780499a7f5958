//! A guest and a peer behind two NICs: every kind of traffic, with one and with two workers, with split and with packed rings.

use std::time::Duration;

use anyhow::Result;
use vnic_tests::fabric::{PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use vnic_tests::qemu::{endpoint, ping_from};
use vnic_tests::scene::{ECHO_PORT, Scene, guest_ipv4, guest_ipv6, guest_mac, guest_mac_bytes};
use vnic_tests::traffic::bulk::{self, BulkPlan, BulkServer};
use vnic_tests::traffic::raw::{self, Capture, experimental_frame};
use vnic_tests::traffic::udp::{self, UdpEcho, UdpPlan};

const BULK_PORT: u16 = 9;

#[test]
fn one_worker_carries_all_traffic() -> Result<()> {
    all_traffic(1)
}

#[test]
fn two_workers_carry_all_traffic() -> Result<()> {
    all_traffic(2)
}

fn all_traffic(workers: u32) -> Result<()> {
    all_kinds(&Scene::set(2, workers, 1)?)
}

fn all_kinds(scene: &Scene) -> Result<()> {
    neighbours_and_ping(scene)?;
    tcp_both_ways(scene)?;
    bulk_both_ways(scene)?;
    udp_both_ways(scene)?;
    group_addressed_frames(scene)?;
    spoofed_sources(scene)
}

fn neighbours_and_ping(scene: &Scene) -> Result<()> {
    let guest = &scene.guests[0];
    for (address, payload) in [
        (PEER_IPV4, 56),
        (PEER_IPV4, 1472),
        (PEER_IPV6, 56),
        (PEER_IPV6, 1452),
    ] {
        assert_eq!(
            guest.ping(address, 3, payload)?,
            3,
            "ping from the guest to {address}, {payload} bytes"
        );
    }
    for (address, payload) in [
        (guest_ipv4(0), 56),
        (guest_ipv4(0), 1472),
        (guest_ipv4(0), 4000),
        (guest_ipv6(0), 1452),
    ] {
        let answered = ping_from(&scene.fabric.peer, &address, 3, payload)?;
        assert_eq!(answered, 3, "ping from the peer to {address}, {payload} bytes");
    }
    let neighbours = scene.fabric.peer.ip(&["neigh", "show", "dev", PEER_INTERFACE])?;
    for address in [guest_ipv4(0), guest_ipv6(0)] {
        let known = neighbours
            .lines()
            .any(|line| line.starts_with(&format!("{address} ")) && line.contains(&guest_mac(0)));
        assert!(
            known,
            "the peer does not know {address} as {}: {neighbours}",
            guest_mac(0)
        );
    }
    Ok(())
}

fn tcp_both_ways(scene: &Scene) -> Result<()> {
    let sessions = scene.open_sessions(32)?;
    sessions.advance(scene, "in steady state")?;
    sessions.finish(scene)
}

fn bulk_both_ways(scene: &Scene) -> Result<()> {
    let guest = &scene.guests[0];
    let _server = scene.fabric.peer.run(|| Ok(BulkServer::start(BULK_PORT)?))?;
    guest.bulk_server(BULK_PORT)?;
    let plan = |address: &str| {
        Ok::<_, anyhow::Error>(BulkPlan {
            target: endpoint(address, BULK_PORT)?,
            bytes: 8_000_003,
            seed: 5,
        })
    };
    for address in [PEER_IPV4, PEER_IPV6] {
        let report = guest.bulk(plan(address)?)?;
        assert!(report.intact, "from the guest to {address}: {report:?}");
    }
    for address in [guest_ipv4(0), guest_ipv6(0)] {
        let plan = plan(&address)?;
        let report = scene.fabric.peer.run(|| Ok(bulk::transfer(&plan)?))?;
        assert!(report.intact, "from the peer to {address}: {report:?}");
    }
    Ok(())
}

fn udp_both_ways(scene: &Scene) -> Result<()> {
    let guest = &scene.guests[0];
    let _server = scene.fabric.peer.run(|| Ok(UdpEcho::start(ECHO_PORT)?))?;
    guest.udp_echo(ECHO_PORT)?;
    // The last size needs fragments.
    for bytes in [8, 1400, 4000] {
        let plan = |address: &str| {
            let target = endpoint(address, ECHO_PORT)?;
            Ok::<_, anyhow::Error>(UdpPlan {
                target,
                flows: 8,
                datagrams: 4,
                bytes,
                patience_ms: 3000,
            })
        };
        for address in [PEER_IPV4, PEER_IPV6] {
            let report = guest.udp(plan(address)?)?;
            assert_eq!(
                (report.echoed, report.corrupt),
                (32, 0),
                "guest to {address}, {bytes} bytes: {report:?}"
            );
        }
        for address in [guest_ipv4(0), guest_ipv6(0)] {
            let plan = plan(&address)?;
            let report = scene.fabric.peer.run(|| Ok(udp::probe(&plan)?))?;
            assert_eq!(
                (report.echoed, report.corrupt),
                (32, 0),
                "peer to {address}, {bytes} bytes: {report:?}"
            );
        }
    }
    Ok(())
}

/// Each broadcast and multicast frame arrives once, though there are two NICs.
fn group_addressed_frames(scene: &Scene) -> Result<()> {
    let guest = &scene.guests[0];
    for group in [[0xff; 6], [0x01, 0, 0x5e, 1, 2, 3], [0x33, 0x33, 0, 0, 0, 9]] {
        let frame = experimental_frame(group, guest_mac_bytes(0), b"from the guest");
        let capture = scene
            .fabric
            .peer
            .run(|| Ok(Capture::start(PEER_INTERFACE, raw::EXPERIMENTAL)?))?;
        guest.send_frame("eth0", frame.clone(), 1)?;
        // One more than wanted, so that a duplicate would be seen.
        let frames = capture.collect(2, Duration::from_secs(1))?;
        assert_eq!(frames, [frame], "from the guest to {group:x?}");

        let frame = experimental_frame(group, [2, 0, 0, 0, 0, 7], b"from the peer");
        let capture = guest.start_capture("eth0", raw::EXPERIMENTAL)?;
        scene
            .fabric
            .peer
            .run(|| Ok(raw::send(PEER_INTERFACE, &frame, 1)?))?;
        let frames = guest.finish_capture(capture, 2, Duration::from_secs(1))?;
        assert_eq!(frames, [frame], "from the peer to {group:x?}");
    }
    Ok(())
}

/// A guest may send its own source address only, and nothing to the bridge's reserved group.
fn spoofed_sources(scene: &Scene) -> Result<()> {
    let guest = &scene.guests[0];
    let own = guest_mac_bytes(0);
    let capture = scene
        .fabric
        .peer
        .run(|| Ok(Capture::start(PEER_INTERFACE, raw::EXPERIMENTAL)?))?;
    for source in [[0x52, 0x54, 0, 0, 0, 0x99], [0xff; 6], [0; 6]] {
        guest.send_frame("eth0", experimental_frame([0xff; 6], source, b"forged"), 1)?;
    }
    guest.send_frame(
        "eth0",
        experimental_frame([0x01, 0x80, 0xc2, 0, 0, 0], own, b"reserved"),
        1,
    )?;
    let honest = experimental_frame([0xff; 6], own, b"honest");
    guest.send_frame("eth0", honest.clone(), 1)?;
    let frames = capture.collect(5, Duration::from_secs(1))?;
    assert_eq!(frames, [honest], "only the honest frame may pass");
    Ok(())
}

/// Packed rings begin anew with the guest's kernel and go on where they stood after a stop, wrap counters and all.
#[test]
fn packed_rings_carry_all_traffic_and_survive_a_reboot_and_stops() -> Result<()> {
    let mut scene = Scene::with_packed_rings(2, 1, 1)?;
    all_kinds(&scene)?;
    scene.guests[0].reboot()?;
    scene.address(0)?;
    neighbours_and_ping(&scene)?;
    let sessions = scene.open_sessions(8)?;
    for round in 0..3 {
        scene.guests[0].pause_and_resume()?;
        sessions.advance(&scene, &format!("after stop and start {round}"))?;
    }
    sessions.finish(&scene)?;
    let ports = scene.daemon()?.query("ports")?;
    let features = ports["ports"][0]["features"].as_array().expect("a list");
    assert!(
        features.iter().any(|feature| feature == "VIRTIO_F_RING_PACKED"),
        "the guest did not negotiate packed rings: {ports}"
    );
    Ok(())
}

#[test]
fn the_host_keeps_its_network() -> Result<()> {
    let scene = Scene::set(1, 1, 1)?;
    scene.fabric.host.add_address("up0", "10.77.0.100/24")?;
    scene.fabric.host.add_address("up0", "fd77::100/64")?;
    for address in ["10.77.0.100", "fd77::100", &guest_ipv4(0), &guest_ipv6(0)] {
        assert_eq!(
            ping_from(&scene.fabric.peer, address, 3, 1000)?,
            3,
            "ping from the peer to {address}"
        );
    }
    for address in [PEER_IPV4, PEER_IPV6] {
        assert_eq!(
            ping_from(&scene.fabric.host, address, 3, 1000)?,
            3,
            "ping from the host to {address}"
        );
    }
    Ok(())
}

#[test]
fn two_queue_pairs_share_the_traffic() -> Result<()> {
    let scene = Scene::with_queues(2, 2, 1, 2)?;
    assert_eq!(
        scene.guests[0].interfaces()?[0].rx_queues,
        2,
        "the guest does not see two queue pairs"
    );
    neighbours_and_ping(&scene)?;
    tcp_both_ways(&scene)?;
    bulk_both_ways(&scene)?;
    let stats = scene.daemon()?.query("stats")?;
    let pairs = stats["ports"][0]["queue_pairs"]
        .as_array()
        .expect("a list of queue pairs");
    assert_eq!(pairs.len(), 2, "{stats}");
    for pair in pairs {
        assert!(
            pair["guest_tx"]["frames"].as_u64() > Some(0),
            "a queue pair sent nothing: {stats}"
        );
        assert!(
            pair["guest_rx"]["frames"].as_u64() > Some(0),
            "a queue pair received nothing: {stats}"
        );
    }
    Ok(())
}
