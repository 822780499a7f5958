//! Ports on VLANs: one guest with a vNIC on each of five ports, and a peer behind two NICs. All frames are raw.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vnic_tests::daemon::{Daemon, DaemonOptions, port_socket};
use vnic_tests::fabric::{Fabric, PEER_INTERFACE};
use vnic_tests::lag::Distribution;
use vnic_tests::lock::MachineLock;
use vnic_tests::qemu::{self, Guest, GuestOptions, Vnic};
use vnic_tests::scene::{guest_mac, guest_mac_bytes};
use vnic_tests::traffic::raw::{self, Capture, experimental_frame};

/// Ports by what they are; the position is that of the guest's address.
const PORTS: [(&str, &str); 5] = [
    ("a", "vlan=100"),
    ("b", "vlan=100"),
    ("c", "vlan=200"),
    ("trunk", "trunk=10-20+100"),
    ("plain", ""),
];
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const TRUNK: usize = 3;
const PLAIN: usize = 4;

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 0xee];
const BROADCAST: [u8; 6] = [0xff; 6];
const TAGGED: u16 = 0x8100;

/// A customer tag.
fn tag(tci: u16) -> Vec<u8> {
    [TAGGED.to_be_bytes(), tci.to_be_bytes()].concat()
}

/// A frame whose content names it, with these tags.
fn frame(to: [u8; 6], from: [u8; 6], tags: &[u8], name: &str) -> Vec<u8> {
    let mut frame = experimental_frame(to, from, name.as_bytes());
    frame.splice(12..12, tags.iter().copied());
    frame
}

/// What of a captured frame matters: its tags and its name; `None` for frames that are not this test's.
fn seen(frame: &[u8]) -> Option<String> {
    let mut rest = frame.get(12..)?;
    let mut text = String::new();
    while let [0x81 | 0x88, _, tci0, tci1, behind @ ..] = rest
        && rest[..2] != raw::EXPERIMENTAL.to_be_bytes()
    {
        text.push_str(&format!("{}/", u16::from_be_bytes([*tci0, *tci1])));
        rest = behind;
    }
    let payload = rest.strip_prefix(&raw::EXPERIMENTAL.to_be_bytes())?;
    let name: Vec<u8> = payload.iter().copied().take_while(|byte| *byte != 0).collect();
    Some(text + &String::from_utf8_lossy(&name))
}

struct Stage {
    guest: Guest,
    interfaces: Vec<String>,
    daemon: Daemon,
    fabric: Fabric,
    _folder: tempfile::TempDir,
    _machine: MachineLock,
}

impl Stage {
    fn set(workers: u32) -> Result<Stage> {
        let machine = MachineLock::acquire()?;
        qemu::prepare()?;
        let folder = tempfile::tempdir()?;
        let fabric = Fabric::new(2, 1, Distribution::Lag)?;
        let macs: Vec<String> = (0..PORTS.len()).map(guest_mac).collect();
        let ports: Vec<(&str, &str)> = PORTS
            .iter()
            .zip(&macs)
            .map(|((name, _), mac)| (*name, mac.as_str()))
            .collect();
        let mut options = DaemonOptions::new(&ports, &fabric.nics(), workers);
        for (port, (_, vlans)) in options.ports.iter_mut().zip(PORTS) {
            port.options = vlans.to_owned();
        }
        let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
        let vnic = |(name, mac): &(&str, &str)| Vnic::new(port_socket(folder.path(), name), mac);
        let guest = Guest::launch(
            folder.path(),
            &GuestOptions::new("g", ports.iter().map(vnic).collect()),
        )?
        .booted(1)
        .with_context(|| format!("the end of vnicd's log:\n{}", daemon.log_tail(30)))?;
        let found = guest.interfaces()?;
        let named = |mac: &String| {
            let interface = found.iter().find(|interface| interface.mac == *mac);
            Ok(interface
                .with_context(|| format!("no interface has {mac}"))?
                .name
                .clone())
        };
        let interfaces: Vec<String> = macs.iter().map(named).collect::<Result<_>>()?;
        // What the guest's kernel says by itself has no tag, and a trunk would drop and count it.
        for which in ["all", "default"] {
            let quiet = format!("echo 1 > /proc/sys/net/ipv6/conf/{which}/disable_ipv6");
            let output = guest.run(&["sh", "-c", &quiet], Duration::from_secs(20))?;
            assert_eq!(output.status, 0, "{output:?}");
        }
        for interface in &interfaces {
            guest.configure(interface, &[])?;
        }
        Ok(Stage {
            guest,
            interfaces,
            daemon,
            fabric,
            _folder: folder,
            _machine: machine,
        })
    }

