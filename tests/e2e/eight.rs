//! Several of everything: eight guests on eight NICs at once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vnic_tests::fabric::PEER_IPV4;
use vnic_tests::process::wait_for;
use vnic_tests::qemu::endpoint;
use vnic_tests::scene::{ECHO_PORT, PATIENCE, Scene, guest_ipv4};
use vnic_tests::traffic::echo::EchoServer;
use vnic_tests::traffic::sessions::{SessionGroup, SessionPlan, SessionsReport};

/// Guests, and NICs.
const EIGHT: usize = 8;
/// Sessions of each guest to the peer: so many in all that each NIC gets some.
const TO_PEER: u32 = 16;
/// Sessions of each guest to its neighbour, and of the peer to each guest.
const TO_GUEST: u32 = 4;
/// Echoes that each session must get.
const ECHOES: u64 = 10;

fn plan(address: &str, count: u32) -> Result<SessionPlan> {
    Ok(SessionPlan {
        target: endpoint(address, ECHO_PORT)?,
        count,
        // Eight emulated guests share the machine's few cores.
        interval_ms: 200,
        message_bytes: 200,
    })
}

fn check(who: &str, report: &SessionsReport) -> Result<bool> {
    let errors = report.errors();
    ensure!(
        errors.is_empty(),
        "{who}: {} sessions failed, the first: {}",
        errors.len(),
        errors[0]
    );
    Ok(report.least_echoed() >= ECHOES)
}

/// What a counter of each entry of a list in a report says.
fn counters(report: &Value, list: &str, counter: &str) -> Result<Vec<u64>> {
    let entries = report[list].as_array().context("no such list")?;
    let read = |entry: &Value| entry.pointer(counter).and_then(Value::as_u64);
    entries
        .iter()
        .map(|entry| read(entry).with_context(|| format!("no {counter} in {entry}")))
        .collect()
}

#[test]
fn eight_guests_on_eight_nics_at_once() -> Result<()> {
    let scene = Scene::set(EIGHT, 2, EIGHT)?;
    let echo = scene.fabric.peer.run(|| Ok(EchoServer::start(ECHO_PORT)?))?;
    for guest in &scene.guests {
        guest.tcp_echo(ECHO_PORT)?;
    }
    let carried_before = scene.fabric.counters();

    let mut from_guests = Vec::new();
    let mut from_peer = Vec::new();
    for (index, guest) in scene.guests.iter().enumerate() {
        let neighbour = guest_ipv4((index + 1) % EIGHT);
        from_guests.push((index, guest.start_sessions(plan(PEER_IPV4, TO_PEER)?)?));
        from_guests.push((index, guest.start_sessions(plan(&neighbour, TO_GUEST)?)?));
        let to_guest = plan(&guest_ipv4(index), TO_GUEST)?;
        from_peer.push(scene.fabric.peer.run(|| Ok(SessionGroup::start(&to_guest)?))?);
    }
    wait_for(
        "echoes of all sessions at once",
        PATIENCE,
        Duration::from_millis(500),
        || {
            let mut enough = true;
            for (guest, group) in &from_guests {
                let report = scene.guests[*guest].sessions_progress(*group, false)?;
                enough &= check(&format!("guest {guest}"), &report)?;
            }
            for (guest, group) in from_peer.iter().enumerate() {
                enough &= check(&format!("the peer to guest {guest}"), &group.progress(false))?;
            }
            Ok(enough.then_some(()))
        },
    )
    .with_context(|| scene.log(20))?;

    let daemon = scene.daemon()?;
    let sessions = daemon.sessions_per_nic(&scene.fabric.nics())?;
    assert!(
        sessions.iter().all(|count| *count > 0),
        "sessions per NIC: {sessions:?}"
    );
    for (guest, group) in from_guests {
        let report = scene.guests[guest].finish_sessions(group)?;
        check(&format!("guest {guest} at the end"), &report)?;
    }
    for (guest, group) in from_peer.into_iter().enumerate() {
        check(&format!("the peer to guest {guest} at the end"), &group.finish())?;
    }
    assert_eq!(echo.stats().resets, 0, "the peer saw resets");

    let stats = daemon.query("stats")?;
    for (list, counter) in [
        ("nics", "/rx/frames"),
        ("nics", "/tx/frames"),
        ("ports", "/guest_rx/frames"),
        ("ports", "/guest_tx/frames"),
    ] {
        let counts = counters(&stats, list, counter)?;
        assert_eq!(counts.len(), EIGHT, "{list}");
        assert!(
            counts.iter().all(|count| *count > 0),
            "{list}{counter}: {counts:?}"
        );
    }
    for (link, (now, then)) in scene.fabric.counters().iter().zip(&carried_before).enumerate() {
        let (to_peer, from_peer) = (now.to_peer - then.to_peer, now.from_peer - then.from_peer);
        assert!(
            to_peer > 0 && from_peer > 0,
            "link {link}: {to_peer} frames to the peer, {from_peer} from it"
        );
    }
    Ok(())
}
