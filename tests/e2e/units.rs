//! What qemu/systemd and `make install` promise: activation by several named sockets, readiness, the rights of vnicd.service, units that
//! systemd understands, and nothing left after `make uninstall`.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use vnic_tests::binaries::{binary, source_root};
use vnic_tests::daemon::features;
use vnic_tests::fabric::Fabric;
use vnic_tests::lag::Distribution;
use vnic_tests::process::run;
use vnic_tests::unit::{Activation, UnitDaemon, can_unlimit_memlock, unit_setting};

/// The ports as `vnic` lists them: name, socket.
fn ports(folder: &Path) -> Result<Vec<(String, String)>> {
    let text = run(Command::new(binary("vnic")?)
        .arg("--control")
        .arg(folder.join("control.sock"))
        .args(["ports", "--json"]))?;
    let listed: serde_json::Value = serde_json::from_str(&text)?;
    let rows = listed["ports"].as_array().context("no list of ports")?;
    let word = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Ok(rows
        .iter()
        .map(|row| (word(row, "name"), word(row, "socket")))
        .collect())
}

fn several_sockets(arguments: &[&str]) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let names = ["web", "db", "log"];
    let mut daemon = UnitDaemon::listen(folder.path(), &Activation::named(&names, arguments))?;
    // The connection that starts vnicd is served like any other.
    let mut front_ends: Vec<UnixStream> = names
        .iter()
        .map(|name| daemon.connect(name))
        .collect::<Result<_>>()?;
    let ready = daemon.wait_told("READY=1")?;
    assert!(ready.contains("STATUS=0 of 3 ports"), "{ready}");
    for front_end in &mut front_ends {
        features(front_end)?;
    }
    daemon.wait_told("3 of 3 ports connected")?;
    let expected = names.map(|name| (name.to_owned(), daemon.socket(name).display().to_string()));
    assert_eq!(ports(folder.path())?, expected);

    let (status, _) = daemon.process().terminate(Duration::from_secs(5))?;
    assert!(status.success(), "vnicd ended with {status}");
    daemon
        .told()?
        .filter(|text| text == "STOPPING=1")
        .context("no STOPPING=1")?;
    for name in names {
        assert!(
            daemon.socket(name).exists(),
            "{name}'s socket is systemd's to remove"
        );
    }
    Ok(())
}

#[test]
fn several_activated_sockets_serve_the_ports_of_their_names() -> Result<()> {
    several_sockets(&[
        "--port",
        "name=web,socket=activation",
        "--port",
        "name=db,socket=activation,queues=2",
        "--port",
        "name=log,socket=activation",
    ])
}

#[test]
fn without_configured_ports_every_activated_socket_is_a_port() -> Result<()> {
    several_sockets(&[])
}

#[test]
fn activation_that_does_not_fit_is_refused_with_cause_and_cure() -> Result<()> {
    let port = [
        "--port",
        "name=a,socket=activation",
        "--port",
        "name=b,socket=activation",
    ];
    let named = |sockets: &[&str], names: Option<&str>| {
        let mut activation = Activation::named(sockets, &port);
        activation.names = names.map(str::to_owned);
        activation
    };
    let cases: &[(Activation, &[&str])] = &[
        (
            named(&["a"], Some("a")),
            &["port `b`", "no socket was handed over", "FileDescriptorName=b"],
        ),
        (
            named(&["a", "b", "c"], Some("a:b:c")),
            &["name `c`", "no port of that name", "disable"],
        ),
        (
            named(&["a", "b"], Some("a:other")),
            &["port `b`", "handed over: a, other"],
        ),
        (
            named(&["a", "b"], Some("a:a")),
            &["two sockets", "`a`", "one unit for each port"],
        ),
        (named(&["a", "b"], None), &["FileDescriptorName="]),
    ];
    for (activation, words) in cases {
        let folder = tempfile::tempdir()?;
        let mut daemon = UnitDaemon::listen(folder.path(), activation)?;
        let _front_end = daemon.connect("a")?;
        refused(&mut daemon, words)?;
    }

    // No stream can connect to these: vnicd starts by the first message.
    let folder = tempfile::tempdir()?;
    let mut activation = named(&["a", "b"], Some("a:b"));
    activation.options = vec!["--datagram".to_owned()];
    let mut daemon = UnitDaemon::listen(folder.path(), &activation)?;
    UnixDatagram::unbound()?.send_to(b"hello", daemon.socket("a"))?;
    refused(
        &mut daemon,
        &["activated socket `a`", "datagram", "ListenStream="],
    )?;

    // Configured, but started by hand.
    let folder = tempfile::tempdir()?;
    let output = Command::new(binary("vnicd")?)
        .args(port)
        .arg("--control")
        .arg(folder.path().join("control.sock"))
        .output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(
        message.contains("port `a`") && message.contains("vnicd@a.socket"),
        "{message}"
    );
    Ok(())
}