    /// Sends by one of the guest's vNICs.
    fn guest_sends(&self, from: usize, to: [u8; 6], tags: &[u8], name: &str) -> Result<()> {
        let frame = frame(to, guest_mac_bytes(from), tags, name);
        self.guest.send_frame(&self.interfaces[from], frame, 1)
    }

    fn peer_sends(&self, to: [u8; 6], tags: &[u8], name: &str) -> Result<()> {
        let frame = frame(to, PEER, tags, name);
        self.fabric.peer.run(|| Ok(raw::send(PEER_INTERFACE, &frame, 1)?))
    }

    /// Captures everywhere while `send` runs; what each of the guest's vNICs and, last, the peer have seen, sorted.
    fn observe(&self, send: impl FnOnce() -> Result<()>, expected: [&[&str]; 6]) -> Result<()> {
        let kinds = [raw::EXPERIMENTAL, TAGGED, 0x88a8];
        let mut at_guest = Vec::new();
        for interface in &self.interfaces {
            for kind in kinds {
                at_guest.push(self.guest.start_capture(interface, kind)?);
            }
        }
        let mut at_peer = Vec::new();
        for kind in kinds {
            let capture = self
                .fabric
                .peer
                .run(|| Ok(Capture::start(PEER_INTERFACE, kind)?))?;
            at_peer.push(capture);
        }
        send()?;
        // The first capture waits until whatever is to come has come; the others find it in their sockets.
        let mut patience = Duration::from_millis(1500);
        let mut take = |frames: &mut Vec<String>, capture: u64| -> Result<()> {
            let got = self.guest.finish_capture(capture, 1000, patience)?;
            patience = Duration::from_millis(50);
            frames.extend(got.iter().filter_map(|frame| seen(frame)));
            Ok(())
        };
        let mut all: Vec<Vec<String>> = Vec::new();
        for captures in at_guest.chunks(kinds.len()) {
            let mut frames = Vec::new();
            for capture in captures {
                take(&mut frames, *capture)?;
            }
            all.push(frames);
        }
        let mut frames = Vec::new();
        for capture in &at_peer {
            let got = capture.collect(1000, Duration::from_millis(50))?;
            frames.extend(got.iter().filter_map(|frame| seen(frame)));
        }
        all.push(frames);
        let places = PORTS.iter().map(|(name, _)| *name).chain(["peer"]);
        let got: BTreeMap<&str, Vec<String>> = places
            .clone()
            .zip(all)
            .map(|(place, mut frames)| {
                frames.sort();
                (place, frames)
            })
            .collect();
        let wanted: BTreeMap<&str, Vec<String>> = places
            .zip(expected)
            .map(|(place, frames)| {
                let mut frames: Vec<String> = frames.iter().map(|frame| (*frame).to_owned()).collect();
                frames.sort();
                (place, frames)
            })
            .collect();
        assert_eq!(got, wanted);
        Ok(())
    }

    /// Frames that a port or a NIC dropped because of their VLAN.
    fn drops(&self, kind: &str, name: &str) -> Result<u64> {
        let stats = self.daemon.query("stats")?;
        let rows = stats[kind].as_array().context("no such list")?;
        let key = if kind == "ports" { "name" } else { "id" };
        let of = |row: &&Value| name.is_empty() || row[key].as_str() == Some(name);
        Ok(rows
            .iter()
            .filter(of)
            .filter_map(|row| row["drops"]["vlan_not_allowed"].as_u64())
            .sum())
    }
}

#[test]
fn one_worker_keeps_vlans_apart() -> Result<()> {
    keep_vlans_apart(1)
}

#[test]
fn two_workers_keep_vlans_apart() -> Result<()> {
    keep_vlans_apart(2)
}

