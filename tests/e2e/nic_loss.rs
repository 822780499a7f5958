//! NICs lose their links and get them back; no session may notice more than a gap.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result};
use vnic_tests::process::{run, wait_for};
use vnic_tests::qemu::endpoint;
use vnic_tests::scene::{ECHO_PORT, PATIENCE, Scene, Sessions, guest_ipv4};

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
        sent.iter().sum::<u64>() > 0,
        "{when}: no frames from the guest on live links: {sent:?}"
    );
    Ok(())
}

fn lose_each_in_turn(workers: u32) -> Result<()> {
    let scene = Scene::set(2, workers, 1)?;
    let sessions = scene.open_sessions(24)?;
    for nic in [0, 1, 0] {
        scene.fabric.link_down(nic)?;
        scene.daemon()?.wait_alive(&format!("up{nic}"), false)?;
        survive(&scene, &sessions, nic, &format!("with up{nic} down"))?;
        scene.fabric.link_up(nic)?;
        scene.daemon()?.wait_alive(&format!("up{nic}"), true)?;
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
        scene.daemon()?.wait_alive(&format!("up{nic}"), false)?;
    }
    scene.fabric.link_up(1)?;
    scene.daemon()?.wait_alive("up1", true)?;
    survive(&scene, &sessions, 0, "with one NIC back")?;
    scene.fabric.link_up(0)?;
    scene.daemon()?.wait_alive("up0", true)?;
    sessions.advance(&scene, "with both NICs back")?;
    sessions.finish(&scene)
}

#[test]
fn an_operator_may_take_a_nic_down_on_the_host() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let sessions = scene.open_sessions(8)?;
    scene.fabric.host.ip(&["link", "set", "up0", "down"])?;
    scene.daemon()?.wait_alive("up0", false)?;
    survive(&scene, &sessions, 0, "with up0 taken down on the host")?;
    scene.fabric.host.ip(&["link", "set", "up0", "up"])?;
    scene.daemon()?.wait_alive("up0", true)?;
    sessions.advance(&scene, "with up0 up again")?;
    sessions.finish(&scene)
}

/// Waits until so many more probes of a NIC were sent, and answered.
fn wait_probed(scene: &Scene, nic: usize, more: u64, answered: u64) -> Result<()> {
    let counts = || -> Result<(u64, u64)> {
        let probe = scene.daemon()?.nic(&format!("up{nic}"))?["probe"].clone();
        let number = |key: &str| probe[key].as_u64().context("a number");
        Ok((number("sent")?, number("answered")?))
    };
    let before = counts()?;
    wait_for(
        &format!("{more} probes of up{nic}, {answered} answered"),
        PATIENCE,
        Duration::from_millis(20),
        || {
            let now = counts()?;
            Ok((now.0 >= before.0 + more && now.1 >= before.1 + answered).then_some(()))
        },
    )
}

