//! What vnicd refuses at its start, each with words that name the cause and the cure; and front-ends that misbehave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use vnic_tests::binaries::binary;
use vnic_tests::daemon::{Daemon, DaemonOptions, features};
use vnic_tests::fabric::{Fabric, PEER_IPV4};
use vnic_tests::frontend::Device;
use vnic_tests::lag::Distribution;
use vnic_tests::netns::Netns;
use vnic_tests::process::wait_for;
use vnic_tests::scene::Scene;

/// Runs vnicd until it ends by itself, and returns its exit code and what it wrote to stderr.
fn refused(namespace: &Netns, folder: &Path, arguments: &[&str]) -> Result<(i32, String)> {
    // `timeout` ends with 124 if vnicd does not end by itself.
    let output = namespace
        .command("timeout")
        .args(["--kill-after=1", "10"])
        .arg(binary("vnicd")?)
        .arg("--control")
        .arg(folder.join("control.sock"))
        .arg("--state-dir")
        .arg(folder.join("state"))
        .args(arguments)
        .env_remove("LB_ALGORITHM")
        .output()?;
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

/// vnicd must end with an error of its own whose message holds all `words`.
fn assert_refused(namespace: &Netns, folder: &Path, arguments: &[&str], words: &[&str]) -> Result<()> {
    let (code, message) = refused(namespace, folder, arguments)?;
    assert!(
        code == 1 || code == 2,
        "{arguments:?}: exit code {code}: {message}"
    );
    let lower = message.to_lowercase();
    for word in words {
        assert!(
            lower.contains(&word.to_lowercase()),
            "{arguments:?}: `{word}` is not in: {message}"
        );
    }
    assert!(!lower.contains("panicked"), "{arguments:?}: {message}");
    Ok(())
}

#[test]
fn wrong_arguments_are_refused_with_cause_and_cure() -> Result<()> {
    let fabric = Fabric::new(2, 1, Distribution::Lag)?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (socket, taken, missing) = (path("a.sock"), path("taken.sock"), path("no/such/folder/a.sock"));
    let _listener = UnixListener::bind(&taken)?;
    std::fs::write(path("bad.toml"), "workers = 1\nspeed = 9\n")?;
    let config = path("bad.toml");
    let port = format!("name=a,socket={socket}");
    let twice = format!("name=a,socket={socket}2");
    let bad_mac = format!("{port},mac=52:54:00");
    let bad_key = format!("{port},speed=9");
    let taken_port = format!("name=a,socket={taken}");
    let missing_port = format!("name=a,socket={missing}");
    let nine: Vec<String> = (0..9).map(|index| format!("nic{index}")).collect();
    let mut nine_nics = vec!["--port", &port, "--topology", "lag"];
    for nic in &nine {
        nine_nics.extend(["--nic", nic]);
    }

    let cases: &[(&[&str], &[&str])] = &[
        (
            &["--port", &port, "--nic", "nosuch0"],
            &["nosuch0", "no such interface"],
        ),
        (&nine_nics, &["9", "at most 8"]),
        (
            &[
                "--port",
                &port,
                "--nic",
                "up0",
                "--nic",
                "up0",
                "--topology",
                "lag",
            ],
            &["up0", "twice"],
        ),
        (
            &["--port", &port, "--nic", "up0", "--nic", "up1"],
            &["--topology lag"],
        ),
        (&["--port", &taken_port, "--nic", "up0"], &[&taken, "use"]),
        (
            &["--port", &missing_port, "--nic", "up0"],
            &[&missing, "does not exist", "mkdir"],
        ),
        (
            &["--socket-path", &socket, "--fd", "3", "--nic", "up0"],
            &["--socket-path", "--fd", "exclude"],
        ),
        (&["--fd", "77", "--nic", "up0"], &["77", "not open"]),
        (&["--fd", "0", "--nic", "up0"], &["0 for `--fd`", "give 3 to"]),
        (
            &["--port", &bad_mac, "--nic", "up0"],
            &["52:54:00", "MAC address"],
        ),
        (
            &["--port", &port, "--port", &twice, "--nic", "up0"],
            &["`a`", "own name"],
        ),
        (&["--port", &bad_key, "--nic", "up0"], &["speed", "keys are"]),
        (
            &["--port", &port, "--config", &config],
            &["bad.toml", "line 2", "speed"],
        ),
        (
            &["--port", &port, "--nic", "up0,zerocopy=require"],
            &["up0", "zerocopy"],
        ),
        (&["--port", &port, "--nic", "lo"], &["lo", "loopback"]),
        (&["--port", &port], &["no NIC"]),
        (&[], &["port"]),
    ];
    for (arguments, words) in cases {
        assert_refused(&fabric.host, folder.path(), arguments, words)?;
    }

    fabric.host.ip(&["link", "set", "up1", "down"])?;
    assert_refused(
        &fabric.host,
        folder.path(),
        &["--port", &port, "--nic", "up1"],
        &["up1", "down", "ip link set"],
    )?;
    fabric.host.add_address("up0", "10.77.0.100/24")?;
    fabric.host.ip(&["route", "add", "default", "via", "10.77.0.1"])?;
    let arguments = ["--port", port.as_str(), "--nic", "up0"];
    assert_refused(
        &fabric.host,
        folder.path(),
        &arguments,
        &["up0", "default route", "--allow-default-route-nic"],
    )?;
    assert!(
        !Path::new(&socket).exists(),
        "a refused start left its socket behind"
    );
    Ok(())
}

#[test]
fn a_nic_that_another_daemon_drives_is_refused() -> Result<()> {
    let fabric = Fabric::new(1, 1, Distribution::Lag)?;
    let (folder, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let options = DaemonOptions::new(&[("a", "52:54:00:00:00:01")], &fabric.nics(), 1);
    let first = Daemon::start(&fabric.host, folder.path(), &options)?;
    let port = format!("name=a,socket={}", other.path().join("a.sock").display());
    assert_refused(
        &fabric.host,
        other.path(),
        &["--port", &port, "--nic", "up0"],
        &["up0", "XDP program"],
    )?;
    assert!(
        first.nic_is_alive("up0")?,
        "the refused daemon disturbed the first"
    );
    Ok(())
}

#[test]
fn an_inherited_descriptor_that_is_no_socket_is_refused() -> Result<()> {
    let namespace = Netns::create("fd")?;
    let folder = tempfile::tempdir()?;
    let output = namespace
        .command("sh")
        .args([
            "-c",
            "exec timeout --kill-after=1 10 \"$0\" --fd 3 --nic up0 --control \"$1\" 3</dev/null",
        ])
        .arg(binary("vnicd")?)
        .arg(folder.path().join("control.sock"))
        .output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for word in ["--fd 3", "/dev/null", "socket"] {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    Ok(())
}

#[test]
fn a_daemon_without_privilege_says_what_it_needs() -> Result<()> {
    let fabric = Fabric::new(1, 1, Distribution::Lag)?;
    let folder = tempfile::tempdir()?;
    // The unprivileged user must reach the binary and write its sockets.
    let vnicd = folder.path().join("vnicd");
    std::fs::copy(binary("vnicd")?, &vnicd)?;
    for path in [folder.path(), &vnicd] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    }
    let output = fabric
        .host
        .command("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--bounding-set=-all",
            "timeout",
            "10",
        ])
        .arg(&vnicd)
        .arg("--port")
        .arg(format!(
            "name=a,socket={}",
            folder.path().join("a.sock").display()
        ))
        .args(["--nic", "up0", "--control"])
        .arg(folder.path().join("control.sock"))
        .arg("--state-dir")
        .arg(folder.path().join("state"))
        .output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        matches!(output.status.code(), Some(1 | 2)),
        "{}: {message}",
        output.status
    );
    assert!(
        message.contains("CAP_"),
        "no word of the privilege that is missing: {message}"
    );
    Ok(())
}