fn keep_vlans_apart(workers: u32) -> Result<()> {
    let stage = Stage::set(workers)?;
    let mac = guest_mac_bytes;
    let none: &[u8] = &[];

    let names = ["a", "b", "c", "trunk", "plain"];
    let drops = || -> Result<Vec<u64>> { names.iter().map(|name| stage.drops("ports", name)).collect() };
    let before = drops()?;
    // From the guest. An access port's frames have its tag everywhere but on another access port of the VLAN.
    stage.observe(
        || {
            stage.guest_sends(A, BROADCAST, none, "a-all")?;
            stage.guest_sends(A, mac(B), none, "a-b")?;
            stage.guest_sends(A, mac(C), none, "a-c")?;
            stage.guest_sends(A, mac(TRUNK), none, "a-trunk")?;
            stage.guest_sends(A, mac(PLAIN), none, "a-plain")?;
            stage.guest_sends(A, PEER, none, "a-peer")?;
            stage.guest_sends(C, BROADCAST, none, "c-all")?;
            stage.guest_sends(TRUNK, BROADCAST, &tag(10), "trunk-all")?;
            stage.guest_sends(TRUNK, mac(A), &tag(100), "trunk-a")?;
            stage.guest_sends(TRUNK, mac(A), &tag(10), "trunk10-a")?;
            stage.guest_sends(PLAIN, BROADCAST, none, "plain-all")?;
            stage.guest_sends(PLAIN, BROADCAST, &tag(200), "plain200-all")?;
            stage.guest_sends(PLAIN, PEER, &[tag(0xe12c), tag(7)].concat(), "plain-twice")?;
            stage.guest_sends(PLAIN, PEER, &[0x88, 0xa8, 0, 9], "plain-service")?;
            // These do not pass.
            stage.guest_sends(A, BROADCAST, &tag(100), "no")?;
            stage.guest_sends(A, mac(B), &tag(0), "no")?;
            stage.guest_sends(TRUNK, BROADCAST, none, "no")?;
            stage.guest_sends(TRUNK, PEER, &tag(21), "no")
        },
        [
            &["trunk-a"],
            &["a-all", "a-b"],
            &["plain200-all"],
            &["100/a-all", "100/a-trunk"],
            &["100/a-all", "100/a-plain", "200/c-all", "10/trunk-all"],
            &[
                "100/a-all",
                "100/a-c",
                "100/a-peer",
                "200/c-all",
                "10/trunk-all",
                "10/trunk10-a",
                "plain-all",
                "200/plain200-all",
                "57644/7/plain-twice",
                "9/plain-service",
            ],
        ],
    )?;
    let dropped: Vec<u64> = drops()?
        .iter()
        .zip(before)
        .map(|(now, then)| now - then)
        .collect();
    assert_eq!(dropped, [2, 0, 0, 2, 0]);

    // From the peer, by the sockets of the NICs and by the copies of group frames.
    let before = stage.drops("nics", "")?;
    stage.observe(
        || {
            stage.peer_sends(BROADCAST, &tag(100), "all-100")?;
            stage.peer_sends(BROADCAST, &tag(15), "all-15")?;
            stage.peer_sends(BROADCAST, &tag(300), "all-300")?;
            stage.peer_sends(BROADCAST, none, "all")?;
            stage.peer_sends(mac(A), &tag(0xa064), "a-100")?;
            stage.peer_sends(mac(C), &tag(200), "c-200")?;
            stage.peer_sends(mac(TRUNK), &tag(15), "trunk-15")?;
            stage.peer_sends(mac(PLAIN), none, "plain")?;
            stage.peer_sends(mac(PLAIN), &[tag(300), tag(7)].concat(), "plain-twice")?;
            // These do not pass.
            stage.peer_sends(mac(A), none, "no")?;
            stage.peer_sends(mac(A), &tag(200), "no")?;
            stage.peer_sends(mac(TRUNK), none, "no")?;
            stage.peer_sends(mac(TRUNK), &tag(30), "no")
        },
        [
            &["all-100", "a-100"],
            &["all-100"],
            &["c-200"],
            &["100/all-100", "15/all-15", "15/trunk-15"],
            &[
                "100/all-100",
                "15/all-15",
                "300/all-300",
                "all",
                "plain",
                "300/7/plain-twice",
            ],
            &[],
        ],
    )?;
    assert_eq!(stage.drops("nics", "")? - before, 4);

    // A session of an access port is the wire's: with the tag.
    let mut datagram = PEER.to_vec();
    datagram.extend(mac(A));
    datagram.extend([
        0x08, 0, 0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    datagram.extend([0x0f, 0xa0, 0x0f, 0xa1, 0, 8, 0, 0]);
    datagram.resize(60, 0);
    stage.guest.send_frame(&stage.interfaces[A], datagram, 1)?;
    vnic_tests::process::wait_for(
        "the session",
        Duration::from_secs(10),
        Duration::from_millis(50),
        || {
            let listed = stage.daemon.query("sessions")?;
            let rows = listed["sessions"].as_array().context("no list")?;
            let of = |row: &&Value| row["protocol"] == "udp" && row["ends"][0]["port"] == 4000;
            Ok(rows
                .iter()
                .find(of)
                .map(|row| assert_eq!(row["vlans"], serde_json::json!([100]), "{row}")))
        },
    )?;
    let ports = stage.daemon.vnic(&["ports"])?;
    for shown in ["access 100", "access 200", "trunk 10-20+100", "any"] {
        assert!(ports.contains(shown), "{shown}: {ports}");
    }
    Ok(())
}
