//! What happens to NICs and to the host's memory beside vnicd: each a clear error at the start, or an event that is survived, told
//! and counted. No guest takes part.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vnic_tests::binaries::binary;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::netns::Netns;
use vnic_tests::process::{run, wait_for};
use vnic_tests::sys::{open_tap, set_tap_carrier};

const GUEST: &str = "52:54:00:00:00:01";

/// NICs `up0` and `up1` with up to two queues, one in use.
struct Host {
    host: Netns,
    far: Netns,
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Result<Host> {
        let (host, far) = (Netns::create("host")?, Netns::create("far")?);
        for nic in ["0", "1"] {
            let (near, other) = (format!("up{nic}"), format!("far{nic}"));
            host.add_veth(&near, &far, &other, 2)?;
            run(far.command("ethtool").args(["-L", &other, "rx", "1", "tx", "1"]))?;
            run(host.command("ethtool").args(["-L", &near, "rx", "1", "tx", "1"]))?;
        }
        let folder = tempfile::tempdir()?;
        Ok(Host { host, far, folder })
    }

    fn start(&self, nics: &[&str]) -> Result<Daemon> {
        let nics: Vec<String> = nics.iter().map(|nic| (*nic).to_owned()).collect();
        let options = DaemonOptions::new(&[("a", GUEST)], &nics, 1);
        Daemon::start(&self.host, self.folder.path(), &options)
    }

    /// Runs vnicd behind `wrapper` until it ends or `seconds` are over; returns its exit code and its log.
    fn run(&self, wrapper: &[&str], arguments: &[&str], seconds: &str) -> Result<(i32, String)> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let mut command = self.host.command("timeout");
        command
            .args(["--signal=TERM", seconds])
            .args(wrapper)
            .arg(binary("vnicd")?);
        command.args(["--control", &path("c.sock"), "--state-dir", &path("state")]);
        command.args(["--socket-path", &path("a.sock")]).args(arguments);
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!log.contains("panicked"), "{log}");
        Ok((output.status.code().unwrap_or(-1), log))
    }

    /// Whether every group frame that reaches an interface is received.
    fn takes_all_groups(&self, nic: &str) -> Result<bool> {
        const IFF_ALLMULTI: u32 = 0x200;
        let text = run(self
            .host
            .command("cat")
            .arg(format!("/sys/class/net/{nic}/flags")))?;
        let flags = text.trim().strip_prefix("0x").context("no flags")?;
        Ok(u32::from_str_radix(flags, 16)? & IFF_ALLMULTI != 0)
    }

    fn rx_queues(&self, nic: &str) -> Result<usize> {
        let listed = run(self
            .host
            .command("ls")
            .arg(format!("/sys/class/net/{nic}/queues")))?;
        Ok(listed
            .split_whitespace()
            .filter(|name| name.starts_with("rx-"))
            .count())
    }
}

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
    let host = Host::new()?;
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

/// Waits until the fill rings of so many NIC queues are full and nothing else is out: every chunk of closed sockets is back.
fn chunks_are_back(daemon: &Daemon, queues: u64) -> Result<()> {
    wait_for(
        "every chunk in its place",
        Duration::from_secs(20),
        Duration::from_millis(20),
        || {
            let memory = &daemon.query("stats")?["frame_memory"];
            let count = |state: &str| memory[state].as_u64();
            let there = [count("fill"), count("tx"), count("quarantined")];
            Ok((there == [Some(2048 * queues), Some(0), Some(0)]).then_some(()))
        },
    )
}

