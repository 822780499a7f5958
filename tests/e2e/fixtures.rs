//! The fixtures themselves, without vnicd: so that a failing end-to-end test means the daemon.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use vnic_tests::fabric::{Fabric, PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use vnic_tests::lag::{Distribution, LagSwitch};
use vnic_tests::lock::MachineLock;
use vnic_tests::netns::Netns;
use vnic_tests::process::{run, wait_for};
use vnic_tests::qemu::{Guest, GuestOptions, endpoint, ping_from};
use vnic_tests::traffic::bulk::{self, BulkPlan, BulkServer};
use vnic_tests::traffic::echo::EchoServer;
use vnic_tests::traffic::raw::{self, Capture};
use vnic_tests::traffic::sessions::{SessionGroup, SessionPlan};
use vnic_tests::traffic::udp::{self, UdpEcho, UdpPlan};

const OTHER_IPV4: &str = "10.77.0.9";
const OTHER_IPV6: &str = "fd77::9";
const PATIENCE: Duration = Duration::from_secs(10);
const PACE: Duration = Duration::from_millis(5);

/// Two LAG switches back to back: TAP - switch - two veth pairs - switch - TAP.
struct BackToBack {
    _far_switch: LagSwitch,
    far: Netns,
    fabric: Fabric,
}

impl BackToBack {
    fn new(near: Distribution) -> Result<BackToBack> {
        let fabric = Fabric::new(2, 2, near)?;
        let far = Netns::create("far")?;
        let far_switch = LagSwitch::start(
            &fabric.host,
            &fabric.nics(),
            &far,
            PEER_INTERFACE,
            Distribution::Lag,
        )?;
        far.add_address(PEER_INTERFACE, &format!("{OTHER_IPV4}/24"))?;
        far.add_address(PEER_INTERFACE, &format!("{OTHER_IPV6}/64"))?;
        Ok(BackToBack {
            _far_switch: far_switch,
            far,
            fabric,
        })
    }

    fn peer_target(port: u16) -> Result<SocketAddr> {
        endpoint(PEER_IPV4, port)
    }
}

#[test]
fn the_switch_carries_arp_ipv4_and_ipv6() -> Result<()> {
    let network = BackToBack::new(Distribution::Lag)?;
    assert_eq!(ping_from(&network.far, PEER_IPV4, 3, 56)?, 3);
    assert_eq!(ping_from(&network.far, PEER_IPV6, 3, 1400)?, 3);
    assert_eq!(
        ping_from(&network.fabric.peer, OTHER_IPV4, 3, 3000)?,
        3,
        "fragments"
    );
    Ok(())
}

#[test]
fn sessions_survive_the_loss_and_return_of_a_link() -> Result<()> {
    let network = BackToBack::new(Distribution::Lag)?;
    let echo = network.fabric.peer.run(|| Ok(EchoServer::start(7)?))?;
    let target = BackToBack::peer_target(7)?;
    let plan = SessionPlan {
        target,
        count: 40,
        interval_ms: 20,
        message_bytes: 200,
    };
    let sessions = network.far.run(|| Ok(SessionGroup::start(&plan)?))?;

    let advance = |what: &str| -> Result<()> {
        let start = sessions.progress(false).least_echoed();
        wait_for(what, PATIENCE, PACE, || {
            let report = sessions.progress(false);
            ensure!(report.errors().is_empty(), "{what}: {:?}", report.errors());
            Ok((report.least_echoed() >= start + 20).then_some(()))
        })
    };
    advance("echoes on two links")?;
    let before = network.fabric.counters();
    advance("echoes on two links")?;
    let frames = network.fabric.frames_since(&before);
    let share = frames[0] * 100 / frames.iter().sum::<u64>();
    assert!(
        (20..=80).contains(&share),
        "link 0 carries {share} % of {frames:?}"
    );

    network.fabric.link_down(0)?;
    wait_for("the loss of the link", PATIENCE, PACE, || {
        Ok((!network.fabric.counters()[0].up).then_some(()))
    })?;
    let before = network.fabric.counters();
    advance("echoes on one link")?;
    assert_eq!(
        network.fabric.frames_since(&before)[0],
        0,
        "frames on a dead link"
    );

    network.fabric.link_up(0)?;
    wait_for("the return of the link", PATIENCE, PACE, || {
        Ok(network.fabric.counters()[0].up.then_some(()))
    })?;
    let before = network.fabric.counters();
    advance("echoes on two links again")?;
    assert!(
        network.fabric.frames_since(&before)[0] > 0,
        "no frames on the returned link"
    );

    let report = sessions.finish();
    assert_eq!(report.errors(), Vec::<String>::new());
    assert_eq!(echo.stats().accepted, 40);
    assert_eq!(echo.stats().resets, 0);
    Ok(())
}

