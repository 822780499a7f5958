//! NICs lose their links and get them back; no session may notice more than a gap.

use std::time::Duration;

use anyhow::Result;
use vnic_tests::process::wait_for;
use vnic_tests::scene::{Scene, Sessions};

fn wait_alive(scene: &Scene, nic: usize, alive: bool) -> Result<()> {
    let name = format!("up{nic}");
    wait_for(
        &format!("alive={alive} of {name}"),
        Duration::from_secs(15),
        Duration::from_millis(50),
        || Ok((scene.daemon()?.nic_is_alive(&name)? == alive).then_some(())),
    )
}

/// All sessions go on, and the frames from the guest leave by live links only.
fn survive(scene: &Scene, sessions: &Sessions, dead: usize, when: &str) -> Result<()> {
    let before = scene.fabric.counters();
    sessions.advance(scene, when)?;
    let sent: Vec<u64> = scene
        .fabric
        .counters()
        .iter()
        .zip(&before)
        .map(|(now, then)| now.to_peer - then.to_peer)
        .collect();
    assert_eq!(
        sent[dead], 0,
        "{when}: frames from the guest on the dead link: {sent:?}"
    );
    assert!(
        sent[1 - dead] > 0,
        "{when}: no frames from the guest on the live link: {sent:?}"
    );
    Ok(())
}

fn lose_each_in_turn(workers: u32) -> Result<()> {
    let scene = Scene::set(2, workers, 1)?;
    let sessions = scene.open_sessions(24)?;
    for nic in [0, 1, 0] {
        scene.fabric.link_down(nic)?;
        wait_alive(&scene, nic, false)?;
        survive(&scene, &sessions, nic, &format!("with up{nic} down"))?;
        scene.fabric.link_up(nic)?;
        wait_alive(&scene, nic, true)?;
        sessions.advance(&scene, &format!("with up{nic} back"))?;
    }
    sessions.finish(&scene)
}

#[test]
fn one_worker_survives_the_loss_of_each_nic() -> Result<()> {
    lose_each_in_turn(1)
}

#[test]
fn two_workers_survive_the_loss_of_each_nic() -> Result<()> {
    lose_each_in_turn(2)
}

#[test]
fn sessions_outlive_the_loss_of_all_nics() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let sessions = scene.open_sessions(8)?;
    for nic in [0, 1] {
        scene.fabric.link_down(nic)?;
        wait_alive(&scene, nic, false)?;
    }
    scene.fabric.link_up(1)?;
    wait_alive(&scene, 1, true)?;
    survive(&scene, &sessions, 0, "with one NIC back")?;
    scene.fabric.link_up(0)?;
    wait_alive(&scene, 0, true)?;
    sessions.advance(&scene, "with both NICs back")?;
    sessions.finish(&scene)
}

#[test]
fn an_operator_may_take_a_nic_down_on_the_host() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let sessions = scene.open_sessions(8)?;
    scene.fabric.host.ip(&["link", "set", "up0", "down"])?;
    wait_alive(&scene, 0, false)?;
    survive(&scene, &sessions, 0, "with up0 taken down on the host")?;
    scene.fabric.host.ip(&["link", "set", "up0", "up"])?;
    wait_alive(&scene, 0, true)?;
    sessions.advance(&scene, "with up0 up again")?;
    sessions.finish(&scene)
}