#[test]
fn capabilities_are_printed_without_a_daemon() -> Result<()> {
    let output = std::process::Command::new(binary("vnicd")?)
        .arg("--print-capabilities")
        .output()?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(capabilities["type"], "net");
    Ok(())
}

#[test]
fn a_front_end_that_misbehaves_harms_only_itself() -> Result<()> {
    let scene = Scene::set(2, 1, 1)?;
    let sessions = scene.open_sessions(4)?;
    // The guest's front-end is connected, so a second one on its socket is turned away; the control socket takes anyone.
    let message = |request: u32, flags: u32, size: u32, body: &[u8]| {
        let mut bytes = Vec::new();
        for field in [request, flags, size] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(body);
        bytes
    };
    let attacks = [
        vec![0xff; 4096],
        message(1, 1, 0, &[])[..7].to_vec(),
        message(2, 1, u32::MAX, &[]),
        message(5, 1, 8, &[0xff; 8]),
        message(9999, 1, 0, &[]),
        message(8, 1, 8, &[0xff; 8]),
    ];
    for socket in ["p0.sock", "control.sock"] {
        for attack in &attacks {
            let mut stream = UnixStream::connect(scene.folder().join(socket))?;
            stream.set_read_timeout(Some(Duration::from_millis(200)))?;
            // It may hang up at any time; only the others matter.
            let _ = stream.write_all(attack);
            let _ = stream.read(&mut [0u8; 64]);
        }
    }
    sessions.advance(&scene, "after misbehaving front-ends")?;
    assert_eq!(scene.guests[0].ping(PEER_IPV4, 2, 56)?, 2);
    sessions.finish(&scene)
}

