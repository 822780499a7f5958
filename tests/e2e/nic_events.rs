//! What happens to NICs while vnicd drives them: an event that is survived, told and counted. No guest takes part.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vnic_tests::daemon::Daemon;
use vnic_tests::nic_host::{GUEST, NicHost};
use vnic_tests::process::{run, wait_for};
use vnic_tests::sys::{open_tap, set_tap_carrier};

/// Waits until it is told of `nic` that something with this cause has happened since the event with the number `after`, which is
/// that event's own number from then on; returns the NIC's report. What follows at once does not matter, as it would to the last
/// change in the report.
fn changed(daemon: &mut Daemon, after: &mut u64, nic: &str, cause: &str) -> Result<Value> {
    wait_for(
        &format!("`{cause}` of {nic}"),
        Duration::from_secs(15),
        Duration::from_millis(20),
        || {
            daemon.process().must_run()?;
            for line in daemon.vnic(&["events", "--json"])?.lines() {
                let event: Value = serde_json::from_str(line)?;
                let number = event["number"].as_u64().unwrap_or(0);
                let told = event["cause"].as_str().unwrap_or_default();
                if number > *after && event["nic"] == nic && told.contains(cause) {
                    *after = number;
                    return Ok(Some(daemon.nic(nic)?));
                }
            }
            Ok(None)
        },
    )
}

#[test]
fn what_happens_to_a_running_nic_is_told_and_survived() -> Result<()> {
    let host = NicHost::new()?;
    let mut daemon = host.start(&["up0", "up1"])?;
    let daemon = &mut daemon;
    let after = &mut 0;

    host.host.ip(&["link", "set", "up0", "name", "renamed0"])?;
    let report = changed(daemon, after, "up0", "renamed from up0 to renamed0")?;
    assert_eq!(
        (&report["ifname"], &report["alive"]),
        (&"renamed0".into(), &true.into())
    );
    assert_eq!(report["last_change"]["cause"], "renamed from up0 to renamed0");
    host.far.ip(&["link", "set", "far0", "down"])?;
    assert_eq!(changed(daemon, after, "up0", "carrier lost")?["alive"], false);
    host.far.ip(&["link", "set", "far0", "up"])?;
    assert_eq!(changed(daemon, after, "up0", "carrier back")?["alive"], true);

    host.host.ip(&["link", "set", "renamed0", "mtu", "1400"])?;
    assert_eq!(
        changed(daemon, after, "up0", "MTU changed from 1500 to 1400")?["mtu"],
        1400
    );
    host.host
        .ip(&["link", "set", "renamed0", "address", "02:00:00:00:00:77"])?;
    assert_eq!(
        changed(daemon, after, "up0", "address changed")?["mac"],
        "02:00:00:00:00:77"
    );

    run(host.host.command("ethtool").args(["-L", "renamed0", "rx", "2"]))?;
    let report = changed(daemon, after, "up0", "receive queues changed from 1 to 2")?;
    let concern = report["concerns"][0].as_str().unwrap_or_default();
    assert!(concern.contains("ethtool -L renamed0 rx 1"), "{report}");
    run(host.host.command("ethtool").args(["-L", "renamed0", "rx", "1"]))?;
    let report = changed(daemon, after, "up0", "receive queues changed from 2 to 1")?;
    assert_eq!(report["concerns"], Value::Array(Vec::new()));

    // A veth loses its carrier for a moment with each change of its queues: three losses so far, so it is left out until it is quiet.
    daemon.wait_alive("up0", true)?;
    host.host.ip(&["link", "add", "br0", "type", "bridge"])?;
    host.host.ip(&["link", "set", "renamed0", "master", "br0"])?;
    let report = changed(daemon, after, "up0", "enslaved to br0")?;
    assert!(
        report["concerns"][0]
            .as_str()
            .unwrap_or_default()
            .contains("renamed0 nomaster"),
        "{report}"
    );
    host.host.ip(&["link", "set", "renamed0", "nomaster"])?;
    assert_eq!(changed(daemon, after, "up0", "released by br0")?["alive"], true);

    // An interface of the host takes the guest's address: nothing can be done but to say so.
    host.host.ip(&["link", "set", "br0", "address", GUEST])?;
    host.host.ip(&["link", "del", "renamed0"])?;
    changed(daemon, after, "up0", "vanished")?;
    // Its health is told of by itself.
    daemon.wait_alive("up0", false)?;
    let report = daemon.nic("up0")?;
    assert!(report["changes"].as_u64() >= Some(10), "{report}");
    assert!(
        report["concerns"][0]
            .as_str()
            .unwrap_or_default()
            .contains("taken up again when it is back"),
        "{report}"
    );
    assert!(daemon.nic_is_alive("up1")?);
    let log = daemon.log_tail(200);
    for words in [
        "br0 now has the guest's address",
        "its interface is gone",
        "enslaved to br0",
        "too_long",
    ] {
        assert!(log.contains(words), "`{words}` is not in the log:\n{log}");
    }

    workers_sleep(daemon)
}

