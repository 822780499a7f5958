//! Sessions spread over the NICs, and an operator can see it.

use anyhow::Result;
use vnic_tests::fabric::PEER_IPV4;
use vnic_tests::qemu::endpoint;
use vnic_tests::scene::{ECHO_PORT, Scene};
use vnic_tests::traffic::udp::{UdpEcho, UdpPlan};

/// Opens many short UDP flows and returns the frames of the guest that each link carried, and the sessions that vnicd
/// lists for each NIC.
fn many_flows(scene: &Scene, flows: u32) -> Result<(Vec<u64>, Vec<u64>)> {
    let _echo = scene.fabric.peer.run(|| Ok(UdpEcho::start(ECHO_PORT)?))?;
    let before = scene.fabric.counters();
    let target = endpoint(PEER_IPV4, ECHO_PORT)?;
    let report = scene.guests[0].udp(UdpPlan {
        target,
        flows,
        datagrams: 2,
        bytes: 100,
        patience_ms: 3000,
    })?;
    assert_eq!(report.echoed, u64::from(flows) * 2, "{report:?}");
    let frames = scene
        .fabric
        .counters()
        .iter()
        .zip(&before)
        .map(|(now, then)| now.to_peer - then.to_peer)
        .collect();
    let (daemon, nics) = (scene.daemon()?, scene.fabric.nics());
    let listed = daemon.listed_sessions_per_nic(&nics)?;
    // Neighbour discovery and the like may add a session between the two questions.
    for (listed, counted) in listed.iter().zip(daemon.sessions_per_nic(&nics)?) {
        assert!(
            listed.abs_diff(counted) <= 8,
            "vnic sessions lists {listed}, vnic nics says {counted}"
        );
    }
    Ok((frames, listed))
}

/// With 400 flows over N NICs each share is 100/N give or take a few percent; half or twice that is broken.
fn assert_even(what: &str, counts: &[u64]) {
    let total: u64 = counts.iter().sum();
    let fair = total / u64::try_from(counts.len()).expect("few NICs");
    for count in counts {
        assert!(*count * 2 >= fair && *count <= fair * 2, "{what}: {counts:?}");
    }
}

#[test]
fn flows_spread_evenly_over_two_nics() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let (frames, sessions) = many_flows(&scene, 400)?;
    assert!(
        sessions.iter().sum::<u64>() >= 400,
        "vnicd lists {sessions:?} of 400 sessions"
    );
    assert_even("frames", &frames);
    assert_even("sessions", &sessions);
    Ok(())
}

#[test]
fn flows_spread_evenly_over_four_nics_and_two_workers() -> Result<()> {
    let scene = Scene::set(4, 2, 1)?;
    let (frames, sessions) = many_flows(&scene, 400)?;
    assert_even("frames", &frames);
    assert_even("sessions", &sessions);
    Ok(())
}