fn last_cause(scene: &Scene, nic: usize) -> Result<String> {
    let nic = scene.daemon()?.nic(&format!("up{nic}"))?;
    Ok(nic["last_change"]["cause"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// Ends a NIC's black hole; why it is alive then.
fn led_somewhere_again(scene: &Scene, nic: usize) -> Result<String> {
    scene.fabric.black_hole(nic, false);
    scene.daemon()?.wait_alive(&format!("up{nic}"), true)?;
    last_cause(scene, nic)
}

/// The switch throws away what a NIC sends while its link stays up; probes of every kind find that out. Answers come by
/// whichever link the switch chooses, here also by the one that is probed.
#[test]
fn probes_find_a_link_that_is_up_and_carries_nothing() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let daemon = scene.daemon()?;
    // For the echo; the ARP probes have no address of their own.
    scene.fabric.host.add_address("up1", "10.77.0.101/24")?;
    let sessions = scene.open_sessions(8)?;
    for (nic, target) in [(0, "10.77.0.1"), (1, "icmp:10.77.0.1"), (0, "fd77::1")] {
        for (name, target) in [
            (format!("up{nic}"), target),
            (format!("up{}", 1 - nic), "10.77.0.1"),
        ] {
            daemon.vnic(&["nic", "set", &name, &format!("probe={target}")])?;
        }
        wait_probed(&scene, 0, 100, 100)?;
        wait_probed(&scene, 1, 100, 100)?;
        // Not at once: on a machine with more to do than CPUs three answers in a row may come too late.
        scene.daemon()?.wait_alive("up0", true)?;
        scene.daemon()?.wait_alive("up1", true)?;
        scene.fabric.black_hole(nic, true);
        scene.daemon()?.wait_alive(&format!("up{nic}"), false)?;
        let cause = last_cause(&scene, nic)?;
        assert!(
            cause.contains("probes in a row were not answered"),
            "{target}: {cause}"
        );
        assert_eq!(daemon.nic(&format!("up{nic}"))?["carrier"], true);
        survive(
            &scene,
            &sessions,
            nic,
            &format!("up{nic} leads nowhere, {target}"),
        )?;
        let mut back = led_somewhere_again(&scene, nic)?;
        for _ in 0..3 {
            if back != "the carrier is up and no other NIC is alive" {
                break;
            }
            // Answers to the other NIC came too late just now, for the machine is that busy: that says nothing of this one's. Once more.
            scene.daemon()?.wait_alive("up0", true)?;
            scene.daemon()?.wait_alive("up1", true)?;
            scene.fabric.black_hole(nic, true);
            scene.daemon()?.wait_alive(&format!("up{nic}"), false)?;
            back = led_somewhere_again(&scene, nic)?;
        }
        assert_eq!(back, "probes are answered again", "{target}");
        sessions.advance(&scene, &format!("up{nic} leads somewhere, {target}"))?;
    }
    // Nobody answers any NIC: that is not the NICs' fault.
    for name in ["up0", "up1"] {
        daemon.vnic(&["nic", "set", name, "probe=10.77.0.77"])?;
    }
    wait_probed(&scene, 0, 20, 0)?;
    wait_probed(&scene, 1, 20, 0)?;
    sessions.advance(&scene, "without a target")?;
    scene.daemon()?.wait_alive("up0", true)?;
    scene.daemon()?.wait_alive("up1", true)?;
    daemon.vnic(&["nic", "set", "up0", "probe=off"])?;
    assert_eq!(daemon.nic("up0")?["probe"], serde_json::Value::Null);
    let refused = daemon
        .vnic(&["nic", "set", "up0", "probe=router"])
        .unwrap_err()
        .to_string();
    assert!(refused.contains("`router` is no target of probes"), "{refused}");
    sessions.finish(&scene)
}

/// Connections that a kernel has lost to a reset, and resets that it has sent, by its /proc/net/snmp.
fn resets(snmp: &str) -> Result<u64> {
    let mut tcp = snmp
        .lines()
        .filter_map(|line| line.strip_prefix("Tcp:"))
        .map(str::split_whitespace);
    let (names, values) = tcp.next().zip(tcp.next()).context("no lines of TCP")?;
    let told = names.zip(values);
    let counts = told.filter(|(name, _)| matches!(*name, "EstabResets" | "OutRsts"));
    let counts: Vec<u64> = counts.map(|(_, value)| value.parse()).collect::<Result<_, _>>()?;
    anyhow::ensure!(counts.len() == 2, "not both counters are in {snmp}");
    Ok(counts.iter().sum())
}

/// Those of the guests and of the peer.
fn resets_at_both_ends(scene: &Scene) -> Result<Vec<u64>> {
    let peer = run(scene.fabric.peer.command("cat").arg("/proc/net/snmp"))?;
    let mut all = vec![resets(&peer)?];
    for guest in &scene.guests {
        let told = guest.run(&["cat", "/proc/net/snmp"], PATIENCE)?;
        all.push(resets(&told.stdout)?);
    }
    Ok(all)
}

#[test]
fn busy_and_silent_sessions_on_eight_nics_see_no_reset_over_many_losses() -> Result<()> {
    const NICS: usize = 8;
    let scene = Scene::set(NICS, 2, 2)?;
    let busy = scene.open_sessions_of(32, 20, 400)?;
    scene.guests[1].tcp_echo(ECHO_PORT)?;
    let targets = [0, 1].map(|guest| endpoint(&guest_ipv4(guest), ECHO_PORT));
    let targets = targets.into_iter().collect::<Result<Vec<_>>>()?;
    let mut silent: Vec<TcpStream> = scene.fabric.peer.run(|| {
        let connect = |target| TcpStream::connect_timeout(target, PATIENCE);
        let targets = targets.iter().cycle().take(32);
        Ok(targets.map(connect).collect::<std::io::Result<_>>()?)
    })?;
    let before = resets_at_both_ends(&scene)?;
    let sessions = scene.daemon()?.sessions_per_nic(&scene.fabric.nics())?;
    assert!(sessions.iter().all(|count| *count > 0), "{sessions:?}");
    let calm = busy.progress(&scene, true)?.longest_gap_ms();
    for round in 0..NICS + 4 {
        let nic = round % NICS;
        scene.fabric.link_down(nic)?;
        scene.daemon()?.wait_alive(&format!("up{nic}"), false)?;
        survive(&scene, &busy, nic, &format!("round {round}, with up{nic} down"))?;
        scene.fabric.link_up(nic)?;
        scene.daemon()?.wait_alive(&format!("up{nic}"), true)?;
        busy.advance(&scene, &format!("round {round}, with up{nic} back"))?;
    }
    // The guest is emulated: what it takes itself to answer is in both.
    let gap = busy.progress(&scene, false)?.longest_gap_ms();
    println!("the longest gap that a session saw: {gap} ms; before the first loss: {calm} ms");
    // Those that were silent all the time are still there, on both ends.
    for (number, stream) in silent.iter_mut().enumerate() {
        let mut echo = [0; 5];
        stream.set_read_timeout(Some(PATIENCE))?;
        stream
            .write_all(b"still")
            .and_then(|()| stream.read_exact(&mut echo))
            .with_context(|| format!("silent session {number}"))?;
        assert_eq!(&echo, b"still");
    }
    assert_eq!(resets_at_both_ends(&scene)?, before, "peer and guests");
    drop(silent);
    busy.finish(&scene)
}