/// Workers sleep although a NIC is gone or down: its sockets must not wake them over and over.
fn workers_sleep(daemon: &Daemon) -> Result<()> {
    let sleeps = || {
        daemon.query("stats")?["workers"][0]["sleeps"]
            .as_u64()
            .context("the report of a worker has no `sleeps`")
    };
    let before = sleeps()?;
    std::thread::sleep(Duration::from_secs(2));
    let after = sleeps()?;
    // A sleep lasts up to 100 ms, so that 20 or so make two seconds; one that ends at once makes tens of thousands.
    assert!((before + 1..before + 2000).contains(&after), "{before} {after}");
    Ok(())
}

#[test]
fn a_nic_that_vanished_is_driven_again_when_it_is_back() -> Result<()> {
    let host = NicHost::new()?;
    let mut daemon = host.start(&["up0", "up1"])?;
    let daemon = &mut daemon;
    for round in 0..3 {
        host.host.ip(&["link", "del", "up0"])?;
        daemon.wait_alive("up0", false)?;
        wait_for(
            "up0 to be given up",
            Duration::from_secs(15),
            Duration::from_millis(20),
            || Ok((daemon.nic("up0")?["present"] == false).then_some(())),
        )?;
        if round == 1 {
            // Something else has its name at first, which cannot be driven.
            host.host.ip(&["link", "add", "up0", "type", "bridge"])?;
            wait_for(
                "the reason why a bridge cannot be driven",
                Duration::from_secs(15),
                Duration::from_millis(20),
                || {
                    Ok(daemon.nic("up0")?["concerns"]
                        .to_string()
                        .contains("bridge")
                        .then_some(()))
                },
            )?;
            host.host.ip(&["link", "del", "up0"])?;
        }
        host.host.add_veth("up0", &host.far, "far0", 1)?;
        daemon.wait_alive("up0", true)?;
        let report = daemon.nic("up0")?;
        assert_eq!(report["concerns"], Value::Array(Vec::new()), "{report}");
        let link = host.host.ip(&["link", "show", "up0"])?;
        assert!(link.contains("xdp"), "{link}");
    }
    daemon.chunks_are_back(2)?;
    let events = daemon.vnic(&["events"])?;
    assert_eq!(
        events.matches("up0  returned: its interface is back").count(),
        3,
        "{events}"
    );
    assert_eq!(events.matches("up0  link: vanished").count(), 3, "{events}");
    Ok(())
}

