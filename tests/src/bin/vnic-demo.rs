//! `make demo`: a guest talks to a peer through two NICs that vnicd drives; one NIC fails and comes back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::fabric::{Fabric, GUEST_IPV4, PEER_IPV4};
use vnic_tests::lag::{Distribution, LinkCounters};
use vnic_tests::lock::MachineLock;
use vnic_tests::process::wait_for;
use vnic_tests::qemu::{self, Guest, GuestOptions, Vnic, endpoint};
use vnic_tests::sys::{interrupted, note_interruptions};
use vnic_tests::traffic::echo::EchoServer;
use vnic_tests::traffic::sessions::{SessionGroup, SessionPlan, SessionsReport};

const MAC: &str = "52:54:00:de:00:01";
const PEER_PORT: u16 = 7000;
const GUEST_PORT: u16 = 7001;
/// No session may be without an answer for longer than this: TCP's own recovery from a lost frame takes 0.2 s and
/// doubles with each further loss.
const GAP_LIMIT_MS: u64 = 5000;
/// The share of the sessions and frames that each NIC must carry, in percent.
const FAIR_SHARE: std::ops::RangeInclusive<u64> = 25..=75;

/// Shows vnicd at work: a virtual machine, two network cards, many TCP sessions, and the loss of one card.
#[derive(Parser)]
struct Options {
    /// TCP sessions, half of them opened by the guest and half by the peer.
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(2..=1000))]
    sessions: u32,
    /// Seconds of traffic in each of the three phases.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..=600))]
    seconds: u64,
    /// vnicd's datapath threads.
    #[arg(long, default_value_t = 1)]
    workers: u32,
    /// Keep the logs even if all is well.
    #[arg(long)]
    keep: bool,
}

struct Check {
    name: &'static str,
    holds: bool,
    figure: String,
}

struct Demo {
    started: Instant,
    checks: Vec<Check>,
}

impl Demo {
    fn say(&self, text: &str) {
        println!("[{:5.1} s] {text}", self.started.elapsed().as_secs_f64());
    }

    fn check(&mut self, name: &'static str, holds: bool, figure: String) {
        self.say(&format!(
            "         {} {name}: {figure}",
            if holds { "PASS" } else { "FAIL" }
        ));
        self.checks.push(Check { name, holds, figure });
    }
}

fn main() {
    let options = Options::parse();
    let mut demo = Demo {
        started: Instant::now(),
        checks: Vec::new(),
    };
    let outcome = prepare(&demo).and_then(|(lock, folder)| {
        let outcome = run(&mut demo, &options, &folder);
        drop(lock);
        let failed = outcome.is_err() || demo.checks.iter().any(|check| !check.holds);
        if failed || options.keep {
            println!("The logs are in {}", folder.display());
        } else {
            std::fs::remove_dir_all(&folder).context("removing the logs")?;
        }
        outcome
    });
    summary(&demo, &options, outcome.is_ok());
    if let Err(error) = outcome {
        eprintln!("\nThe demo could not go on: {error:#}");
        std::process::exit(1);
    }
    if demo.checks.iter().any(|check| !check.holds) {
        std::process::exit(1);
    }
}

fn prepare(demo: &Demo) -> Result<(MachineLock, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces and AF_XDP need root: run this with sudo");
    }
    note_interruptions()?;
    demo.say("Waiting for my turn on this machine (another demo or test may run)");
    let lock = MachineLock::acquire()?;
    let folder = tempfile::Builder::new().prefix("vnic-demo-").tempdir()?.keep();
    Ok((lock, folder))
}

fn run(demo: &mut Demo, options: &Options, folder: &Path) -> Result<()> {
    demo.say(
        "Preparing the guest: Debian's cloud kernel and a small initramfs (cached after the first time)",
    );
    let accelerator = qemu::prepare_visibly()?;

    demo.say(
        "Building the network: two NICs (up0, up1), a switch that bundles them (LAG), and a peer behind it",
    );
    let fabric = Fabric::new(2, 1, Distribution::Lag)?;

    demo.say("Starting vnicd on up0 and up1");
    let daemon_options = DaemonOptions::new(&[("demo", MAC)], &fabric.nics(), options.workers);
    let daemon = Daemon::start(&fabric.host, folder, &daemon_options)?;

    let how = if accelerator == "kvm" {
        "with KVM"
    } else {
        "on QEMU's emulation, as KVM runs no guest here"
    };
    demo.say(&format!("Booting the guest {how}"));
    let vnic = Vnic::new(daemon.socket("demo"), MAC);
    let guest = Guest::boot(folder, &GuestOptions::new("demo", vec![vnic]))?;
    guest.configure("eth0", &[&format!("{GUEST_IPV4}/24")])?;
    let outcome = traffic(demo, options, &fabric, &daemon, &guest);
    if outcome.is_err() || demo.checks.iter().any(|check| !check.holds) {
        println!("\nThe end of vnicd's log:\n{}\n", daemon.log_tail(15));
    }
    outcome?;

    demo.say("Ending vnicd (SIGTERM) and cleaning up");
    drop(guest);
    let (status, took) = daemon.terminate()?;
    demo.check(
        "vnicd ends cleanly",
        status.success(),
        format!("{status}, {} ms", took.as_millis()),
    );
    Ok(())
}