#[test]
fn a_broken_ring_is_told_to_its_front_end_and_the_others_go_on() -> Result<()> {
    let namespace = Netns::create("broken")?;
    let folder = tempfile::tempdir()?;
    let macs = ["52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"];
    let ports: Vec<(&str, &str)> = ["a", "b", "c"].into_iter().zip(macs).collect();
    let options = DaemonOptions::new(&ports, &[], 1);
    let mut daemon = Daemon::start(&namespace, folder.path(), &options)?;
    let connect = |port: &str| Device::connect(&daemon.socket(port), 1);
    let (mut hostile, mut sender, mut receiver) = (connect("a")?, connect("b")?, connect("c")?);
    hostile.break_sending_ring(0)?;
    wait_for(
        "the error eventfd",
        Duration::from_secs(30),
        Duration::from_millis(5),
        || Ok(hostile.was_told_of_broken_ring(0).then_some(())),
    )?;
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 3, 0x52, 0x54, 0, 0, 0, 2, 0x88, 0xb5];
    frame.resize(60, 0x5a);
    assert!(sender.send(0, &frame)?);
    let received = wait_for(
        "the frame of another guest",
        Duration::from_secs(30),
        Duration::from_millis(5),
        || receiver.receive(0),
    )?;
    assert_eq!(received, frame);
    daemon.process().must_run()?;
    assert!(!hostile.was_told_of_broken_ring(0), "told once");
    let stats = daemon.query("stats")?;
    let broken: Vec<_> = (0..3)
        .map(|port| stats["ports"][port]["broken_rings"].as_u64())
        .collect();
    assert_eq!(broken, [Some(1), Some(0), Some(0)]);
    Ok(())
}

#[test]
fn garbage_on_an_unused_port_leaves_it_usable() -> Result<()> {
    let fabric = Fabric::new(1, 1, Distribution::Lag)?;
    let folder = tempfile::tempdir()?;
    let options = DaemonOptions::new(&[("a", "52:54:00:00:00:01")], &fabric.nics(), 1);
    let mut daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    for length in [1, 11, 12, 13, 300, 5000] {
        let mut stream = UnixStream::connect(daemon.socket("a"))?;
        let _ = stream.write_all(&vec![0xa5; length]);
    }
    wait_for(
        "the port to listen again",
        Duration::from_secs(5),
        Duration::from_millis(20),
        || {
            daemon.process().must_run()?;
            Ok((daemon.query("ports")?["ports"][0]["state"] == "listening").then_some(()))
        },
    )?;
    features(&mut UnixStream::connect(daemon.socket("a"))?)?;
    Ok(())
}
