//! Daemon, guest and front-end come and go.

use std::time::Duration;

use anyhow::Result;
use vnic_tests::fabric::PEER_IPV4;
use vnic_tests::process::wait_for;
use vnic_tests::qemu::ping_from;
use vnic_tests::scene::{PATIENCE, Scene, guest_ipv4};

/// Whether an XDP program sits on a NIC of the host namespace.
fn has_program(scene: &Scene, nic: &str) -> Result<bool> {
    let shown = scene
        .fabric
        .host
        .ip(&["-json", "-details", "link", "show", "dev", nic])?;
    let links: serde_json::Value = serde_json::from_str(&shown)?;
    Ok(links[0].get("xdp").is_some())
}

fn wait_no_program(scene: &Scene) -> Result<()> {
    for nic in scene.fabric.nics() {
        wait_for(
            &format!("no XDP program on {nic}"),
            Duration::from_secs(5),
            Duration::from_millis(10),
            || Ok((!has_program(scene, &nic)?).then_some(())),
        )?;
    }
    Ok(())
}

fn wait_reachable(scene: &Scene, index: usize) -> Result<()> {
    wait_for(
        "answers from the guest",
        PATIENCE,
        Duration::from_millis(100),
        || Ok((ping_from(&scene.fabric.peer, &guest_ipv4(index), 1, 56)? == 1).then_some(())),
    )
}

fn terminate_and_start(mut scene: Scene) -> Result<()> {
    let sessions = scene.open_sessions(16)?;
    assert!(
        has_program(&scene, "up0")?,
        "vnicd runs without an XDP program on up0"
    );
    let (status, _) = scene.take_daemon()?.terminate()?;
    assert!(status.success(), "vnicd ended with {status}: {}", scene.log(20));
    wait_no_program(&scene)?;
    for socket in ["p0.sock", "control.sock"] {
        assert!(
            !scene.folder().join(socket).exists(),
            "vnicd left {socket} behind"
        );
    }
    scene.start_daemon()?;
    sessions.advance(&scene, "after SIGTERM and a new start")?;
    sessions.finish(&scene)
}

#[test]
fn sigterm_ends_the_daemon_cleanly_and_a_new_one_goes_on() -> Result<()> {
    terminate_and_start(Scene::set(2, 1, 1)?)
}

#[test]
fn packed_rings_go_on_after_sigterm() -> Result<()> {
    terminate_and_start(Scene::with_packed_rings(2, 1, 1)?)
}

fn kill_and_start(mut scene: Scene) -> Result<()> {
    let sessions = scene.open_sessions(16)?;
    for round in 0..2 {
        scene.take_daemon()?.kill()?;
        wait_no_program(&scene)?;
        // Its sockets are stale now; the new daemon must see that.
        scene.start_daemon()?;
        sessions.advance(&scene, &format!("after kill -9 and a new start, round {round}"))?;
    }
    sessions.finish(&scene)
}

#[test]
fn one_worker_goes_on_after_kill_9() -> Result<()> {
    kill_and_start(Scene::set(2, 1, 1)?)
}

#[test]
fn two_workers_go_on_after_kill_9() -> Result<()> {
    kill_and_start(Scene::set(2, 2, 1)?)
}

#[test]
fn packed_rings_go_on_after_kill_9() -> Result<()> {
    kill_and_start(Scene::with_packed_rings(2, 2, 1)?)
}

/// While no vnicd runs, the guest restarts: QEMU sends the same base for its new rings as it did for the old ones.
#[test]
fn a_guest_with_packed_rings_may_reboot_while_the_daemon_is_away() -> Result<()> {
    let mut scene = Scene::with_packed_rings(2, 1, 1)?;
    let sessions = scene.open_sessions(8)?;
    drop(sessions);
    scene.take_daemon()?.kill()?;
    scene.guests[0].reboot()?;
    scene.start_daemon()?;
    scene.address(0)?;
    wait_reachable(&scene, 0)?;
    assert_eq!(scene.guests[0].ping(PEER_IPV4, 3, 56)?, 3, "after the reboot");
    scene.open_sessions(8)?.finish(&scene)
}

/// The rings go round many times between one end and the next, and it finds them at work.
#[test]
fn packed_rings_under_load_go_on_after_kill_9() -> Result<()> {
    let mut scene = Scene::with_packed_rings(2, 1, 1)?;
    let sessions = scene.open_sessions_of(8, 10, 3000)?;
    for round in 0..5 {
        sessions.advance(&scene, &format!("under load, before end {round}"))?;
        scene.take_daemon()?.kill()?;
        wait_no_program(&scene)?;
        scene.start_daemon()?;
        sessions.advance(&scene, &format!("under load, after end {round}"))?;
    }
    sessions.finish(&scene)
}

#[test]
fn a_guest_may_reboot() -> Result<()> {
    let mut scene = Scene::set(2, 1, 2)?;
    for _ in 0..2 {
        scene.guests[0].reboot()?;
        scene.address(0)?;
        assert_eq!(scene.guests[0].ping(PEER_IPV4, 3, 56)?, 3, "after the reboot");
        wait_reachable(&scene, 0)?;
        assert_eq!(
            scene.guests[1].ping(&guest_ipv4(0), 3, 56)?,
            3,
            "from the other guest"
        );
    }
    let sessions = scene.open_sessions(8)?;
    sessions.finish(&scene)
}

#[test]
fn a_front_end_may_vanish_and_another_take_its_place() -> Result<()> {
    let mut scene = Scene::set(2, 1, 2)?;
    for _ in 0..2 {
        scene.replace_guest(0)?;
        assert_eq!(scene.guests[0].ping(PEER_IPV4, 3, 56)?, 3, "from the new guest");
        assert_eq!(
            scene.guests[1].ping(PEER_IPV4, 3, 56)?,
            3,
            "from the guest that stayed"
        );
        wait_reachable(&scene, 0)?;
    }
    let sessions = scene.open_sessions(8)?;
    sessions.finish(&scene)
}
