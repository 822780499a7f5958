//! The front-end without a virtual machine, which other tests run inside one, on this machine: if it fails here, it is not the machine.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::fabric::{Fabric, PEER_INTERFACE};
use vnic_tests::frontend::{Link, Plan, exchange};
use vnic_tests::lag::Distribution;
use vnic_tests::process::wait_for;
use vnic_tests::scene::{PATIENCE, guest_mac, guest_mac_bytes};
use vnic_tests::sys::PacketSocket;
use vnic_tests::traffic::raw::{self, Capture};
use vnic_tests::vm_host::{ADDRESSES, Echo, GUEST_MAC};

/// Frames of an exchange: every size, four times.
const FRAMES: u32 = 4 * 1455;

fn every_size_comes_back(pairs: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(1, u32::try_from(pairs)?, Distribution::Lag)?;
    let socket = fabric.peer.run(|| Ok(PacketSocket::open(PEER_INTERFACE)?))?;
    let _echo = Echo::start(socket);
    let mut options = DaemonOptions::new(&[("p0", GUEST_MAC)], &fabric.nics(), 1);
    options.ports[0].queues = u32::try_from(pairs)?;
    let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    let plan = Plan {
        addresses: ADDRESSES,
        frames: FRAMES,
        window: 64,
        pairs,
        resend: None,
    };
    let report = exchange(&daemon.socket("p0"), &plan)?;
    assert_eq!(report.answered, FRAMES, "{report:?}");
    assert!(report.per_pair.iter().all(|count| *count > 0), "{report:?}");
    Ok(())
}

#[test]
fn every_size_comes_back_to_one_queue_pair() -> Result<()> {
    every_size_comes_back(1)
}

#[test]
fn every_size_comes_back_to_two_queue_pairs() -> Result<()> {
    every_size_comes_back(2)
}

#[test]
fn the_next_guest_of_a_port_may_have_another_address() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(1, 1, Distribution::Lag)?;
    let mut options = DaemonOptions::new(&[("p0", "")], &fabric.nics(), 1);
    options.ports[0].mac = None;
    let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    for last in [1, 2] {
        let mut addresses = ADDRESSES;
        addresses.guest[5] = last;
        let socket = fabric.peer.run(|| Ok(PacketSocket::open(PEER_INTERFACE)?))?;
        let _echo = Echo::between(socket, addresses);
        let plan = Plan {
            addresses,
            frames: FRAMES,
            window: 64,
            pairs: 1,
            // Until the address is learned, what comes for it is nobody's.
            resend: Some(Duration::from_millis(100)),
        };
        let report = exchange(&daemon.socket("p0"), &plan)?;
        assert_eq!(report.answered, FRAMES, "{report:?}");
        let learned = &daemon.query("ports")?["ports"][0]["mac"];
        assert_eq!(
            *learned,
            format!("52:54:00:00:00:0{last}"),
            "still shown when it is gone"
        );
    }
    Ok(())
}

/// Ports with the VLANs that their guests are announced in; 0: without a tag.
const ANNOUNCED: [(&str, &str, &[u16]); 3] = [
    ("a", "vlan=7", &[7]),
    ("learned", "", &[0]),
    ("t", "trunk=10-11+4094", &[10, 11, 4094]),
];

/// The guest that a RARP frame announces, and its VLAN; `None` for another frame.
fn announced(frame: &[u8]) -> Option<(usize, u16)> {
    let (mac, vlan) = raw::announced(frame)?;
    let guest = (0..ANNOUNCED.len()).find(|guest| mac == guest_mac_bytes(*guest))?;
    Some((guest, vlan))
}

#[test]
fn a_front_end_has_its_own_guest_announced_and_no_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(2, 1, Distribution::Lag)?;
    let mut options = DaemonOptions::new(&ANNOUNCED.map(|(name, ..)| (name, "")), &fabric.nics(), 1);
    for (guest, (port, (_, vlans, _))) in options.ports.iter_mut().zip(ANNOUNCED).enumerate() {
        port.options = vlans.to_owned();
        port.mac = (!vlans.is_empty()).then(|| guest_mac(guest));
    }
    let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    let mut links = Vec::new();
    for (name, ..) in ANNOUNCED {
        links.push(Link::connect(&daemon.socket(name), 1, 0, 0)?);
    }
    // What is not known of a guest may be learned from its front-end, by the same rule as from the guest.
    links[1].send_rarp(guest_mac_bytes(0))?;
    wait_for("the request refused", PATIENCE, Duration::from_millis(10), || {
        let stats = daemon.query("stats")?;
        Ok((stats["ports"][1]["rarp"]["refused"] == 1).then_some(()))
    })?;
    let socket = || fabric.peer.run(|| Ok(PacketSocket::open(PEER_INTERFACE)?));
    // By whichever NIC is alive.
    for dead in [None, Some(0)] {
        if let Some(dead) = dead {
            fabric.link_down(dead)?;
            wait_for("a NIC's loss", PATIENCE, Duration::from_millis(10), || {
                Ok((!daemon.nic_is_alive(&format!("up{dead}"))?).then_some(()))
            })?;
        }
        let socket = socket()?;
        for (guest, link) in links.iter_mut().enumerate() {
            assert!(link.send_rarp(guest_mac_bytes(guest))?, "{guest}");
        }
        let mut heard = Vec::new();
        let mut buffer = [0; 2048];
        wait_for("the announcements", PATIENCE, Duration::from_millis(10), || {
            while let Some(length) = socket.receive(&mut buffer)? {
                heard.extend(announced(&buffer[..length]));
            }
            Ok((heard.len() >= 5).then_some(()))
        })?;
        let expected = [(0, 7), (1, 0), (2, 10), (2, 11), (2, 4094)];
        let once: BTreeSet<_> = heard.iter().copied().collect();
        assert_eq!((once, heard.len()), (BTreeSet::from(expected), 5), "{heard:?}");
    }

    // Neither another's guest nor anybody's, also where an address was learned.
    let capture = fabric
        .peer
        .run(|| Ok(Capture::start(PEER_INTERFACE, raw::RARP)?))?;
    for (guest, link) in links.iter_mut().enumerate() {
        for mac in [guest_mac_bytes((guest + 1) % 3), [0; 6], [0xff; 6]] {
            assert!(!link.send_rarp(mac)?, "{guest} {mac:02x?}");
        }
    }
    // After that, in order, one that is taken: the front-end was not turned away.
    assert!(links[1].send_rarp(guest_mac_bytes(1))?);
    let heard = capture.collect(1, PATIENCE)?;
    assert_eq!(
        heard.iter().map(|frame| announced(frame)).collect::<Vec<_>>(),
        [Some((1, 0))]
    );
    let stats = daemon.query("stats")?;
    for (guest, sent, refused) in [(0, 2, 3), (1, 3, 4), (2, 6, 3)] {
        let rarp = &stats["ports"][guest]["rarp"];
        let counted = ["sent", "unsent", "refused"].map(|field| rarp[field].as_u64());
        assert_eq!(counted, [Some(sent), Some(0), Some(refused)], "{guest}");
    }
    Ok(())
}
