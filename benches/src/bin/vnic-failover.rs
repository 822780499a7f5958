//! Measures failover end to end: a guest's frames through vnicd onto TAP devices whose carrier is taken away.
//!
//! A TAP with TUNSETCARRIER does what a cable does; a veth tells at once and hides what detection takes. Needs root.

use std::fs::File;
use std::io::Write as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use vnic_benches::failover::{Tally, frame};
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::frontend::Device;
use vnic_tests::netns::Netns;
use vnic_tests::process::Process;
use vnic_tests::sys::{open_tap, set_tap_carrier};

/// Time in which all that is under way arrives.
const DRAIN: Duration = Duration::from_millis(30);
/// Of a failover that takes longer it is told what else happened.
const REMARKABLE: Duration = Duration::from_millis(2);
/// A failover that takes longer is none.
const LIMIT: Duration = Duration::from_secs(5);
/// Frames before the measurement, for each session one, at this rate.
const FILL_RATE: u32 = 100_000;

/// Measures how long the loss of a NIC's carrier keeps a guest's frames back, and how many it costs.
#[derive(Parser)]
#[command(
    after_help = "Prints one row of a Markdown table. Example: vnic-failover --sessions 1000000 --trials 1000 --rtnl-load"
)]
struct Options {
    /// What happens in a trial
    #[arg(long, value_enum, default_value = "one")]
    scenario: Scenario,
    /// Trials
    #[arg(long, default_value_t = 1000)]
    trials: u32,
    /// Sessions of the guest
    #[arg(long, default_value_t = 1000)]
    sessions: u32,
    /// NICs
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=8))]
    nics: u8,
    /// Frames a second: what is measured contains the time to the next frame of the NIC that is lost
    #[arg(long, default_value_t = 100_000)]
    rate: u32,
    /// Make and delete interfaces all the time, which holds the kernel's RTNL lock
    #[arg(long)]
    rtnl_load: bool,
    /// Print the table's heading as well
    #[arg(long)]
    heading: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// One NIC loses its carrier and gets it back
    One,
    /// A second one loses its carrier 100 ms after the first; the second is measured
    Two,
    /// All lose it, and one gets it back: from its carrier to its first frame
    All,
    /// One comes and goes ten times a second for two seconds; what that costs in frames
    Flap,
}

struct Bench {
    options: Options,
    taps: Vec<File>,
    tally: Arc<Tally>,
    daemon: Daemon,
    rate: Arc<AtomicU32>,
    threads: Vec<JoinHandle<Result<()>>>,
    _host: Netns,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn set_up(options: Options) -> Result<Bench> {
        let host = Netns::create("failover")?;
        let names: Vec<String> = (0..options.nics).map(|nic| format!("up{nic}")).collect();
        let taps: Vec<File> = host.run(|| {
            Ok(names
                .iter()
                .map(|name| open_tap(name))
                .collect::<std::io::Result<_>>()?)
        })?;
        for name in &names {
            // Longer than the reader may be off its CPU.
            host.ip(&["link", "set", name, "txqueuelen", "10000", "up"])?;
        }
        let mut daemon = DaemonOptions::new(&[("a", "52:54:00:00:00:01")], &names, 1);
        let capacity = (options.sessions * 2).max(16_384).to_string();
        daemon
            .arguments
            // Nobody answers, and with many sessions each is silent for long.
            .extend(["--sessions", &capacity, "--timeouts", "tcp-one-way-s=3600"].map(str::to_owned));
        if options.scenario != Scenario::Flap {
            daemon
                .arguments
                .extend(["--updelay", "0", "--flap-damping", "off"].map(str::to_owned));
        }
        let folder = tempfile::tempdir()?;
        let daemon = Daemon::start(&host, folder.path(), &daemon)?;
        daemon.query("nics")?;
        let per_trial = u64::from(options.rate) * if options.scenario == Scenario::Flap { 3 } else { 1 };
        let frames = u64::from(options.sessions) + (u64::from(options.trials) + 20) * per_trial;
        let frames = u32::try_from(frames).context("too many frames: fewer trials, or a lower rate")?;
        let tally = Arc::new(Tally::new(taps.len(), options.sessions, frames));
        let rate = Arc::new(AtomicU32::new(FILL_RATE));
        let socket = daemon.socket("a");
        let receiver = {
            let (tally, taps) = (
                Arc::clone(&tally),
                taps.iter().map(File::try_clone).collect::<Result<Vec<_>, _>>()?,
            );
            std::thread::spawn(move || tally.receive(&taps))
        };
        let sender = {
            let (tally, rate, sessions) = (Arc::clone(&tally), Arc::clone(&rate), options.sessions);
            std::thread::spawn(move || send(Device::connect(&socket, 1)?, &tally, &rate, sessions, frames))
        };
        let bench = Bench {
            options,
            taps,
            tally,
            daemon,
            rate,
            threads: vec![receiver, sender],
            _host: host,
            _folder: folder,
        };
        bench.fill()?;
        Ok(bench)
    }