#[test]
fn a_server_that_goes_away_shows_in_the_sessions() -> Result<()> {
    let namespace = Netns::create("alone")?;
    let echo = namespace.run(|| Ok(EchoServer::start(7)?))?;
    let plan = SessionPlan {
        target: endpoint("127.0.0.1", 7)?,
        count: 3,
        interval_ms: 5,
        message_bytes: 64,
    };
    let sessions = namespace.run(|| Ok(SessionGroup::start(&plan)?))?;
    wait_for("echoes", PATIENCE, PACE, || {
        Ok((sessions.progress(false).least_echoed() > 3).then_some(()))
    })?;
    drop(echo);
    wait_for("the errors", PATIENCE, PACE, || {
        Ok((sessions.progress(false).errors().len() == 3).then_some(()))
    })?;
    let refused = namespace.run(|| Ok(SessionGroup::start(&plan)?.finish()))?;
    assert_eq!(refused.errors().len(), 3);
    Ok(())
}

#[test]
fn bulk_and_datagrams_arrive_intact() -> Result<()> {
    let network = BackToBack::new(Distribution::Lag)?;
    let _servers = network
        .fabric
        .peer
        .run(|| Ok((BulkServer::start(9)?, UdpEcho::start(7)?)))?;
    let report = network.far.run(|| {
        Ok(bulk::transfer(&BulkPlan {
            target: endpoint(PEER_IPV4, 9)?,
            bytes: 20_000_001,
            seed: 3,
        })?)
    })?;
    assert!(report.intact, "{report:?}");
    for target in [endpoint(PEER_IPV4, 7)?, endpoint(PEER_IPV6, 7)?] {
        let plan = UdpPlan {
            target,
            flows: 8,
            datagrams: 5,
            bytes: 1200,
            patience_ms: 2000,
        };
        let report = network.far.run(|| Ok(udp::probe(&plan)?))?;
        assert_eq!((report.sent, report.echoed, report.corrupt), (40, 40, 0));
    }
    assert_eq!(
        network
            .fabric
            .counters()
            .iter()
            .map(|link| link.lost)
            .sum::<u64>(),
        0
    );
    Ok(())
}

#[test]
fn broadcast_takes_one_link_in_a_lag_and_all_in_a_hub() -> Result<()> {
    for (distribution, copies) in [(Distribution::Lag, 1), (Distribution::Hub, 2)] {
        let network = BackToBack::new(distribution)?;
        let capture = network
            .far
            .run(|| Ok(Capture::start(PEER_INTERFACE, raw::EXPERIMENTAL)?))?;
        let frame = raw::experimental_frame([0xff; 6], [2, 0, 0, 0, 0, 1], b"hello");
        network
            .fabric
            .peer
            .run(|| Ok(raw::send(PEER_INTERFACE, &frame, 1)?))?;
        let frames = capture.collect(copies + 1, Duration::from_millis(500))?;
        assert_eq!(frames, vec![frame; copies], "{distribution:?}");
    }
    Ok(())
}

#[test]
fn a_guest_boots_answers_and_reboots() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    let folder = tempfile::tempdir()?;
    let mut options = GuestOptions::new("plain", Vec::new());
    options.arguments = [
        "-netdev",
        "user,id=u0",
        "-device",
        "virtio-net-pci,netdev=u0,romfile=",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut guest = Guest::boot(folder.path(), &options)?;
    guest.configure("eth0", &["10.0.2.15/24"])?;
    assert_eq!(guest.ping("10.0.2.2", 2, 56)?, 2);
    assert_eq!(guest.interfaces()?.len(), 1);

    guest.tcp_echo(7)?;
    let plan = SessionPlan {
        target: endpoint("127.0.0.1", 7)?,
        count: 8,
        interval_ms: 20,
        message_bytes: 100,
    };
    let group = guest.start_sessions(plan)?;
    wait_for("echoes in the guest", PATIENCE, Duration::from_millis(50), || {
        Ok((guest.sessions_progress(group, false)?.least_echoed() > 5).then_some(()))
    })?;
    assert_eq!(guest.finish_sessions(group)?.errors(), Vec::<String>::new());
    ensure!(
        guest.sessions_progress(group, false).is_err(),
        "a finished group still answers"
    );

    guest.reboot()?;
    assert_eq!(guest.interfaces()?[0].carrier, None, "eth0 is down after a boot");
    Ok(())
}

