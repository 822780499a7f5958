//! What happens to NICs and to the host's memory beside vnicd: each a clear error at the start, or an event that is survived, told
//! and counted. No guest takes part.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use vnic_tests::binaries::binary;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::netns::Netns;
use vnic_tests::process::{run, wait_for};

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
        let daemon = Daemon::start(&self.host, self.folder.path(), &options)?;
        // It listens before it opens its NICs, and answers afterwards.
        daemon.query("nics")?;
        Ok(daemon)
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

/// Waits until the last change of `nic` has this cause, and returns its report.
fn changed(daemon: &mut Daemon, nic: &str, cause: &str) -> Result<Value> {
    wait_for(
        &format!("`{cause}` of {nic}"),
        Duration::from_secs(15),
        Duration::from_millis(20),
        || {
            daemon.process().must_run()?;
            let report = daemon.nic(nic)?;
            let told = report["last_change"]["cause"].as_str().unwrap_or_default();
            Ok(told.contains(cause).then_some(report))
        },
    )
}

#[test]
fn what_happens_to_a_running_nic_is_told_and_survived() -> Result<()> {
    let host = Host::new()?;
    let mut daemon = host.start(&["up0", "up1"])?;
    let daemon = &mut daemon;

    host.host.ip(&["link", "set", "up0", "name", "renamed0"])?;
    let report = changed(daemon, "up0", "renamed from up0 to renamed0")?;
    assert_eq!(
        (&report["ifname"], &report["alive"]),
        (&"renamed0".into(), &true.into())
    );
    host.far.ip(&["link", "set", "far0", "down"])?;
    assert_eq!(changed(daemon, "up0", "carrier lost")?["alive"], false);
    host.far.ip(&["link", "set", "far0", "up"])?;
    assert_eq!(changed(daemon, "up0", "carrier back")?["alive"], true);

    host.host.ip(&["link", "set", "renamed0", "mtu", "1400"])?;
    assert_eq!(
        changed(daemon, "up0", "MTU changed from 1500 to 1400")?["mtu"],
        1400
    );
    host.host
        .ip(&["link", "set", "renamed0", "address", "02:00:00:00:00:77"])?;
    assert_eq!(
        changed(daemon, "up0", "address changed")?["mac"],
        "02:00:00:00:00:77"
    );

    run(host.host.command("ethtool").args(["-L", "renamed0", "rx", "2"]))?;
    let report = changed(daemon, "up0", "receive queues changed from 1 to 2")?;
    let concern = report["concerns"][0].as_str().unwrap_or_default();
    assert!(concern.contains("ethtool -L renamed0 rx 1"), "{report}");
    run(host.host.command("ethtool").args(["-L", "renamed0", "rx", "1"]))?;
    let report = changed(daemon, "up0", "receive queues changed from 2 to 1")?;
    assert_eq!(report["concerns"], Value::Array(Vec::new()));

    host.host.ip(&["link", "add", "br0", "type", "bridge"])?;
    host.host.ip(&["link", "set", "renamed0", "master", "br0"])?;
    let report = changed(daemon, "up0", "enslaved to br0")?;
    assert!(
        report["concerns"][0]
            .as_str()
            .unwrap_or_default()
            .contains("renamed0 nomaster"),
        "{report}"
    );
    host.host.ip(&["link", "set", "renamed0", "nomaster"])?;
    assert_eq!(changed(daemon, "up0", "released by br0")?["alive"], true);

    // An interface of the host takes the guest's address: nothing can be done but to say so.
    host.host.ip(&["link", "set", "br0", "address", GUEST])?;
    host.host.ip(&["link", "del", "renamed0"])?;
    let report = changed(daemon, "up0", "vanished")?;
    assert_eq!(report["alive"], false);
    assert!(report["changes"].as_u64() >= Some(10), "{report}");
    assert!(
        report["concerns"][0]
            .as_str()
            .unwrap_or_default()
            .contains("restart vnicd"),
        "{report}"
    );
    assert!(daemon.nic_is_alive("up1")?);
    let log = daemon.log_tail(200);
    for words in [
        "br0 now has the guest's address",
        "NIC lost for good",
        "enslaved to br0",
        "too_long",
    ] {
        assert!(log.contains(words), "`{words}` is not in the log:\n{log}");
    }

    // Workers sleep although a NIC is gone: its sockets must not wake them over and over.
    let turns = |daemon: &Daemon| -> Result<(u64, u64)> {
        let stats = daemon.query("stats")?;
        let worker = &stats["workers"][0];
        Ok((
            worker["turns"].as_u64().unwrap_or(0),
            worker["sleeps"].as_u64().unwrap_or(0),
        ))
    };
    let before = turns(daemon)?;
    std::thread::sleep(Duration::from_secs(2));
    let after = turns(daemon)?;
    // A sleep lasts up to 100 ms, so that 20 or so make two seconds; one that ends at once makes tens of thousands.
    assert!(after.1 - before.1 < 2000, "{before:?} {after:?}");
    Ok(())
}

#[test]
fn a_nic_that_is_down_lets_workers_sleep() -> Result<()> {
    let host = Host::new()?;
    let daemon = host.start(&["up0", "up1"])?;
    host.host.ip(&["link", "set", "up0", "down"])?;
    // Told as set down or as a lost carrier, whichever was seen first.
    let wait_alive = |alive: bool| {
        wait_for(
            "up0 to die or come back",
            Duration::from_secs(15),
            Duration::from_millis(20),
            || Ok((daemon.nic_is_alive("up0")? == alive).then_some(())),
        )
    };
    wait_alive(false)?;
    let sleeps = |daemon: &Daemon| -> Result<u64> {
        Ok(daemon.query("stats")?["workers"][0]["sleeps"]
            .as_u64()
            .unwrap_or(0))
    };
    let before = sleeps(&daemon)?;
    std::thread::sleep(Duration::from_secs(2));
    let after = sleeps(&daemon)?;
    assert!(after - before < 2000, "{before} {after}");
    host.host.ip(&["link", "set", "up0", "up"])?;
    wait_alive(true)
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

    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let available_kib: u64 = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    if available_kib < 15 << 20 {
        let (code, log) = host.run(&[], &["--nic", "up0", "--frames", "4194304"], "10")?;
        assert!(
            code == 1 && log.contains("16384 MiB") && log.contains("--frames"),
            "{code}: {log}"
        );
    }

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
