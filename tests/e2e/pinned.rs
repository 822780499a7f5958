//! Topology `pinned`: NICs on independent switches that learn where a guest is from its frames, or are told.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use vnic_tests::daemon::{Daemon, DaemonOptions, port_socket};
use vnic_tests::fabric::{PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use vnic_tests::lock::MachineLock;
use vnic_tests::process::{Process, wait_for};
use vnic_tests::qemu::{Guest, GuestOptions, Vnic, endpoint, ping_from, prepare};
use vnic_tests::scene::{ECHO_PORT, PATIENCE, guest_ipv4, guest_ipv6, guest_mac, guest_mac_bytes};
use vnic_tests::switches::Switches;
use vnic_tests::traffic::echo::EchoServer;
use vnic_tests::traffic::raw::{self, Capture};
use vnic_tests::traffic::sessions::{SessionGroup, SessionPlan};

const ARP: u16 = 0x0806;

fn wait<T>(what: &str, ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_for(what, PATIENCE, Duration::from_millis(50), ready)
}

/// The guest's station, as vnicd reports it.
fn station(daemon: &Daemon) -> Result<Value> {
    let status = daemon.query("status")?;
    let listed = status["pinned"]["listed"]
        .as_array()
        .context("no list of stations")?;
    ensure!(listed.len() == 1, "{status}");
    Ok(listed[0].clone())
}

/// The NIC that vnicd says the guest is on.
fn home(daemon: &Daemon) -> Result<usize> {
    let nic = station(daemon)?["nic"].as_str().unwrap_or_default().to_owned();
    nic.strip_prefix("up")
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no NIC is called {nic:?}"))
}

fn wait_learned(switches: &Switches, nic: usize, when: &str) -> Result<()> {
    wait(
        &format!("the switch to find the guest behind up{nic} {when}"),
        || Ok((switches.learned(&guest_mac(0))? == Some(nic)).then_some(())),
    )
}

fn wait_alive(daemon: &Daemon, nic: usize, alive: bool) -> Result<()> {
    wait(&format!("alive={alive} of up{nic}"), || {
        Ok((daemon.nic_is_alive(&format!("up{nic}"))? == alive).then_some(()))
    })
}

/// Each of several broadcast frames from the network reaches the guest once.
fn broadcasts_arrive_once(switches: &Switches, guest: &Guest, when: &str) -> Result<()> {
    const COUNT: u32 = 20;
    let frames: Vec<Vec<u8>> = (0..COUNT)
        .map(|number| {
            let payload = format!("{when} {number}");
            raw::experimental_frame([0xff; 6], [2, 0, 0, 0, 0, 9], payload.as_bytes())
        })
        .collect();
    let capture = guest.start_capture("eth0", raw::EXPERIMENTAL)?;
    switches.peer.run(|| {
        for frame in &frames {
            raw::send(PEER_INTERFACE, frame, 1)?;
        }
        Ok(())
    })?;
    let arrived = guest.finish_capture(capture, COUNT + 1, Duration::from_secs(1))?;
    ensure!(
        arrived == frames,
        "{when}: {} of {COUNT} broadcasts arrived",
        arrived.len()
    );
    Ok(())
}

#[test]
fn switches_are_told_where_a_silent_guest_is() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    prepare()?;
    let folder = tempfile::tempdir()?;
    let switches = Switches::new()?;
    let mac = guest_mac(0);
    let mut options = DaemonOptions::new(&[("p0", &mac)], &switches.nics(), 1);
    options.topology = "pinned";
    let daemon = Daemon::start(&switches.host, folder.path(), &options)?;
    let vnic = Vnic {
        packed: false,
        socket: port_socket(folder.path(), "p0"),
        mac: mac.clone(),
        queues: 1,
    };
    let mut guest = Guest::launch(folder.path(), &GuestOptions::new("g0", vec![vnic]))?
        .booted(1)
        .with_context(|| daemon.log_tail(30))?;
    let (ipv4, ipv6) = (guest_ipv4(0), guest_ipv6(0));
    guest.configure("eth0", &[&format!("{ipv4}/24"), &format!("{ipv6}/64")])?;
    assert_eq!(guest.ping(PEER_IPV4, 3, 1400)?, 3);
    assert_eq!(guest.ping(PEER_IPV6, 3, 1400)?, 3);
    let first = home(&daemon)?;
    wait_learned(&switches, first, "at first")?;

    // While traffic runs both ways, no switch sees the address move.
    let mut monitor = switches.switches.command("bridge");
    monitor.args(["monitor", "fdb"]);
    let log = folder.path().join("fdb.log");
    let mut monitor = Process::start("bridge", monitor, &log)?;
    let echo = switches.peer.run(|| Ok(EchoServer::start(ECHO_PORT)?))?;
    guest.tcp_echo(ECHO_PORT)?;
    let plan = |address: &str| -> Result<SessionPlan> {
        Ok(SessionPlan {
            target: endpoint(address, ECHO_PORT)?,
            count: 16,
            interval_ms: 50,
            message_bytes: 300,
        })
    };
    let from_guest = guest.start_sessions(plan(PEER_IPV4)?)?;
    let to_guest = plan(&ipv4)?;
    let from_peer = switches.peer.run(|| Ok(SessionGroup::start(&to_guest)?))?;
    wait("traffic both ways", || {
        let least = guest.sessions_progress(from_guest, false)?.least_echoed();
        Ok((least.min(from_peer.progress(false).least_echoed()) >= 20).then_some(()))
    })?;
    broadcasts_arrive_once(&switches, &guest, "with both NICs")?;
    monitor.must_run()?;
    monitor.kill()?;
    let moved = fs::read_to_string(&log)?;
    assert!(!moved.contains(&mac), "the guest's address flaps:\n{moved}");

    // The loss of its NIC costs no session.
    switches.set_port(first, "down")?;
    wait_alive(&daemon, first, false)?;
    let second = 1 - first;
    assert_eq!(home(&daemon)?, second);
    let start = from_peer.progress(false).least_echoed();
    wait("traffic by the other NIC", || {
        let report = from_peer.progress(false);
        ensure!(report.errors().is_empty(), "{:?}", report.errors());
        Ok((report.least_echoed() >= start + 10).then_some(()))
    })?;
    assert_eq!(guest.finish_sessions(from_guest)?.errors(), Vec::<String>::new());
    assert_eq!(from_peer.finish().errors(), Vec::<String>::new());
    assert_eq!(echo.stats().resets, 0);
    broadcasts_arrive_once(&switches, &guest, "with one NIC")?;
    switches.set_port(first, "up")?;
    wait_alive(&daemon, first, true)?;
    broadcasts_arrive_once(&switches, &guest, "with the NIC back")?;
    assert_eq!(home(&daemon)?, second, "a NIC that returns takes nobody away");
    wait_learned(&switches, second, "still")?;

    // A guest that stands still says nothing; vnicd speaks for it, and knows its addresses.
    wait("its addresses", || {
        let listed = station(&daemon)?["addresses"].clone();
        let has = |address: &str| listed.as_array().is_some_and(|all| all.contains(&address.into()));
        Ok((has(&ipv4) && has(&ipv6)).then_some(()))
    })?;
    // Announcements of before are over.
    let announced = || -> Result<Option<u64>> { Ok(daemon.query("status")?["pinned"]["announced"].as_u64()) };
    let mut last = announced()?;
    wait_for("silence", PATIENCE, Duration::from_secs(4), || {
        let before = std::mem::replace(&mut last, announced()?);
        Ok((before == last).then_some(()))
    })?;
    guest.process().signal(Signal::SIGSTOP)?;
    let sent = || -> Result<Value> { Ok(daemon.query("stats")?["ports"][0]["guest_tx"].clone()) };
    let before = sent()?;
    let capture = switches.peer.run(|| Ok(Capture::start(PEER_INTERFACE, ARP)?))?;
    switches.set_port(second, "down")?;
    wait_learned(&switches, first, "though it is silent")?;
    assert_eq!(sent()?, before, "the guest sent something after all");
    let octets = ipv4.split('.').map(str::parse).collect::<Result<Vec<u8>, _>>()?;
    let heard = capture.collect(1, PATIENCE)?;
    let gratuitous = |frame: &Vec<u8>| {
        frame[6..12] == guest_mac_bytes(0) && frame[28..32] == *octets && frame[38..42] == *octets
    };
    assert!(heard.iter().all(gratuitous) && !heard.is_empty(), "{heard:02x?}");
    guest.process().signal(Signal::SIGCONT)?;
    assert_eq!(ping_from(&switches.peer, &ipv4, 3, 56)?, 3);

    // vnicd tells the truth about it.
    let events = daemon.vnic(&["events"])?;
    let told = format!("up{first}  moved: mac {mac} of port p0 from up{second}");
    assert!(events.contains(&told), "{told} in\n{events}");
    let explained = daemon.vnic(&["explain", "mac", &mac])?;
    for part in [
        format!("leaves by  up{first}\n"),
        "because    the station is pinned to it\n".to_owned(),
    ] {
        assert!(explained.contains(&part), "{part} in\n{explained}");
    }
    let refused = daemon.vnic(&["explain", "tcp", "10.77.0.2:1", "10.77.0.1:2"]);
    let refused = format!("{:#}", refused.expect_err("sessions decide nothing here"));
    assert!(refused.contains("names no station"), "{refused}");

    // An operator may empty a NIC.
    switches.set_port(second, "up")?;
    wait_alive(&daemon, second, true)?;
    let drained = daemon.vnic(&["nic", "drain", &format!("up{first}")])?;
    assert!(drained.contains("0 are left"), "{drained}");
    wait_learned(&switches, second, "when its NIC is drained")?;
    assert_eq!(ping_from(&switches.peer, &ipv4, 3, 56)?, 3);
    Ok(())
}
