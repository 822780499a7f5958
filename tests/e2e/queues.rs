//! A guest that changes the number of its queue pairs while it has traffic.

use std::time::Duration;

use anyhow::{Context, Result};
use vnic_tests::process::wait_for;
use vnic_tests::scene::{PATIENCE, Scene};

/// Queue pairs that are offered.
const OFFERED: usize = 8;

/// Frames that the guest was given, by queue pair.
fn received(scene: &Scene) -> Result<Vec<u64>> {
    let stats = scene.daemon()?.query("stats")?;
    let pairs = stats
        .pointer("/ports/0/queue_pairs")
        .and_then(|pairs| pairs.as_array().cloned())
        .context("no queue pairs in the statistics")?;
    let frames = |pair: &serde_json::Value| pair.pointer("/guest_rx/frames")?.as_u64();
    pairs
        .iter()
        .map(|pair| frames(pair).context("no count of frames"))
        .collect()
}

/// Waits until frames came in by at least `least` of the first `enabled` queue pairs, and checks that none came by another.
fn spread(scene: &Scene, enabled: usize, least: usize) -> Result<()> {
    let before = received(scene)?;
    let since = || -> Result<Vec<u64>> {
        let now = received(scene)?;
        Ok(now.iter().zip(&before).map(|(now, then)| now - then).collect())
    };
    wait_for(
        &format!("frames by {least} of {enabled} queue pairs"),
        PATIENCE,
        Duration::from_millis(100),
        || {
            let used = since()?[..enabled].iter().filter(|frames| **frames > 0).count();
            Ok((used >= least).then_some(()))
        },
    )
    .with_context(|| format!("frames since then by queue pair: {:?}", since()))?;
    let others = &since()?[enabled..];
    assert!(
        others.iter().all(|frames| *frames == 0),
        "frames by queue pairs that the guest does not use: {others:?}"
    );
    Ok(())
}

fn change_queues_under_traffic(scene: &Scene) -> Result<()> {
    let sessions = scene.open_sessions(24)?;
    // As many flows as that fall on three of three queues, and on most of eight.
    for (pairs, least) in [(1, 1), (OFFERED, 5), (3, 3), (1, 1)] {
        scene.guests[0].set_queue_pairs("eth0", u32::try_from(pairs)?)?;
        sessions.advance(scene, &format!("with {pairs} queue pairs"))?;
        spread(scene, pairs, least)?;
    }
    sessions
        .advance(scene, "at the end")
        .and_then(|()| sessions.finish(scene))
}

#[test]
fn split_queues_come_and_go_under_traffic() -> Result<()> {
    change_queues_under_traffic(&Scene::with_queues(1, 2, 1, u32::try_from(OFFERED)?)?)
}

#[test]
fn packed_queues_come_and_go_under_traffic() -> Result<()> {
    change_queues_under_traffic(&Scene::with_packed_queues(1, 2, u32::try_from(OFFERED)?)?)
}