fn refused(daemon: &mut UnitDaemon, words: &[&str]) -> Result<()> {
    let (code, message) = daemon.refusal()?;
    assert!(matches!(code, 1 | 2), "exit code {code}: {message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
    Ok(())
}

#[test]
fn the_rights_of_the_unit_are_enough_and_none_is_too_many() -> Result<()> {
    let fabric = Fabric::new(2, 1, Distribution::Lag)?;
    let arguments = [
        "--nic",
        "up0",
        "--nic",
        "up1",
        "--topology",
        "lag",
        "--workers",
        "2",
    ];
    let folder = tempfile::tempdir()?;
    let mut activation = Activation::named(&["a", "b"], &arguments).within(&fabric.host);
    activation.confined = true;
    let mut daemon = UnitDaemon::listen(folder.path(), &activation)?;
    let mut front_end = daemon.connect("a")?;
    let ready = daemon.wait_told("READY=1")?;
    assert!(ready.contains("2 of 2 NICs alive"), "{ready}");
    features(&mut front_end)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.process().id()))?;
    let line = |key: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("")
            .trim()
    };
    assert_eq!(line("CapEff:"), line("CapBnd:"), "{status}");
    assert!(line("Uid:").starts_with("65534"), "{status}");
    // CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF; and CAP_IPC_LOCK where it stands in for the unit's limit.
    let stand_in = if can_unlimit_memlock() { 0 } else { 1u64 << 14 };
    let expected = (1 << 12) | (1 << 13) | (1 << 39) | stand_in;
    assert_eq!(line("CapEff:"), format!("{expected:016x}"));
    daemon.process().terminate(Duration::from_secs(5))?;

    // Each of them is needed: without it vnicd says so.
    for missing in unit_setting("vnicd.service", "AmbientCapabilities")?.split_whitespace() {
        let folder = tempfile::tempdir()?;
        activation.without = Some(missing.to_owned());
        let mut daemon = UnitDaemon::listen(folder.path(), &activation)?;
        let _front_end = daemon.connect("a")?;
        refused(&mut daemon, &[missing, "AmbientCapabilities="])?;
    }
    Ok(())
}

#[test]
fn the_service_waits_for_a_nic_and_gives_up_on_a_wrong_configuration() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let code = |options: &[&str]| -> Result<(Option<i32>, String)> {
        let output = Command::new(binary("vnicd")?)
            .arg("--socket-path")
            .arg(folder.path().join("vm.sock"))
            .arg("--control")
            .arg(folder.path().join("control.sock"))
            .arg("--state-dir")
            .arg(folder.path())
            .args(options)
            .output()?;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code(), message))
    };
    let (absent, message) = code(&["--nic", "nosuch0"])?;
    assert!(message.contains("there is no such interface"), "{message}");
    let (wrong, message) = code(&["--nic", "nosuch0,weight=heavy"])?;
    assert!(message.contains("weight"), "{message}");

    let setting = |key| unit_setting("vnicd.service", key);
    assert_eq!(setting("Restart")?, "on-failure");
    let prevented = setting("RestartPreventExitStatus")?.parse()?;
    assert_eq!(wrong, Some(prevented));
    assert_eq!(absent, Some(1));
    assert_ne!(absent, Some(prevented));
    assert_eq!(setting("StartLimitIntervalSec")?, "0");
    Ok(())
}

#[test]
fn installed_files_are_understood_and_uninstalled_without_a_trace() -> Result<()> {
    let staging = tempfile::tempdir()?;
    let make = |target: &str, destination: &str, prefix: &str| {
        run(Command::new("make")
            .arg("--no-print-directory")
            .arg("--directory")
            .arg(source_root())
            .arg(target)
            .arg(format!("DESTDIR={destination}"))
            .arg(format!("PREFIX={prefix}"))
            .env_remove("MAKEFLAGS"))
    };
    // systemd-analyze looks whether the program is there, so the prefix is a real place here.
    let prefix = staging.path().join("prefix");
    let prefix_text = prefix.display().to_string();
    make("install-data", "", &prefix_text)?;
    std::fs::create_dir_all(prefix.join("bin"))?;
    std::fs::copy(binary("vnicd")?, prefix.join("bin/vnicd"))?;
    let units = prefix.join("lib/systemd/system");
    let instance = units.join("vnicd@web.socket");
    std::os::unix::fs::symlink("vnicd@.socket", &instance)?;
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(["vnicd.service", "vnicd.socket"].map(|unit| units.join(unit)))
        .arg(&instance)
        .output()?;
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success(), "systemd-analyze verify: {said}");
    assert!(!said.contains("vnicd"), "systemd-analyze verify: {said}");

    let text = std::fs::read_to_string(prefix.join("share/qemu/vhost-user/50-vnicd.json"))?;
    let description: serde_json::Value = serde_json::from_str(&text)?;
    assert_eq!(description["type"], "net");
    let program = description["binary"].as_str().context("no binary")?;
    assert_eq!(program, format!("{prefix_text}/bin/vnicd"));
    assert!(run(Command::new(program).arg("--print-capabilities"))?.contains("\"net\""));

    // In a staging folder, nothing is left of it.
    let staged = staging.path().join("staged");
    let destination = staged.display().to_string();
    make("install-data", &destination, "/usr")?;
    assert!(staged.join("usr/lib/sysctl.d/60-vnic-hugepages.conf").is_file());
    assert!(staged.join("usr/lib/systemd/system/vnicd@.socket").is_file());
    make("uninstall", &destination, "/usr")?;
    let left = std::fs::read_dir(&staged)?.count();
    assert_eq!(
        left,
        0,
        "left behind: {}",
        run(Command::new("find").arg(&staged))?
    );
    Ok(())
}