    /// Waits until every session has sent a frame, and goes on at the rate of the measurement.
    fn fill(&self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(120);
        // All of them: while the last sessions begin, at the lower rate, none of the earlier ones sends, and the first trial would wait for
        // that.
        while self.tally.given() < self.options.sessions
            || self.arrived() < u64::from(self.options.sessions) * 99 / 100
        {
            ensure!(
                Instant::now() < until,
                "the sessions do not come: {:?}",
                self.tally.per_nic()
            );
            ensure!(
                !self.threads.iter().any(JoinHandle::is_finished),
                "a thread ended early"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        self.rate.store(self.options.rate, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }

    fn arrived(&self) -> u64 {
        self.tally.per_nic().iter().sum()
    }

    /// The NIC with the most traffic, the busiest first.
    fn busiest(&self) -> Vec<usize> {
        let before = self.tally.per_nic();
        std::thread::sleep(DRAIN);
        let mut rates: Vec<(u64, usize)> = self
            .tally
            .per_nic()
            .iter()
            .zip(&before)
            .enumerate()
            .map(|(nic, (now, then))| (now - then, nic))
            .collect();
        rates.sort_unstable_by(|a, b| b.cmp(a));
        rates.into_iter().map(|(_, nic)| nic).collect()
    }

    fn carrier(&self, nic: usize, up: bool) -> Result<()> {
        Ok(set_tap_carrier(&self.taps[nic], up)?)
    }

    /// Takes a carrier away and waits for the NIC's sessions elsewhere.
    fn lose(&self, nic: usize) -> Result<Duration> {
        self.tally.watch(nic);
        let since = self.tally.now();
        self.carrier(nic, false)?;
        let Some(took) = self.tally.moved(since, LIMIT) else {
            bail!("no session of NIC {nic} has moved:\n{}", self.daemon.log_tail(20));
        };
        if took > REMARKABLE {
            let silence = self.tally.silence();
            eprintln!(
                "a failover took {took:?}, in which nothing arrived by any NIC for {silence:?}\n{}",
                self.daemon.log_tail(2)
            );
        }
        Ok(took)
    }

    fn trial(&self) -> Result<Duration> {
        let order = self.busiest();
        let took = match self.options.scenario {
            Scenario::One => self.lose(order[0])?,
            Scenario::Two => {
                self.lose(order[0])?;
                std::thread::sleep(Duration::from_millis(100));
                let second = self.busiest()[0];
                ensure!(second != order[0], "the dead NIC has traffic");
                self.lose(second)?
            }
            Scenario::All => {
                for nic in &order {
                    self.carrier(*nic, false)?;
                }
                std::thread::sleep(DRAIN);
                // Whichever sessions come first: all are elsewhere.
                let (first, frames) = (order[0], self.tally.per_nic());
                let since = self.tally.now();
                self.carrier(first, true)?;
                let until = Instant::now() + LIMIT;
                while self.tally.per_nic()[first] == frames[first] {
                    ensure!(
                        Instant::now() < until,
                        "no frame on the only NIC:\n{}",
                        self.daemon.log_tail(20)
                    );
                    std::thread::sleep(Duration::from_micros(100));
                }
                Duration::from_nanos(self.tally.now() - since)
            }
            Scenario::Flap => {
                for _ in 0..20 {
                    self.carrier(order[0], false)?;
                    std::thread::sleep(Duration::from_millis(50));
                    self.carrier(order[0], true)?;
                    std::thread::sleep(Duration::from_millis(50));
                }
                Duration::ZERO
            }
        };
        std::thread::sleep(DRAIN);
        for nic in 0..self.taps.len() {
            self.carrier(nic, true)?;
        }
        std::thread::sleep(DRAIN);
        Ok(took)
    }

    /// All trials; prints the row.
    fn run(mut self) -> Result<()> {
        let mut took = Vec::new();
        for _ in 0..self.options.trials {
            took.push(self.trial()?);
        }
        self.rate.store(0, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(500));
        let stats = self.daemon.query("stats")?;
        let sum = |field: &str| -> u64 {
            let nics = stats["nics"].as_array().map(Vec::as_slice).unwrap_or_default();
            nics.iter().filter_map(|nic| nic[field].as_u64()).sum()
        };
        let drops = |at: &str| {
            stats[at].as_array().map_or_else(String::new, |all| {
                let each = all.iter().filter_map(|one| {
                    Some(
                        one["drops"]
                            .as_object()?
                            .iter()
                            .map(|(name, n)| format!("{name} {n}")),
                    )
                });
                each.flatten().collect::<Vec<_>>().join(", ")
            })
        };
        self.tally.end();
        for thread in self.threads.drain(..) {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        let (sent, lost, again) = self.tally.balance();
        took.sort_unstable();
        let at = |share: f64| -> String {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share of a length"
            )]
            let index = ((took.len() as f64 * share).ceil() as usize).clamp(1, took.len()) - 1;
            format!("{:.3}", took[index].as_secs_f64() * 1e3)
        };
        let name = self
            .options
            .scenario
            .to_possible_value()
            .map(|value| value.get_name().to_owned());
        if self.options.heading {
            println!(
                "| scenario | sessions | RTNL load | trials | p50 ms | p99 ms | max ms | frames | lost | twice | re-driven | drops |"
            );
            println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
        }
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {sent} | {lost} | {again} | {} | {} |",
            name.unwrap_or_default(),
            self.options.sessions,
            if self.options.rtnl_load { "yes" } else { "no" },
            took.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            sum("redriven"),
            [drops("nics"), drops("ports")].join(" "),
        );
        Ok(())
    }
}

/// Sends frames at the rate that is set: of each session one, then of any.
fn send(mut device: Device, tally: &Tally, rate: &AtomicU32, sessions: u32, frames: u32) -> Result<()> {
    let (mut number, mut random) = (0u32, 1u64);
    let (mut paced_since, mut paced, mut pace) = (Instant::now(), 0u64, 0u32);
    while !tally.is_over() {
        let wanted = rate.load(Ordering::Relaxed);
        if wanted != pace {
            (paced_since, paced, pace) = (Instant::now(), 0, wanted);
        }
        let due = paced_since.elapsed().as_micros() * u128::from(pace) / 1_000_000;
        if u128::from(paced) >= due || number >= frames {
            // What was sent is taken back by a look at the ring.
            std::thread::sleep(Duration::from_micros(50));
            continue;
        }
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let session = match number < sessions {
            true => number,
            false => u32::try_from((random >> 33) % u64::from(sessions))?,
        };
        if device.send(0, &frame(session, number))? {
            tally.sent();
            number += 1;
            paced += 1;
        } else {
            std::thread::yield_now();
        }
        while device.receive(0)?.is_some() {}
    }
    Ok(())
}

/// Keeps the kernel's RTNL lock busy until told to stop. A process of lower priority than that of the bench does it: the lock is the
/// load, not the processor.
fn hold_rtnl(stop: &AtomicBool) -> Result<()> {
    let host = Netns::create("rtnl")?;
    let log = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("chrt");
    command.args([
        "--other",
        "0",
        "nice",
        "-n",
        "10",
        "ip",
        "-n",
        host.name(),
        "-batch",
        "-",
    ]);
    let (mut process, mut commands) = Process::start_with_input("ip", command, log.path())?;
    while !stop.load(Ordering::Relaxed) {
        process.must_run()?;
        commands.write_all(b"link add name near type veth peer name far\nlink del dev near\n")?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let options = Options::parse();
    let stop = Arc::new(AtomicBool::new(false));
    let load = options.rtnl_load.then(|| {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || hold_rtnl(&stop))
    });
    let outcome = Bench::set_up(options).and_then(Bench::run);
    stop.store(true, Ordering::Relaxed);
    if let Some(load) = load {
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
    }
    outcome
}
