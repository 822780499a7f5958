//! vnicd as a process, without NICs, against front-ends that misbehave for long.

#[allow(
    dead_code,
    reason = "only the messages are used here, not the port in this process"
)]
mod vhost_support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost_support::{event, memory, message, send, state, words};

const PATIENCE: Duration = Duration::from_secs(30);
/// More lines than a start, a stop and the budgets of two ports make.
const FEW_LINES: usize = 120;

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "no sign of {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A switch of two ports; killed when dropped.
struct Vnicd {
    folder: tempfile::TempDir,
    child: Child,
}

impl Vnicd {
    fn start(poll: &str) -> Vnicd {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_vnicd"))
            .args(["--port", &format!("name=a,socket={}", path("a.sock"))])
            .args(["--port", &format!("name=b,socket={}", path("b.sock"))])
            .args(["--poll", poll, "--workers", "2"])
            .args(["--control", &path("control.sock"), "--state-dir", &path("state")])
            .stderr(File::create(folder.path().join("log")).expect("a log"))
            .env_remove("RUST_LOG")
            .env_remove("LB_ALGORITHM")
            .spawn()
            .expect("vnicd");
        let daemon = Vnicd { folder, child };
        wait_for("vnicd", || daemon.log().contains("ready").then_some(()));
        daemon
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn connect(&self, port: &str) -> UnixStream {
        UnixStream::connect(self.path(&format!("{port}.sock"))).expect("a connection")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).expect("a log")
    }

    fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .expect("a running vnicd")
            .count()
    }

    /// File descriptors that it has while nobody is connected. Workers open what they sleep in as they start, which may be after the
    /// first answer; all of them have when a ring was taken back.
    fn fds_at_rest(&self) -> usize {
        let mut front_end = run_rings(self.connect("a"), 0x3000);
        send(&front_end.stream, &message(11, 1, &state(0, 0)), &[]);
        front_end.stream.read_exact(&mut [0; 20]).expect("a ring's base");
        drop(front_end);
        self.serves("a");
        self.open_fds()
    }

    fn limit_fds(&self, limit: &str) {
        let status = Command::new("prlimit")
            .args([
                "--pid",
                &self.child.id().to_string(),
                &format!("--nofile={limit}"),
            ])
            .status()
            .expect("prlimit");
        assert!(status.success());
    }

    /// Both sides of a port speak: a front-end that connects now is answered.
    fn serves(&self, port: &str) {
        wait_for("an answer", || {
            let mut stream = UnixStream::connect(self.path(&format!("{port}.sock"))).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
            get_features(&mut stream).then_some(())
        });
    }

    fn stop(&mut self) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("a signal");
        wait_for("the end", || self.child.try_wait().expect("a child"))
    }

    /// It ends as it should, having left nothing behind and said not too much.
    fn ends_well(mut self) {
        let status = self.stop();
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        for socket in ["a.sock", "b.sock", "control.sock"] {
            assert!(!self.path(socket).exists(), "{socket} is left");
        }
        let lines = log.lines().count();
        assert!(lines < FEW_LINES, "{lines} lines of log: {log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

impl Drop for Vnicd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get_features(stream: &mut UnixStream) -> bool {
    stream.write_all(&message(1, 1, &[])).is_ok() && stream.read_exact(&mut [0; 20]).is_ok()
}

const REGION: u64 = 1 << 20;
const USER: u64 = 0x7000_0000;

/// What a front-end holds open.
struct FrontEnd {
    stream: UnixStream,
    memory: OwnedFd,
}

/// Sets both rings of a port going, at `used` in guest memory.
fn run_rings(stream: UnixStream, used: u64) -> FrontEnd {
    let memory = memory();
    nix::unistd::ftruncate(&memory, REGION.try_into().expect("small")).expect("a size");
    let version_1 = 1u64 << 32;
    send(&stream, &message(3, 1, &[]), &[]);
    send(&stream, &message(2, 1, &words(&[version_1])), &[]);
    let region = [state(1, 0), words(&[0, REGION, USER, 0])].concat();
    send(&stream, &message(5, 1, &region), &[&memory]);
    for ring in [0, 1] {
        let base = USER + u64::from(ring) * 0x1_0000;
        send(&stream, &message(8, 1, &state(ring, 256)), &[]);
        send(&stream, &message(10, 1, &state(ring, 0)), &[]);
        let addresses = [state(ring, 0), words(&[base, used + base, base + 0x2000, 0])].concat();
        send(&stream, &message(9, 1, &addresses), &[]);
        for code in [13, 14, 12] {
            send(&stream, &message(code, 1, &words(&[ring.into()])), &[&event()]);
        }
    }
    FrontEnd { stream, memory }
}

#[test]
fn front_ends_without_end_leak_nothing_and_do_not_fill_the_log() {
    let daemon = Vnicd::start("adaptive");
    let before = daemon.fds_at_rest();
    let junk: Vec<OwnedFd> = (0..8).map(|_| memory()).collect();
    for round in 0..400 {
        let stream = daemon.connect("a");
        match round % 4 {
            // Half a message, with fds.
            0 => send(
                &stream,
                &message(5, 1, &[0; 40])[..20],
                &junk.iter().collect::<Vec<_>>(),
            ),
            // A kick for a ring that is none.
            1 => send(&stream, &message(12, 1, &words(&[77])), &[&junk[0]]),
            // Memory without its fd.
            2 => send(
                &stream,
                &message(5, 1, &[state(1, 0), words(&[0; 4])].concat()),
                &[],
            ),
            // Gone at once.
            _ => {}
        }
    }
    wait_for("all fds to be closed", || {
        (daemon.open_fds() <= before).then_some(())
    });
    daemon.serves("a");
    daemon.serves("b");
    daemon.ends_well();
}

#[test]
fn refusals_do_not_fill_the_log_whoever_reconnects() {
    let daemon = Vnicd::start("adaptive");
    for _ in 0..60 {
        let mut stream = wait_for("a connection that is served", || {
            let mut stream = daemon.connect("a");
            get_features(&mut stream).then_some(stream)
        });
        send(&stream, &message(16, 1, &words(&[1 << 3])), &[]);
        for _ in 0..8 {
            // A ring that is none, with need_reply.
            send(&stream, &message(8, 9, &state(77, 256)), &[]);
            stream.read_exact(&mut [0; 20]).expect("a refusal");
        }
    }
    daemon.serves("b");
    assert!(
        daemon
            .log()
            .contains("refused: request 8 (SET_VRING_NUM) names ring 77")
    );
    daemon.ends_well();
}

#[test]
fn rings_that_cannot_start_are_not_told_of_for_every_message() {
    let daemon = Vnicd::start("adaptive");
    // The used rings are beyond the memory.
    let front_end = run_rings(daemon.connect("a"), 1 << 40);
    for _ in 0..5000 {
        send(&front_end.stream, &message(18, 1, &state(0, 1)), &[]);
        if daemon.log().len() > 100_000 {
            break;
        }
    }
    daemon.serves("b");
    drop(front_end);
    daemon.serves("a");
    assert!(daemon.log().contains("broke this ring"), "{}", daemon.log());
    daemon.ends_well();
}

#[test]
fn a_front_end_that_goes_while_its_rings_are_taken_back_is_forgotten() {
    for poll in ["busy", "adaptive"] {
        let daemon = Vnicd::start(poll);
        let before = daemon.fds_at_rest();
        for round in 0..100 {
            // Not one that is turned away because the last has not been forgotten yet.
            let stream = wait_for("a connection that is served", || {
                let mut stream = daemon.connect("a");
                get_features(&mut stream).then_some(stream)
            });
            let front_end = run_rings(stream, 0x3000);
            if round % 2 == 0 {
                // GET_VRING_BASE: answered when the workers have let go, if anybody still listens.
                send(&front_end.stream, &message(11, 1, &state(0, 0)), &[]);
            }
            // The next one is at the door already.
            let waiting = daemon.connect("a");
            drop(front_end);
            drop(waiting);
        }
        wait_for("all fds to be closed", || {
            (daemon.open_fds() <= before).then_some(())
        });
        daemon.serves("a");
        daemon.ends_well();
    }
}

#[test]
fn a_front_end_that_cuts_its_memory_short_is_disconnected() {
    // Workers look at the rings all the time.
    let daemon = Vnicd::start("busy");
    let before = daemon.fds_at_rest();
    for _ in 0..5 {
        let stream = wait_for("a connection that is served", || {
            let mut stream = daemon.connect("a");
            get_features(&mut stream).then_some(stream)
        });
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut front_end = run_rings(stream, 0x3000);
        assert!(get_features(&mut front_end.stream), "all of that was taken");
        nix::unistd::ftruncate(&front_end.memory, 0).expect("a size");
        // Nothing more is sent: it is the daemon that hangs up.
        assert!(
            matches!(front_end.stream.read(&mut [0]), Ok(0)),
            "still connected"
        );
    }
    daemon.serves("a");
    daemon.serves("b");
    let said = "the file of its memory region at guest address 0x0 was cut short";
    assert!(daemon.log().contains(said), "{}", daemon.log());
    wait_for("all fds to be closed", || {
        (daemon.open_fds() <= before).then_some(())
    });
    daemon.ends_well();
}

#[test]
fn sigterm_ends_the_daemon_while_rings_are_taken_back() {
    for poll in ["busy", "adaptive"] {
        for _ in 0..5 {
            let daemon = Vnicd::start(poll);
            let front_end = run_rings(daemon.connect("a"), 0x3000);
            send(&front_end.stream, &message(11, 1, &state(0, 0)), &[]);
            daemon.ends_well();
        }
    }
}

#[test]
fn a_second_front_end_is_turned_away_and_the_first_served_on() {
    let daemon = Vnicd::start("adaptive");
    let mut first = daemon.connect("a");
    assert!(get_features(&mut first));
    for _ in 0..200 {
        let mut second = daemon.connect("a");
        assert!(!get_features(&mut second), "two front-ends on one port");
    }
    assert!(get_features(&mut first));
    assert!(daemon.log().contains("turned a second front-end away"));
    daemon.ends_well();
}

#[test]
fn without_free_descriptors_front_ends_wait_and_the_log_stays_small() {
    let daemon = Vnicd::start("adaptive");
    daemon.serves("a");
    wait_for("quiet", || daemon.log().contains("disconnected").then_some(()));
    daemon.limit_fds("3:4096");
    let mut stream = daemon.connect("a");
    stream.write_all(&message(1, 1, &[])).expect("room in the socket");
    wait_for("the complaint", || {
        daemon.log().contains("ulimit -n").then_some(())
    });
    // Time for a loop that never waits to fill the log.
    std::thread::sleep(Duration::from_millis(300));
    assert!(daemon.log().matches("ulimit -n").count() <= 2, "{}", daemon.log());
    daemon.limit_fds("1024:4096");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.read_exact(&mut [0; 20]).expect("an answer after all");
    drop(stream);
    daemon.ends_well();
}

#[test]
fn stale_sockets_are_replaced_and_live_ones_left_alone() {
    let mut killed = Vnicd::start("adaptive");
    killed.child.kill().expect("a kill");
    killed.child.wait().expect("an end");
    assert!(killed.path("a.sock").exists() && killed.path("control.sock").exists());
    let run = |folder: &Path, port: &str, control: &str| {
        let path = |name: &str| folder.join(name).display().to_string();
        Command::new(env!("CARGO_BIN_EXE_vnicd"))
            .args(["--port", &format!("name=a,socket={}", path(port))])
            .args([
                "--port",
                &format!("name=b,socket={}", path(&format!("other-{port}"))),
            ])
            .args(["--control", &path(control)])
            .stderr(File::create(folder.join(format!("log-{port}-{control}"))).expect("a log"))
            .spawn()
            .expect("vnicd")
    };
    let folder = killed.folder.path();
    let mut again = run(folder, "a.sock", "control.sock");
    let said = |port: &str, control: &str| {
        fs::read_to_string(folder.join(format!("log-{port}-{control}"))).expect("a log")
    };
    wait_for("a start over stale sockets", || {
        said("a.sock", "control.sock").contains("ready").then_some(())
    });
    for (port, control, named) in [
        ("a.sock", "c2.sock", "a.sock"),
        ("p2.sock", "control.sock", "control.sock"),
    ] {
        let mut second = run(folder, port, control);
        let status = wait_for("a refusal", || second.try_wait().expect("a child"));
        let said = said(port, control);
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(named) && said.contains("in use"), "{said}");
    }
    assert!(!folder.join("p2.sock").exists() && !folder.join("c2.sock").exists());
    let mut stream = UnixStream::connect(folder.join("a.sock")).expect("the first still listens");
    assert!(get_features(&mut stream));
    again.kill().expect("a kill");
    again.wait().expect("an end");
}