/// The guest's own NIC is one link of the switch: what the guest and the peer say to each other in the tests works with a
/// virtio-net of QEMU's own, offloads included.
#[test]
fn a_guest_and_a_peer_talk_through_the_switch() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    let folder = tempfile::tempdir()?;
    let (cable, peer) = (Netns::create("cable")?, Netns::create("peer")?);
    let link = format!("vt{}", std::process::id());
    let mut options = GuestOptions::new("tapped", Vec::new());
    let netdev = format!("tap,id=t0,ifname={link},script=no,downscript=no");
    options.arguments = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=t0,romfile="]
        .map(str::to_owned)
        .to_vec();
    let guest = Guest::launch(folder.path(), &options)?;
    // QEMU makes it some time after it was started.
    let made = Path::new("/sys/class/net").join(&link);
    wait_for("QEMU's tap device", PATIENCE, Duration::from_millis(20), || {
        Ok(made.exists().then_some(()))
    })?;
    run(Command::new("ip").args(["link", "set", &link, "netns", cable.name()]))?;
    cable.ip(&["link", "set", &link, "up", "txqueuelen", "10000"])?;
    let switch = LagSwitch::start(&cable, &[link], &peer, PEER_INTERFACE, Distribution::Lag)?;
    peer.add_address(PEER_INTERFACE, &format!("{PEER_IPV4}/24"))?;
    peer.add_address(PEER_INTERFACE, &format!("{PEER_IPV6}/64"))?;
    let guest = guest.booted(1)?;
    guest.configure(
        "eth0",
        &[&format!("{OTHER_IPV4}/24"), &format!("{OTHER_IPV6}/64")],
    )?;
    assert_eq!(guest.ping(PEER_IPV4, 2, 1400)?, 2);
    assert_eq!(ping_from(&peer, OTHER_IPV6, 2, 1400)?, 2);

    let servers = peer.run(|| Ok((EchoServer::start(7)?, BulkServer::start(9)?, UdpEcho::start(7)?)))?;
    guest.tcp_echo(7)?;
    guest.bulk_server(9)?;
    let plan = |address| {
        let target = endpoint(address, 7)?;
        Ok::<_, anyhow::Error>(SessionPlan {
            target,
            count: 48,
            interval_ms: 100,
            message_bytes: 256,
        })
    };
    let from_guest = guest.start_sessions(plan(PEER_IPV4)?)?;
    let to_guest = plan(OTHER_IPV4)?;
    let from_peer = peer.run(|| Ok(SessionGroup::start(&to_guest)?))?;
    wait_for("echoes both ways", PATIENCE, Duration::from_millis(100), || {
        let least = guest
            .sessions_progress(from_guest, false)?
            .least_echoed()
            .min(from_peer.progress(false).least_echoed());
        Ok((least >= 20).then_some(()))
    })?;
    assert_eq!(guest.finish_sessions(from_guest)?.errors(), Vec::<String>::new());
    assert_eq!(from_peer.finish().errors(), Vec::<String>::new());
    assert_eq!((servers.0.stats().accepted, servers.0.stats().resets), (48, 0));

    let bulk = |address| {
        Ok::<_, anyhow::Error>(BulkPlan {
            target: endpoint(address, 9)?,
            bytes: 5_000_001,
            seed: 2,
        })
    };
    assert!(guest.bulk(bulk(PEER_IPV6)?)?.intact);
    let to_guest = bulk(OTHER_IPV4)?;
    assert!(peer.run(|| Ok(bulk::transfer(&to_guest)?))?.intact);
    let target = endpoint(PEER_IPV6, 7)?;
    let report = guest.udp(UdpPlan {
        target,
        flows: 4,
        datagrams: 4,
        bytes: 4000,
        patience_ms: 2000,
    })?;
    assert_eq!((report.echoed, report.corrupt), (16, 0), "{report:?}");

    let frame = raw::experimental_frame([0xff; 6], [2, 0, 0, 0, 0, 1], b"hello");
    let capture = guest.start_capture("eth0", raw::EXPERIMENTAL)?;
    peer.run(|| Ok(raw::send(PEER_INTERFACE, &frame, 1)?))?;
    assert_eq!(
        guest.finish_capture(capture, 2, Duration::from_millis(500))?,
        std::slice::from_ref(&frame)
    );
    let capture = peer.run(|| Ok(Capture::start(PEER_INTERFACE, raw::EXPERIMENTAL)?))?;
    guest.send_frame("eth0", frame.clone(), 1)?;
    assert_eq!(capture.collect(2, Duration::from_millis(500))?, [frame]);
    assert_eq!(switch.counters()[0].lost, 0);
    Ok(())
}