/// The sessions opened from both sides.
struct Traffic<'a> {
    guest: &'a Guest,
    from_guest: u64,
    from_peer: SessionGroup,
}

impl Traffic<'_> {
    fn progress(&self, reset_gaps: bool) -> Result<SessionsReport> {
        let mut report = self.guest.sessions_progress(self.from_guest, reset_gaps)?;
        report
            .sessions
            .extend(self.from_peer.progress(reset_gaps).sessions);
        Ok(report)
    }

    /// Lets the traffic run and shows each second how it fares.
    fn watch(&self, demo: &Demo, fabric: &Fabric, seconds: u64) -> Result<()> {
        let mut echoed = self.progress(false)?.echoed();
        for _ in 0..seconds {
            let counters = fabric.counters();
            let second = Instant::now();
            while second.elapsed() < Duration::from_secs(1) {
                if interrupted() {
                    bail!("interrupted");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let report = self.progress(false)?;
            let frames = fabric.frames_since(&counters);
            let open = report.sessions.len() - report.errors().len();
            let answers = report.echoed() - echoed;
            echoed = report.echoed();
            demo.say(&format!(
                "         {open} sessions alive, {answers} answers, frames on up0: {}, on up1: {}",
                frames[0], frames[1]
            ));
        }
        Ok(())
    }
}

fn traffic(
    demo: &mut Demo,
    options: &Options,
    fabric: &Fabric,
    daemon: &Daemon,
    guest: &Guest,
) -> Result<()> {
    let answered = guest.ping(PEER_IPV4, 3, 56)?;
    demo.check(
        "the guest reaches the peer",
        answered >= 2,
        format!("{answered} of 3 pings answered"),
    );
    if answered == 0 {
        bail!("there is no way from the guest to the peer");
    }

    let half = options.sessions / 2;
    demo.say(&format!(
        "Opening {half} TCP sessions from the guest and {half} from the peer"
    ));
    let peer_echo = fabric.peer.run(|| Ok(EchoServer::start(PEER_PORT)?))?;
    guest.tcp_echo(GUEST_PORT)?;
    let plan = |address, port, count| {
        Ok::<_, anyhow::Error>(SessionPlan {
            target: endpoint(address, port)?,
            count,
            interval_ms: 100,
            message_bytes: 256,
        })
    };
    let to_peer = plan(PEER_IPV4, PEER_PORT, half)?;
    let to_guest = plan(GUEST_IPV4, GUEST_PORT, half)?;
    let traffic = Traffic {
        guest,
        from_guest: guest.start_sessions(to_peer)?,
        from_peer: fabric.peer.run(|| Ok(SessionGroup::start(&to_guest)?))?,
    };
    let errors = traffic.progress(true)?.errors();
    let opened = usize::try_from(2 * half)? - errors.len();
    let mut figure = format!("{opened} of {}", 2 * half);
    if let Some(error) = errors.first() {
        figure.push_str(&format!(" ({error})"));
    }
    demo.check("all sessions open", errors.is_empty(), figure);

    demo.say("Both NICs up:");
    let before = fabric.counters();
    traffic.watch(demo, fabric, options.seconds)?;
    spread(demo, fabric, daemon, &before)?;
    let calm = traffic.progress(true)?.longest_gap_ms();
    demo.say(&format!(
        "         longest gap so far: {calm} ms (each session sends every 100 ms)"
    ));

    demo.say("Taking up0 down: its link at the switch loses carrier");
    fabric.link_down(0)?;
    wait_for(
        "the loss of the link",
        Duration::from_secs(5),
        Duration::from_millis(1),
        || Ok((!fabric.counters()[0].up).then_some(())),
    )?;
    let before = fabric.counters();
    traffic.watch(demo, fabric, options.seconds)?;
    let frames = fabric.frames_since(&before);
    demo.check(
        "up1 carries everything",
        frames[0] == 0 && frames[1] > 0,
        format!("up0 {} frames, up1 {} frames", frames[0], frames[1]),
    );
    let loss = traffic.progress(true)?;
    survival(demo, "no session is reset by the loss", &loss);

    demo.say("Taking up0 up again");
    fabric.link_up(0)?;
    wait_for(
        "the return of the link",
        Duration::from_secs(5),
        Duration::from_millis(1),
        || Ok(fabric.counters()[0].up.then_some(())),
    )?;
    wait_for(
        "vnicd's use of the returned NIC",
        Duration::from_secs(10),
        Duration::from_millis(50),
        || Ok(daemon.nic_is_alive("up0")?.then_some(())),
    )?;
    let back = traffic.progress(true)?;
    demo.say(&format!(
        "Opening {half} new sessions from the guest: a returned NIC takes new sessions"
    ));
    let before = fabric.counters();
    let fresh = guest.start_sessions(plan(PEER_IPV4, PEER_PORT, half)?)?;
    traffic.watch(demo, fabric, options.seconds)?;
    let from_guest = fabric.counters()[0].to_peer - before[0].to_peer;
    demo.check(
        "up0 is used again",
        from_guest > 0,
        format!("{from_guest} frames from the guest by up0"),
    );
    let returned = traffic.progress(false)?;
    survival(demo, "no session is reset by the return", &returned);

    demo.say("Closing the sessions");
    let mut all = guest.finish_sessions(traffic.from_guest)?;
    all.sessions.extend(traffic.from_peer.finish().sessions);
    all.sessions.extend(guest.finish_sessions(fresh)?.sessions);
    let errors = all.errors();
    let mut figure = format!("{} messages", all.echoed());
    if let Some(error) = errors.first() {
        figure.push_str(&format!(", {} sessions failed, the first: {error}", errors.len()));
    }
    demo.check(
        "every message came back, whole and in order",
        errors.is_empty(),
        figure,
    );
    demo.check(
        "no reset at the peer",
        peer_echo.stats().resets == 0,
        format!("{} resets", peer_echo.stats().resets),
    );
    let gap = [
        loss.longest_gap_ms(),
        back.longest_gap_ms(),
        returned.longest_gap_ms(),
    ]
    .into_iter()
    .max()
    .unwrap_or(0);
    demo.check(
        "the longest gap any session saw",
        gap <= GAP_LIMIT_MS,
        format!(
            "{gap} ms (undisturbed {calm} ms, loss of up0 {} ms, return {} ms)",
            loss.longest_gap_ms(),
            back.longest_gap_ms().max(returned.longest_gap_ms())
        ),
    );
    Ok(())
}

fn spread(demo: &mut Demo, fabric: &Fabric, daemon: &Daemon, before: &[LinkCounters]) -> Result<()> {
    let sessions = daemon.sessions_per_nic(&fabric.nics())?;
    let (holds, figure) = shares(&sessions);
    demo.check("sessions spread over both NICs (vnic nics)", holds, figure);
    let now = fabric.counters();
    let pairs = || now.iter().zip(before);
    let sent: Vec<u64> = pairs().map(|(now, then)| now.to_peer - then.to_peer).collect();
    let (holds, figure) = shares(&sent);
    demo.check("frames from the guest spread (switch's counters)", holds, figure);
    let received: Vec<u64> = pairs()
        .map(|(now, then)| now.from_peer - then.from_peer)
        .collect();
    let (holds, figure) = shares(&received);
    demo.check("frames to the guest spread (switch's counters)", holds, figure);
    Ok(())
}

/// Whether each NIC has its fair share, and the figures.
fn shares(counts: &[u64]) -> (bool, String) {
    let total: u64 = counts.iter().sum();
    let percent: Vec<u64> = counts.iter().map(|count| count * 100 / total.max(1)).collect();
    let holds = total > 0 && percent.iter().all(|share| FAIR_SHARE.contains(share));
    let parts: Vec<String> = counts
        .iter()
        .zip(&percent)
        .enumerate()
        .map(|(index, (count, share))| format!("up{index} {count} ({share} %)"))
        .collect();
    (holds, parts.join(", "))
}

fn survival(demo: &mut Demo, name: &'static str, report: &SessionsReport) {
    let errors = report.errors();
    let mut figure = format!(
        "{} of {} sessions alive, longest gap {} ms",
        report.sessions.len() - errors.len(),
        report.sessions.len(),
        report.longest_gap_ms()
    );
    if let Some(error) = errors.first() {
        figure.push_str(&format!(" ({error})"));
    }
    demo.check(name, errors.is_empty(), figure);
}

fn summary(demo: &Demo, options: &Options, completed: bool) {
    let failed = demo.checks.iter().filter(|check| !check.holds).count();
    println!();
    if completed && failed == 0 {
        let sessions = options.sessions / 2 * 2;
        println!(
            "What you saw: a virtual machine held {sessions} TCP sessions with a machine behind two network cards."
        );
        println!(
            "vnicd gave each session one of the cards, moved those on the first card to the other when it lost"
        );
        println!("its link, and used the first again for new sessions when it came back.\n");
    }
    for check in &demo.checks {
        println!(
            "  {}  {:<52} {}",
            if check.holds { "PASS" } else { "FAIL" },
            check.name,
            check.figure
        );
    }
    let seconds = demo.started.elapsed().as_secs();
    println!(
        "\n{} of {} checks hold; {seconds} s",
        demo.checks.len() - failed,
        demo.checks.len()
    );
}
