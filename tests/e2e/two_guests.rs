//! Two guests on one daemon: a local switch without NICs, and with NICs besides.

use std::time::Duration;

use anyhow::Result;
use vnic_tests::fabric::{PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use vnic_tests::process::wait_for;
use vnic_tests::qemu::{endpoint, ping_from};
use vnic_tests::scene::{ECHO_PORT, PATIENCE, Scene, guest_ipv4, guest_ipv6, guest_mac_bytes};
use vnic_tests::traffic::bulk::BulkPlan;
use vnic_tests::traffic::raw::{self, Capture, experimental_frame};
use vnic_tests::traffic::sessions::SessionPlan;
use vnic_tests::traffic::udp::UdpPlan;

/// Everything between guest 0 and guest 1, both ways.
fn talk(scene: &Scene) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let (client, server) = (&scene.guests[from], &scene.guests[to]);
        for address in [guest_ipv4(to), guest_ipv6(to)] {
            assert_eq!(
                client.ping(&address, 3, 1400)?,
                3,
                "ping from guest {from} to {address}"
            );
        }
        server.tcp_echo(ECHO_PORT)?;
        server.udp_echo(ECHO_PORT)?;
        server.bulk_server(9)?;
        let target = endpoint(&guest_ipv4(to), ECHO_PORT)?;
        let sessions = client.start_sessions(SessionPlan {
            target,
            count: 16,
            interval_ms: 50,
            message_bytes: 300,
        })?;
        wait_for("echoes", PATIENCE, Duration::from_millis(100), || {
            let report = client.sessions_progress(sessions, false)?;
            assert_eq!(report.errors(), Vec::<String>::new());
            Ok((report.least_echoed() >= 10).then_some(()))
        })?;
        assert_eq!(client.finish_sessions(sessions)?.errors(), Vec::<String>::new());
        let report = client.udp(UdpPlan {
            target,
            flows: 4,
            datagrams: 4,
            bytes: 1200,
            patience_ms: 3000,
        })?;
        assert_eq!((report.echoed, report.corrupt), (16, 0), "{report:?}");
        for address in [guest_ipv4(to), guest_ipv6(to)] {
            let report = client.bulk(BulkPlan {
                target: endpoint(&address, 9)?,
                bytes: 4_000_001,
                seed: 1,
            })?;
            assert!(report.intact, "{report:?}");
        }
    }
    Ok(())
}

#[test]
fn guests_talk_without_any_nic_by_one_worker() -> Result<()> {
    talk(&Scene::set(0, 1, 2)?)
}

#[test]
fn guests_talk_without_any_nic_by_two_workers() -> Result<()> {
    talk(&Scene::set(0, 2, 2)?)
}

#[test]
fn guests_talk_to_each_other_and_to_the_peer() -> Result<()> {
    let scene = Scene::set(2, 2, 2)?;
    talk(&scene)?;
    for (index, guest) in scene.guests.iter().enumerate() {
        for address in [PEER_IPV4, PEER_IPV6] {
            assert_eq!(
                guest.ping(address, 3, 1400)?,
                3,
                "ping from guest {index} to {address}"
            );
        }
        assert_eq!(
            ping_from(&scene.fabric.peer, &guest_ipv4(index), 3, 1400)?,
            3,
            "ping to guest {index}"
        );
    }

    // What one guest sends to the other stays on the host; a broadcast reaches both the other guest and the peer, once.
    let at_peer = scene
        .fabric
        .peer
        .run(|| Ok(Capture::start(PEER_INTERFACE, raw::EXPERIMENTAL)?))?;
    let at_guest = scene.guests[1].start_capture("eth0", raw::EXPERIMENTAL)?;
    let at_sender = scene.guests[0].start_capture("eth0", raw::EXPERIMENTAL)?;
    let direct = experimental_frame(guest_mac_bytes(1), guest_mac_bytes(0), b"direct");
    let broadcast = experimental_frame([0xff; 6], guest_mac_bytes(0), b"broadcast");
    scene.guests[0].send_frame("eth0", direct.clone(), 1)?;
    scene.guests[0].send_frame("eth0", broadcast.clone(), 1)?;
    let second = Duration::from_secs(1);
    assert_eq!(
        scene.guests[1].finish_capture(at_guest, 3, second)?,
        [direct, broadcast.clone()]
    );
    assert_eq!(at_peer.collect(2, second)?, [broadcast]);
    assert_eq!(
        scene.guests[0].finish_capture(at_sender, 1, second)?,
        Vec::<Vec<u8>>::new(),
        "its own frames came back"
    );
    Ok(())
}