/// What `vnic` says when it fails.
fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    match daemon.vnic(arguments) {
        Ok(output) => panic!("{arguments:?} was not refused: {output}"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn a_nic_that_vanished_is_driven_again_when_it_is_back() -> Result<()> {
    let host = Host::new()?;
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
    chunks_are_back(daemon, 2)?;
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
    let host = Host::new()?;
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
fn nics_are_added_weighed_drained_and_removed_at_run_time() -> Result<()> {
    let host = Host::new()?;
    let nics = ["up0".to_owned()];
    let mut options = DaemonOptions::new(&[("a", GUEST)], &nics, 2);
    options.arguments.extend(["--topology", "lag"].map(str::to_owned));
    let mut daemon = Daemon::start(&host.host, host.folder.path(), &options)?;
    let daemon = &mut daemon;
    for round in 0..2 {
        assert!(!host.takes_all_groups("up1")?);
        let added = daemon.vnic(&["nic", "add", "up1,id=right,weight=3"])?;
        assert!(
            added.contains("NIC right added: interface up1, 1 queues"),
            "{added}"
        );
        daemon.wait_alive("right", true)?;
        let report = daemon.nic("right")?;
        assert_eq!((&report["weight"], &report["ifname"]), (&3.into(), &"up1".into()));
        assert!(host.host.ip(&["link", "show", "up1"])?.contains("xdp"));
        assert!(host.takes_all_groups("up1")?);

        let set = daemon.vnic(&["nic", "set", "right", "weight=5", "--json"])?;
        let set: Value = serde_json::from_str(&set)?;
        assert_eq!((&set["weight"], &set["before"]), (&5.into(), &3.into()));
        daemon.vnic(&["nic", "drain", "up0"])?;
        assert_eq!(daemon.nic("up0")?["drained"], true);
        let flow = ["explain", "tcp", "10.0.0.1:80", "10.0.0.2:40000", "--json"];
        let explained: Value = serde_json::from_str(&daemon.vnic(&flow)?)?;
        assert_eq!(explained["choice"], "right", "{explained}");
        daemon.vnic(&["nic", "undrain", "up0"])?;

        let removed = daemon.vnic(&["nic", "remove", "right"])?;
        assert!(removed.contains("NIC right removed"), "{removed}");
        assert!(
            !host.host.ip(&["link", "show", "up1"])?.contains("xdp"),
            "round {round}"
        );
        assert!(!host.takes_all_groups("up1")?, "round {round}");
        assert!(daemon.nic("right").is_err());
        chunks_are_back(daemon, 1)?;
    }
    let set = daemon.vnic(&["lb", "set", "least_conn"])?;
    assert!(set.contains("by least_conn (before: hash)"), "{set}");
    assert_eq!(daemon.query("status")?["lb"], "least_conn");

    for (arguments, words) in [
        (&["nic", "add", "up0,id=other"][..], "the daemon has it already"),
        (&["nic", "add", "up1,id=up0"], "give the new one another `id=`"),
        (&["nic", "add", "nosuch0"], "there is no such interface"),
        (&["nic", "add", "up1,weight=x"], "is not a whole number"),
        (&["nic", "add", "lo"], "loopback"),
        (
            &["nic", "remove", "right"],
            "there is no NIC `right`: those that there are: up0",
        ),
        (&["nic", "drain", "up0"], "no NIC would be left"),
        (&["nic", "set", "up0", "weight=0"], "no NIC would be left"),
        (&["nic", "set", "up0", "weight=10001"], "give 0 to 10000"),
        (&["lb", "set", "dice"], "hash, least_conn, weighted or adaptive"),
        (&["explain", "tcp", "10.0.0.1", "10.0.0.2"], "ADDRESS:PORT"),
    ] {
        let said = refused(daemon, arguments);
        assert!(said.contains(words), "`{words}` in: {said}");
    }
    // What failed left nothing behind.
    assert!(!host.host.ip(&["link", "show", "up1"])?.contains("xdp"));
    chunks_are_back(daemon, 1)?;

    let events: Vec<String> = daemon
        .vnic(&["events", "--json"])?
        .lines()
        .map(|line| -> Result<String> {
            let event: Value = serde_json::from_str(line)?;
            Ok(format!(
                "{} {}",
                event["nic"].as_str().unwrap_or("-"),
                event["kind"].as_str().unwrap_or("")
            ))
        })
        .collect::<Result<_>>()?;
    let once = [
        "right added",
        "right alive",
        "right weight",
        "up0 drained",
        "up0 undrained",
        "right removed",
    ];
    let expected: Vec<&str> = once.iter().chain(&once).copied().chain(["- algorithm"]).collect();
    assert_eq!(events, expected);
    Ok(())
}

/// What places sessions now: its name, the weights in force, and why a new session would get its NIC.
fn placing(daemon: &Daemon) -> Result<(String, Vec<Value>, String)> {
    let flow = ["explain", "tcp", "10.0.0.1:80", "10.0.0.2:40000", "--json"];
    let explained: Value = serde_json::from_str(&daemon.vnic(&flow)?)?;
    let word = |value: &Value| value.as_str().map(str::to_owned).context("no word");
    let algorithm = word(&explained["algorithm"])?;
    assert_eq!(daemon.query("status")?["lb"], *algorithm);
    let nics = explained["nics"].as_array().context("no list of NICs")?;
    assert!(nics.iter().all(|nic| nic["speed_mbps"].is_u64()), "{explained}");
    let weights = nics.iter().map(|nic| nic["weight"].clone());
    Ok((algorithm, weights.collect(), word(&explained["reason"])?))
}

#[test]
fn an_algorithm_is_chosen_by_file_environment_option_and_at_run_time() -> Result<()> {
    let host = Host::new()?;
    let file = host.folder.path().join("vnicd.toml");
    std::fs::write(&file, "lb = \"weighted\"\n")?;
    let mut options = DaemonOptions::new(&[("a", GUEST)], &["up0", "up1"].map(str::to_owned), 1);
    options.arguments = vec!["--config".to_owned(), file.display().to_string()];
    let start = |options: &DaemonOptions| -> Result<Daemon> {
        let daemon = Daemon::start(&host.host, host.folder.path(), options)?;
        daemon.wait_alive("up0", true)?;
        daemon.wait_alive("up1", true)?;
        Ok(daemon)
    };
    // Slots are dealt by link speed, the costs of NICs are compared, or neither.
    let (by_slot, by_cost) = ("its slot's first NIC", "the lowest cost");
    let expect = |daemon: &Daemon, algorithm: &str, weight: u64, reason: &str| -> Result<()> {
        let (name, weights, because) = placing(daemon)?;
        assert_eq!((&*name, weights), (algorithm, vec![weight.into(); 2]));
        assert!(because.contains(reason), "{algorithm}: {because}");
        Ok(())
    };
    const SPEED_OF_VETH: u64 = 10_000;
    let daemon = start(&options)?;
    expect(&daemon, "weighted", SPEED_OF_VETH, by_slot)?;
    drop(daemon);
    options.lb_algorithm = Some("adaptive");
    let daemon = start(&options)?;
    expect(&daemon, "adaptive", SPEED_OF_VETH, by_cost)?;
    drop(daemon);
    options.arguments.extend(["--lb", "hash"].map(str::to_owned));
    let daemon = start(&options)?;
    expect(&daemon, "hash", 1, by_slot)?;
    for (algorithm, weight, reason) in [
        ("weighted", SPEED_OF_VETH, by_slot),
        ("adaptive", SPEED_OF_VETH, by_cost),
        ("least_conn", SPEED_OF_VETH, by_cost),
        ("hash", 1, by_slot),
    ] {
        daemon.vnic(&["lb", "set", algorithm])?;
        expect(&daemon, algorithm, weight, reason)?;
    }
    Ok(())
}

#[test]
fn a_nic_that_the_others_cannot_do_without_is_kept() -> Result<()> {
    let host = Host::new()?;
    let mut daemon = host.start(&["up0", "up1"])?;
    let daemon = &mut daemon;
    host.far.ip(&["link", "set", "far1", "down"])?;
    daemon.wait_alive("up1", false)?;
    for arguments in [
        &["nic", "drain", "up0"][..],
        &["nic", "remove", "up0"],
        &["nic", "set", "up0", "weight=0"],
    ] {
        let said = refused(daemon, arguments);
        assert!(said.contains("no other NIC that takes any is alive"), "{said}");
    }
    // What was not removed is there to be changed.
    daemon.vnic(&["nic", "set", "up0", "weight=3"])?;
    let report = daemon.nic("up0")?;
    assert_eq!(
        (&report["alive"], &report["drained"]),
        (&true.into(), &false.into())
    );
    host.far.ip(&["link", "set", "far1", "up"])?;
    daemon.wait_alive("up1", true)?;
    daemon.vnic(&["nic", "drain", "up0"])?;
    let said = refused(daemon, &["nic", "remove", "up1"]);
    assert!(said.contains("no NIC would be left"), "{said}");
    daemon.vnic(&["nic", "remove", "up0"])?;
    daemon.vnic(&["nic", "remove", "up1"])?;
    let said = refused(daemon, &["nic", "add", "up0,weight=0"]);
    assert!(said.contains("no other NIC does"), "{said}");
    chunks_are_back(daemon, 0)
}

#[test]
fn a_target_that_answers_arp_alone_is_no_answer_to_echo_probes() -> Result<()> {
    let host = Host::new()?;
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
    let host = Host::new()?;
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
    let host = Host::new()?;
    let daemon = host.start(&["up0", "up1"])?;
    host.host.ip(&["link", "set", "up0", "down"])?;
    // Told as set down or as a lost carrier, whichever was seen first.
    daemon.wait_alive("up0", false)?;
    workers_sleep(&daemon)?;
    host.host.ip(&["link", "set", "up0", "up"])?;
    daemon.wait_alive("up0", true)
}

#[test]
fn channels_are_set_for_the_daemons_lifetime() -> Result<()> {
    let host = Host::new()?;
    let (code, log) = host.run(&[], &["--nic", "up0,queues=2"], "10")?;
    assert!(
        code == 1 && log.contains("ethtool -L up0 rx 2") && log.contains("set-channels=on"),
        "{log}"
    );
    assert_eq!(host.rx_queues("up0")?, 1);

    let (code, log) = host.run(
        &[],
        &["--nic", "up0,queues=2,set-channels=on,zerocopy=require"],
        "10",
    )?;
    assert!(code == 1 && log.contains("zerocopy"), "{code}: {log}");
    assert_eq!(host.rx_queues("up0")?, 1, "restored after a start that failed");

    let daemon = host.start(&["up0,queues=2,set-channels=on"])?;
    assert_eq!(
        (host.rx_queues("up0")?, &daemon.nic("up0")?["queues"]),
        (2, &2.into())
    );
    let (status, _) = daemon.terminate()?;
    assert!(status.success());
    assert_eq!(host.rx_queues("up0")?, 1, "restored at the end");

    let (code, log) = host.run(&[], &["--nic", "up0,queues=3,set-channels=on"], "10")?;
    assert!(code == 1 && log.contains("at most 2"), "{code}: {log}");
    Ok(())
}

#[test]
fn the_hosts_addresses_are_not_for_guests() -> Result<()> {
    let host = Host::new()?;
    host.host.ip(&["link", "set", "up1", "address", GUEST])?;
    let port = format!(
        "name=a,socket={},mac={GUEST}",
        host.folder.path().join("p.sock").display()
    );
    let output = host
        .host
        .command(binary("vnicd")?)
        .args(["--port", &port, "--nic", "up0", "--control"])
        .arg(host.folder.path().join("c.sock"))
        .output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("port a") && message.contains("up1") && message.contains(GUEST),
        "{message}"
    );
    Ok(())
}

#[test]
fn too_little_memory_is_refused_or_done_without() -> Result<()> {
    let host = Host::new()?;
    let limited = [
        "prlimit",
        "--memlock=65536",
        "setpriv",
        "--bounding-set=-ipc_lock",
        "--inh-caps=-ipc_lock",
    ];
    let (code, log) = host.run(&limited, &["--nic", "up0"], "10")?;
    assert_eq!(code, 1, "{log}");
    assert!(
        log.contains("limit is 65536") && log.contains("LimitMEMLOCK=infinity"),
        "{log}"
    );

    // Whatever this machine has: vnicd is told of one with 100 MiB.
    let meminfo = host.folder.path().join("meminfo");
    std::fs::write(
        &meminfo,
        "MemAvailable:     102400 kB\nHugePages_Free:        0\n",
    )?;
    let script = format!("mount --bind {} /proc/meminfo && exec \"$@\"", meminfo.display());
    let (code, log) = host.run(
        &["unshare", "--mount", "sh", "-c", &script, "sh"],
        &["--nic", "up0", "--frames", "524288"],
        "10",
    )?;
    assert!(
        code == 1 && log.contains("2048 MiB") && log.contains("100 MiB") && log.contains("--frames"),
        "{code}: {log}"
    );

    // A limit of huge pages that is exhausted: all that are free are taken by a file for a moment.
    let folder = host.folder.path().join("huge");
    std::fs::create_dir(&folder)?;
    let script = format!(
        "mount -t hugetlbfs -o pagesize=2M none {0} || exit 77
         free=$(sed -n 's/^HugePages_Free: *//p' /proc/meminfo); rsvd=$(sed -n 's/^HugePages_Rsvd: *//p' /proc/meminfo)
         fallocate -l $(((free - rsvd) * 2))M {0}/all; exec \"$@\"",
        folder.display()
    );
    let (code, log) = host.run(
        &["unshare", "--mount", "sh", "-c", &script, "sh"],
        &["--nic", "up0"],
        "5",
    )?;
    assert_ne!(code, 77, "no hugetlbfs: {log}");
    assert!(
        log.contains("ordinary pages") && log.contains("ready"),
        "{code}: {log}"
    );
    Ok(())
}

#[test]
fn the_doctor_examines_without_a_daemon() -> Result<()> {
    let host = Host::new()?;
    let doctor = |arguments: &[&str]| -> Result<(i32, String)> {
        let output = host
            .host
            .command(binary("vnic")?)
            .arg("doctor")
            .args(arguments)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((output.status.code().unwrap_or(-1), text))
    };
    let of_nic = |report: &Value, nic: &str, check: &str| -> Option<Value> {
        let findings = report["findings"].as_array()?;
        findings
            .iter()
            .find(|f| f["nic"] == nic && f["check"] == check)
            .cloned()
    };
    let (code, text) = doctor(&["--json"])?;
    let report: Value = serde_json::from_str(&text)?;
    assert!(matches!(code, 0 | 1), "{code}: {text}");
    for nic in ["up0", "up1"] {
        let mode = of_nic(&report, nic, "xdp-mode").unwrap_or_default();
        assert!(
            mode["what"].as_str().unwrap_or_default().contains("native") || mode["level"] == "note",
            "{text}"
        );
        assert_eq!(
            of_nic(&report, nic, "queues").unwrap_or_default()["what"],
            "1 rx of 2, 1 tx of 2"
        );
    }

    let daemon = host.start(&["up0"])?;
    let (code, text) = doctor(&["up0", "up1"])?;
    assert!(
        code == 2 && text.contains("XDP program") && text.contains("is attached (native)"),
        "{code}: {text}"
    );
    drop(daemon);

    host.host.ip(&["link", "set", "up1", "down"])?;
    let (code, text) = doctor(&["up1"])?;
    assert!(
        code == 2 && text.contains("ip link set dev up1 up"),
        "{code}: {text}"
    );
    let (code, text) = doctor(&["nosuch0"])?;
    assert!(code == 2 && text.contains("no such interface"), "{code}: {text}");
    Ok(())
}
