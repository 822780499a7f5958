//! `vnic-load verify` against vnicd: every frame's bytes, header and place in its flow, as fast as a driver can that checks them all.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::netns::Netns;
use vnic_tests::process::{run, wait_for};

const MACS: [&str; 2] = ["52:54:00:00:00:01", "52:54:00:00:00:02"];

/// Frames that vnicd says it dropped, and whether both front-ends have gone.
fn dropped(daemon: &Daemon) -> Result<(u64, bool)> {
    let ports = &daemon.query("stats")?["ports"];
    let ports = ports.as_array().context("no list of ports")?;
    let drops = ports.iter().map(|port| port["drops"].as_object());
    let drops = drops.map(|drops| drops.context("a port has no `drops`"));
    let drops = drops.map(|drops| Ok(drops?.values().filter_map(Value::as_u64).sum::<u64>()));
    let states = &daemon.query("ports")?["ports"];
    let gone = [0, 1].iter().all(|&port| states[port]["state"] == "listening");
    Ok((drops.sum::<Result<u64>>()?, gone))
}

fn verify(workers: u32, ring: &str, loads: &[&[&str]]) -> Result<()> {
    let namespace = Netns::create("verify")?;
    let folder = tempfile::tempdir()?;
    let options = DaemonOptions::new(&[("p0", MACS[0]), ("p1", MACS[1])], &[], workers);
    let daemon = Daemon::start(&namespace, folder.path(), &options)?;
    let mut before = 0;
    for load in loads {
        let report = run(Command::new(env!("CARGO_BIN_EXE_vnic-load"))
            .args(["verify", "--both", "--seconds", "0.3", "--json", "--small-pages"])
            .args(["--ring", ring])
            .args(MACS.map(|mac| format!("--mac={mac}")))
            .args(["p0", "p1"].map(|port| format!("--socket={}", daemon.socket(port).display())))
            .args(*load))
        .with_context(|| daemon.log_tail(30))?;
        let report: Value = serde_json::from_str(&report)?;
        let count = |key: &str| {
            report[key]
                .as_u64()
                .with_context(|| format!("no `{key}`: {report}"))
        };
        let (sent, verified, lost) = (count("sent")?, count("verified")?, count("lost")?);
        ensure!(verified > 0, "{load:?}: {report}");
        ensure!(sent == verified + lost, "{load:?}: {report}");
        // What a device that is late finds no room for is dropped, and each such frame is counted.
        let after = wait_for(
            "the ports to be free again",
            Duration::from_secs(20),
            Duration::from_millis(20),
            || Ok(Some(dropped(&daemon)?).filter(|(_, gone)| *gone)),
        )?;
        ensure!(
            after.0 - before == lost,
            "{load:?}: {report}, {before} to {after:?}"
        );
        before = after.0;
    }
    Ok(())
}

const LOADS: &[&[&str]] = &[
    &["--size", "60"],
    &["--size", "imix", "--flows", "65536"],
    &["--size", "9014", "--queue", "256", "--receive-buffer", "2048"],
];

#[test]
fn frames_are_intact_and_in_order_with_split_rings() -> Result<()> {
    verify(1, "split", LOADS)?;
    verify(2, "split", &[&["--size", "imix", "--in-order"]])
}

#[test]
fn frames_are_intact_and_in_order_with_packed_rings() -> Result<()> {
    verify(1, "packed", LOADS)?;
    verify(2, "packed", &[&["--size", "imix"]])
}
