//! Topology `pinned`: NICs on independent switches that learn where a guest is from its frames, or are told.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::fabric::{PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use vnic_tests::frontend::Device;
use vnic_tests::lock::MachineLock;
use vnic_tests::process::{Process, wait_for};
use vnic_tests::qemu::{Guest, GuestOptions, Vnic, endpoint, ping_from, prepare};
use vnic_tests::scene::{ECHO_PORT, PATIENCE, guest_ipv4, guest_ipv6, guest_mac, guest_mac_bytes, wait};
use vnic_tests::switches::Switches;
use vnic_tests::traffic::echo::EchoServer;
use vnic_tests::traffic::raw::{self, Capture};
use vnic_tests::traffic::sessions::{SessionGroup, SessionPlan};

const ARP: u16 = 0x0806;
const TAGGED: u16 = 0x8100;

/// A guest with a vNIC on each of these ports.
fn boot(folder: &Path, daemon: &Daemon, ports: &[&str]) -> Result<Guest> {
    let vnic = |(index, port): (usize, &&str)| Vnic::new(daemon.socket(port), &guest_mac(index));
    let vnics = ports.iter().enumerate().map(vnic).collect();
    Guest::launch(folder, &GuestOptions::new("guest", vnics))?
        .booted(1)
        .with_context(|| daemon.log_tail(30))
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

/// Waits until announcements of before are over.
fn silence(daemon: &Daemon) -> Result<()> {
    let announced = || -> Result<Option<u64>> { Ok(daemon.query("status")?["pinned"]["announced"].as_u64()) };
    let mut last = None;
    wait_for("silence", PATIENCE, Duration::from_secs(4), || {
        let before = std::mem::replace(&mut last, announced()?);
        Ok((before == last).then_some(()))
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
    let mut guest = boot(folder.path(), &daemon, &["p0"])?;
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
    daemon.wait_alive(&format!("up{first}"), false)?;
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
    daemon.wait_alive(&format!("up{first}"), true)?;
    broadcasts_arrive_once(&switches, &guest, "with the NIC back")?;
    assert_eq!(home(&daemon)?, second, "a NIC that returns takes nobody away");
    wait_learned(&switches, second, "still")?;

    // A guest that stands still says nothing; vnicd speaks for it, and knows its addresses.
    wait("its addresses", || {
        let listed = station(&daemon)?["addresses"].clone();
        let has = |address: &str| listed.as_array().is_some_and(|all| all.contains(&address.into()));
        Ok((has(&ipv4) && has(&ipv6)).then_some(()))
    })?;
    silence(&daemon)?;
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
    daemon.wait_alive(&format!("up{second}"), true)?;
    let drained = daemon.vnic(&["nic", "drain", &format!("up{first}")])?;
    assert!(drained.contains("0 are left"), "{drained}");
    wait_learned(&switches, second, "when its NIC is drained")?;
    assert_eq!(ping_from(&switches.peer, &ipv4, 3, 56)?, 3);
    Ok(())
}

/// A station as a test names it: which of the guest's vNICs, and the VLAN of its frames on the wire.
type Named = (usize, u16);

/// Stations by NIC, as vnicd reports them.
fn stations(daemon: &Daemon) -> Result<[BTreeSet<Named>; 2]> {
    let status = daemon.query("status")?;
    let listed = status["pinned"]["listed"]
        .as_array()
        .context("no list of stations")?;
    let mut by_nic = [BTreeSet::new(), BTreeSet::new()];
    for station in listed {
        let vnic = (0..VNICS.len()).find(|vnic| station["mac"] == guest_mac(*vnic));
        let vnic = vnic.with_context(|| format!("a stranger: {station}"))?;
        let vlan = station["vlan"].as_u64().context("no VLAN")?.try_into()?;
        by_nic[usize::from(station["nic"] == "up1")].insert((vnic, vlan));
    }
    Ok(by_nic)
}

/// The guest's vNICs: name and options of the port, and the tags of the frames that it sends by it (0: none).
const VNICS: [(&str, &str, &[u16]); 3] = [
    ("a", "vlan=7", &[0]),
    ("b", "", &[0]),
    ("t", "trunk=10-20", &[11, 12]),
];

fn tagged(mut frame: Vec<u8>, vlan: u16) -> Vec<u8> {
    if vlan != 0 {
        frame.splice(12..12, [TAGGED.to_be_bytes(), vlan.to_be_bytes()].concat());
    }
    frame
}

/// Which of the guest's stations a RARP frame announces.
fn announced(frame: &[u8]) -> Option<Named> {
    let (mac, vlan) = raw::announced(frame)?;
    let vnic = (0..VNICS.len()).find(|vnic| mac == guest_mac_bytes(*vnic))?;
    Some((vnic, vlan))
}

#[test]
fn each_address_in_each_vlan_is_balanced_and_announced_for_itself() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    prepare()?;
    let folder = tempfile::tempdir()?;
    let switches = Switches::new()?;
    let ports = VNICS.map(|(name, ..)| (name, ""));
    let mut options = DaemonOptions::new(&ports, &switches.nics(), 2);
    options.topology = "pinned";
    options.arguments = ["--lb", "least_conn"].map(str::to_owned).to_vec();
    for (index, (port, (_, vlans, _))) in options.ports.iter_mut().zip(VNICS).enumerate() {
        port.options = vlans.to_owned();
        // One is learned.
        port.mac = Some(guest_mac(index)).filter(|_| !vlans.is_empty());
    }
    let daemon = Daemon::start(&switches.host, folder.path(), &options)?;
    let mut guest = boot(folder.path(), &daemon, &VNICS.map(|(name, ..)| name))?;
    // Nothing but this test's frames.
    let quiet = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6";
    guest.run(&["sh", "-c", quiet], Duration::from_secs(20))?;
    let found = guest.interfaces()?;
    for (index, (name, _, tags)) in VNICS.iter().enumerate() {
        let interface = found.iter().find(|interface| interface.mac == guest_mac(index));
        let interface = &interface
            .with_context(|| format!("no interface for {name}"))?
            .name;
        guest.configure(interface, &[])?;
        for vlan in *tags {
            let frame = raw::experimental_frame([0xff; 6], guest_mac_bytes(index), b"here");
            guest.send_frame(interface, tagged(frame, *vlan), 3)?;
            // The next is placed by how many there are.
            wait("a station", || {
                let [one, other] = stations(&daemon)?;
                let mut all = one.union(&other);
                let wanted = if *vlan == 0 && index == 0 { 7 } else { *vlan };
                Ok(all.any(|station| *station == (index, wanted)).then_some(()))
            })?;
        }
    }
    let [one, other] = stations(&daemon)?;
    assert_eq!((one.len(), other.len()), (2, 2), "{one:?} {other:?}");
    let all: BTreeSet<Named> = one.union(&other).copied().collect();
    assert_eq!(all, BTreeSet::from([(0, 7), (1, 0), (2, 11), (2, 12)]));

    silence(&daemon)?;
    let capture = |kind| {
        switches
            .peer
            .run(move || Ok(Capture::start(PEER_INTERFACE, kind)?))
    };
    let announced_after = |event: &dyn Fn() -> Result<()>, all: &BTreeSet<Named>| -> Result<()> {
        let captures = [capture(raw::RARP)?, capture(TAGGED)?];
        event()?;
        let mut heard = BTreeSet::new();
        wait("the announcements", || {
            for capture in &captures {
                let frames = capture.collect(100, Duration::from_millis(100))?;
                heard.extend(frames.iter().filter_map(|frame| announced(frame)));
            }
            Ok(heard.is_superset(all).then_some(()))
        })?;
        assert_eq!(heard, *all);
        Ok(())
    };

    // QEMU has the guest announced, as after a migration.
    announced_after(&|| guest.announce(), &all)?;
    let stats = daemon.query("stats")?;
    for port in 0..VNICS.len() {
        let rarp = &stats["ports"][port]["rarp"];
        assert!(rarp["sent"].as_u64() > Some(0) && rarp["refused"] == 0, "{rarp}");
    }

    // Those of a lost NIC are announced, and no others.
    guest.process().signal(Signal::SIGSTOP)?;
    // What QEMU has asked for is over.
    wait("silence", || {
        let heard = capture(raw::RARP)?.collect(1, Duration::from_millis(500))?;
        Ok(heard.is_empty().then_some(()))
    })?;
    announced_after(&|| switches.set_port(0, "down"), &one)?;
    assert_eq!(stations(&daemon)?, [BTreeSet::new(), all.clone()]);

    // A NIC that is taken away hands its stations over.
    switches.set_port(0, "up")?;
    daemon.wait_alive("up0", true)?;
    let removed = daemon.vnic(&["nic", "remove", "up1"])?;
    assert!(removed.contains("4 stations go on by the others"), "{removed}");
    assert_eq!(stations(&daemon)?, [all, BTreeSet::new()]);
    guest.process().signal(Signal::SIGCONT)?;
    Ok(())
}

/// A NIC whose switch has lost the rest of the network; its link stays up, so only probes find out. The guest says nothing at all.
#[test]
fn a_switch_that_leads_nowhere_is_found_by_probes_and_its_station_moves() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let switches = Switches::new()?;
    let mac = guest_mac(0);
    let nics: Vec<String> = switches
        .nics()
        .iter()
        .map(|nic| format!("{nic},probe={PEER_IPV4}"))
        .collect();
    let mut options = DaemonOptions::new(&[("p0", &mac)], &nics, 1);
    options.topology = "pinned";
    let daemon = Daemon::start(&switches.host, folder.path(), &options)?;
    let _guest = Device::connect(&daemon.socket("p0"), 1)?;
    wait("the guest's station", || Ok(station(&daemon).ok()))?;
    let first = home(&daemon)?;
    let second = 1 - first;
    wait_learned(&switches, first, "at first")?;
    wait("answers to both NICs", || {
        let answered = |nic: usize| -> Result<bool> {
            let report = daemon.nic(&format!("up{nic}"))?;
            Ok(report["probe"]["answered"].as_u64() >= Some(3) && report["alive"] == true)
        };
        Ok((answered(0)? && answered(1)?).then_some(()))
    })?;

    switches.set_uplink(first, "down")?;
    daemon.wait_alive(&format!("up{first}"), false)?;
    let lost = daemon.nic(&format!("up{first}"))?;
    assert_eq!(lost["carrier"], true, "{lost}");
    wait_learned(&switches, second, "when its switch leads nowhere")?;
    assert_eq!(home(&daemon)?, second);

    switches.set_uplink(first, "up")?;
    daemon.wait_alive(&format!("up{first}"), true)?;
    assert_eq!(home(&daemon)?, second, "a NIC that returns takes nobody away");
    let events = daemon.vnic(&["events"])?;
    for part in [
        "probes in a row were not answered",
        "probes are answered again",
        &format!("up{second}  moved: mac {mac} of port p0 from up{first}"),
    ] {
        assert!(events.contains(part), "{part} in\n{events}");
    }
    Ok(())
}
