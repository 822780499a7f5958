//! What an operator does to the NICs of a running vnicd. No guest takes part.

use anyhow::{Context, Result};
use serde_json::Value;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::nic_host::{GUEST, NicHost};

/// What `vnic` says when it fails.
fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    match daemon.vnic(arguments) {
        Ok(output) => panic!("{arguments:?} was not refused: {output}"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn nics_are_added_weighed_drained_and_removed_at_run_time() -> Result<()> {
    let host = NicHost::new()?;
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
        daemon.chunks_are_back(1)?;
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
    daemon.chunks_are_back(1)?;

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
    let host = NicHost::new()?;
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
    let host = NicHost::new()?;
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
    daemon.chunks_are_back(0)
}