/// Its link is up at once, but what it asks is not answered. The other one is not asked, so that there is a better one.
#[test]
fn a_nic_that_is_back_is_not_used_before_a_probe_was_answered() -> Result<()> {
    let host = NicHost::new()?;
    let mut daemon = host.start(&["up0,probe=10.77.0.77", "up1"])?;
    let daemon = &mut daemon;
    daemon.wait_alive("up0", false)?;
    host.host.ip(&["link", "del", "up0"])?;
    changed(daemon, &mut 0, "up0", "vanished")?;
    let sent = |daemon: &Daemon| -> Result<u64> {
        let report = daemon.nic("up0")?;
        Ok(report["probe"]["sent"].as_u64().unwrap_or(0))
    };
    let before = sent(daemon)?;
    host.host.add_veth("up0", &host.far, "far0", 1)?;
    changed(daemon, &mut 0, "up0", "its interface is back")?;
    wait_for(
        "probes of the NIC that is back",
        Duration::from_secs(60),
        Duration::from_millis(20),
        || Ok((sent(daemon)? >= before + 10).then_some(())),
    )?;
    assert!(!daemon.nic_is_alive("up0")?);
    let events = daemon.vnic(&["events"])?;
    assert!(!events.contains("up0  alive"), "{events}");
    Ok(())
}

#[test]
fn a_target_that_answers_arp_alone_is_no_answer_to_echo_probes() -> Result<()> {
    let host = NicHost::new()?;
    host.host.add_address("up0", "10.77.0.100/24")?;
    host.far.add_address("far0", "10.77.0.1/24")?;
    host.far.add_address("far1", "10.77.1.1/24")?;
    let mut daemon = host.start(&["up0,probe=icmp:10.77.0.1", "up1,probe=10.77.1.1"])?;
    let daemon = &mut daemon;
    for nic in ["up0", "up1"] {
        wait_for(
            &format!("answers to {nic}"),
            Duration::from_secs(60),
            Duration::from_millis(20),
            || Ok((daemon.nic(nic)?["probe"]["answered"].as_u64() >= Some(3)).then_some(())),
        )?;
        daemon.wait_alive(nic, true)?;
    }
    let after = &mut 0;
    host.far.sysctl("net/ipv4/icmp_echo_ignore_all", "1")?;
    let report = changed(daemon, after, "up0", "probes in a row were not answered")?;
    assert_eq!(report["carrier"], true, "{report}");
    host.far.sysctl("net/ipv4/icmp_echo_ignore_all", "0")?;
    changed(daemon, after, "up0", "probes are answered again")?;
    daemon.wait_alive("up0", true)
}

#[test]
fn a_link_that_is_negotiated_anew_has_its_new_speed() -> Result<()> {
    let host = NicHost::new()?;
    let tap = host.host.run(|| Ok(open_tap("tap0")?))?;
    host.host.ip(&["link", "set", "tap0", "up"])?;
    let negotiate = |speed: &str| run(host.host.command("ethtool").args(["-s", "tap0", "speed", speed]));
    negotiate("10000")?;
    let mut daemon = host.start(&["tap0"])?;
    let daemon = &mut daemon;
    let flow = ["explain", "tcp", "10.0.0.1:80", "10.0.0.2:40000", "--json"];
    let speed = |daemon: &Daemon| -> Result<Value> {
        let explained: Value = serde_json::from_str(&daemon.vnic(&flow)?)?;
        Ok(explained["nics"][0]["speed_mbps"].clone())
    };
    assert_eq!(speed(daemon)?, 10_000);
    set_tap_carrier(&tap, false)?;
    daemon.wait_alive("tap0", false)?;
    negotiate("1000")?;
    set_tap_carrier(&tap, true)?;
    wait_for(
        "the new speed",
        Duration::from_secs(60),
        Duration::from_millis(20),
        || Ok((speed(daemon)? == 1000).then_some(())),
    )
}

#[test]
fn a_nic_that_is_down_lets_workers_sleep() -> Result<()> {
    let host = NicHost::new()?;
    let daemon = host.start(&["up0", "up1"])?;
    host.host.ip(&["link", "set", "up0", "down"])?;
    // Told as set down or as a lost carrier, whichever was seen first.
    daemon.wait_alive("up0", false)?;
    workers_sleep(&daemon)?;
    host.host.ip(&["link", "set", "up0", "up"])?;
    daemon.wait_alive("up0", true)
}
