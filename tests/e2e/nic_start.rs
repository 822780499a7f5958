//! What vnicd finds at its start: NICs that it sets up for as long as it runs, the host's own addresses, too little memory.

use anyhow::Result;
use serde_json::Value;
use vnic_tests::binaries::binary;
use vnic_tests::nic_host::{GUEST, NicHost};

#[test]
fn channels_are_set_for_the_daemons_lifetime() -> Result<()> {
    let host = NicHost::new()?;
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
    let host = NicHost::new()?;
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
    let host = NicHost::new()?;
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
    let host = NicHost::new()?;
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
