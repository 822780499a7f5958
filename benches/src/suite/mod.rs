//! The side-by-side runs: the same load on vnicd and on its peers, in turn, each alone on its CPU.

mod adaptive;
mod bare_wake;
mod device;
mod distance;
mod dpdk_guest;
mod generator;
mod joined;
mod nic;
mod ovs;
pub mod report;
mod vm;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;
use vnic_tests::process::run;
use vnic_tests::sys::interrupted;

use device::{Device, Wait};
use report::{APART, OURS, OVS, PEER, Report, Section};

/// The CPU of the generator.
pub const GENERATOR_CPU: usize = 0;

/// A part of the suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// What the generator can do.
    Generator,
    /// VM to VM throughput.
    Vm,
    /// VM to VM latency.
    Latency,
    /// VM to VM throughput with DPDK's own driver as the guests'.
    DpdkGuest,
    /// Adaptive waiting.
    Adaptive,
    /// The joined loop on NICs in memory.
    Joined,
    /// AF_XDP on veth.
    Nic,
}

/// How much to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Runs of each load.
    pub runs: usize,
    /// Seconds of each, after a warm-up.
    pub seconds: f64,
    /// A tenth of everything, and one device's start less where that takes long.
    pub quick: bool,
    /// The parts.
    pub parts: Vec<Part>,
    /// `vnic-load`.
    pub generator: PathBuf,
    /// A folder for sockets and logs.
    pub folder: PathBuf,
}

impl Settings {
    /// Seconds before a load is measured.
    fn warm_up(&self) -> f64 {
        (self.seconds / 3.0).max(0.1)
    }

    /// One load on one device: what `vnic-load` says. Fails with [`Disturbed`] if anything else took much of either CPU.
    fn load(&self, command: &str, device: &Device, arguments: &[&str]) -> Result<Value> {
        let mut generator = self.generator(command, device.sockets());
        generator
            .args(["--cpu", &GENERATOR_CPU.to_string()])
            .args(arguments);
        let (began, before) = (Instant::now(), cpu_time(device.id())?);
        let output = run(&mut generator)?;
        let used = cpu_time(device.id())?.saturating_sub(before);
        let report: Value = serde_json::from_str(&output)
            .with_context(|| format!("vnic-load wrote no JSON: {output:.200}"))?;
        let share = report["cpu_share"].as_f64().context("no cpu_share")?;
        undisturbed("the generator", share)?;
        if device.is_busy() {
            undisturbed("the device", used.as_secs_f64() / began.elapsed().as_secs_f64())?;
        }
        Ok(report)
    }

    fn generator(&self, command: &str, sockets: &[PathBuf]) -> Command {
        let mut generator = Command::new("timeout");
        generator.args(["--kill-after=5", "60"]).arg(&self.generator);
        generator.args([command, "--json"]);
        for socket in sockets {
            generator.arg("--socket").arg(socket);
        }
        generator
    }

    /// Guests that are connected and do nothing for some seconds.
    fn run_idle(&self, sockets: &[PathBuf], seconds: &str) -> Result<()> {
        run(self.generator("idle", sockets).args(["--seconds", seconds])).map(drop)
    }

    /// A flood; million frames delivered a second, both directions added. Fails if the generator was the bottleneck.
    fn flood(&self, device: &Device, arguments: &[&str]) -> Result<f64> {
        let (warm_up, seconds) = (self.warm_up().to_string(), self.seconds.to_string());
        let mut all = vec!["--warm-up", &warm_up, "--seconds", &seconds];
        all.extend(arguments);
        let report = self.load("flood", device, &all)?;
        let frames = |name: &str| -> f64 {
            let ports = report["ports"].as_array().into_iter().flatten();
            ports.filter_map(|port| port[name].as_f64()).sum()
        };
        let starved = frames("starved") / frames("looks").max(1.0);
        anyhow::ensure!(
            starved < 0.05,
            "the generator was the bottleneck: the device had nothing to do at {:.0} % of all looks",
            starved * 100.0
        );
        Ok(frames("received") / report["seconds"].as_f64().context("no seconds")? / 1e6)
    }
}

/// Something else ran on a CPU that is measured.
#[derive(Debug, thiserror::Error)]
#[error("{who} had {percent:.0} % of its CPU: something else runs there; stop it, or give --runs more")]
struct Disturbed {
    who: &'static str,
    percent: f64,
}

/// The least share of its CPU with which somebody counts as undisturbed.
const SHARE: f64 = 0.93;
/// Times that a disturbed run is repeated.
const REPEATS: usize = 6;

fn undisturbed(who: &'static str, share: f64) -> Result<(), Disturbed> {
    if share < SHARE {
        return Err(Disturbed {
            who,
            percent: share * 100.0,
        });
    }
    Ok(())
}

/// Measures again while the outcome is [`Disturbed`], a few times.
fn patiently<T>(mut measure: impl FnMut() -> Result<T>) -> Result<T> {
    anyhow::ensure!(!interrupted(), "interrupted");
    let mut outcome = measure();
    for _ in 0..REPEATS {
        match &outcome {
            Err(error) if error.is::<Disturbed>() => outcome = measure(),
            _ => break,
        }
    }
    outcome
}

/// Runs `work` on a thread that is bound to a CPU.
fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let bound = scope.spawn(|| {
            bind(cpu)?;
            work()
        });
        match bound.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn microseconds(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6
}

/// Has the thread run on that CPU alone.
fn bind(cpu: usize) -> Result<()> {
    use nix::sched::{CpuSet, sched_setaffinity};
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    Ok(())
}

/// Devices that take turns; one that does not start is missing with its reason.
struct Field {
    devices: Vec<(&'static str, Result<Device>)>,
}

impl Field {
    /// vnicd and its peers between two guests, ready for frames of 9014 bytes if `jumbo`. `kind` names their folders.
    fn of_all(settings: &Settings, kind: &str, jumbo: bool) -> Field {
        let at = |name: &str| folder(settings, &format!("{name}-{kind}"));
        let devices = [
            (OURS, Device::vnicd(&at("vnicd"), Wait::Busy, 2, None, &[])),
            (PEER, Device::testpmd(&at("testpmd"), jumbo)),
            (OVS, Device::ovs(&at("ovs"))),
        ];
        let ready = devices.map(|(name, device)| {
            let device = device.and_then(|mut device| {
                if jumbo {
                    device.take_jumbo_frames()?;
                }
                Ok(device)
            });
            if let Err(error) = &device {
                eprintln!("{name}: {error:#}");
            }
            (name, device)
        });
        Field {
            devices: ready.into(),
        }
    }

    /// Measures one load on each, starting with another one each time, so that none is always first. Also says how far the CPUs were from
    /// each other all the while.
    fn turns<T>(
        &mut self,
        load: &str,
        run: usize,
        mut measure: impl FnMut(&Device) -> Result<T>,
    ) -> (Vec<(&'static str, Result<T>)>, Result<f64>) {
        let count = self.devices.len();
        distance::steadily(|| {
            let turns = (0..count).map(|turn| {
                let (name, device) = &mut self.devices[(turn + run) % count];
                let outcome = match device {
                    Ok(device) => patiently(|| device.while_running(&mut measure)),
                    Err(error) => Err(anyhow::anyhow!("{error:#}")),
                };
                if let Err(error) = &outcome {
                    eprintln!("{load}, {name}: {error:#}");
                }
                (*name, outcome)
            });
            turns.collect()
        })
    }

    /// Puts the figures of one round of [`Field::turns`] into a table.
    fn take_turns(
        &mut self,
        section: &mut Section,
        load: &str,
        run: usize,
        measure: impl FnMut(&Device) -> Result<f64>,
    ) {
        let (outcomes, apart) = self.turns(load, run, measure);
        for (name, outcome) in outcomes {
            section.add(load, name, outcome);
        }
        section.add(load, APART, apart);
    }
}

/// Runs the parts in turn.
///
/// # Errors
/// If a part cannot run at all; a peer that cannot is in the report.
pub fn run_all(settings: &Settings) -> Result<Report> {
    let mut report = Report {
        setting: setting(settings),
        sections: Vec::new(),
    };
    for part in &settings.parts {
        eprintln!("== {part:?}");
        let sections = match part {
            Part::Generator => generator::run(settings)?,
            Part::Vm => vm::throughput(settings)?,
            Part::Latency => vm::latencies(settings)?,
            Part::DpdkGuest => dpdk_guest::throughput(settings)?,
            Part::Adaptive => adaptive::run(settings)?,
            Part::Joined => joined::run(settings)?,
            Part::Nic => nic::run(settings)?,
        };
        // Nothing is written that is only half measured.
        anyhow::ensure!(!interrupted(), "interrupted");
        for section in &sections {
            eprintln!("\n{}", section.markdown());
        }
        report.sections.extend(sections);
    }
    Ok(report)
}

/// What the figures depend on.
fn setting(settings: &Settings) -> Vec<String> {
    let field = |path: &str, name: &str| {
        std::fs::read_to_string(path).ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
    };
    let unknown = || "unknown".to_owned();
    let version = |program: &str, package: &str| {
        let query = ["-W", "-f", "${Version}", package];
        run(Command::new("dpkg-query").args(query)).map_or_else(
            |_| format!("{program}: not installed"),
            |version| format!("{program} {version}"),
        )
    };
    let date = run(Command::new("date").args(["-u", "+%F"])).unwrap_or_else(|_| unknown());
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    vec![
        format!("{}, `vnic-bench {}`", date.trim(), arguments.join(" ")),
        format!(
            "{}, {} CPUs, Linux {}; huge pages: {}",
            field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            std::thread::available_parallelism().map_or(0, usize::from),
            std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| unknown(), |text| text.trim().to_owned()),
            field("/proc/meminfo", "HugePages_Total").unwrap_or_else(unknown),
        ),
        version("DPDK", "libdpdk-dev"),
        format!(
            "the generator on CPU {GENERATOR_CPU}, the device on CPU {}; medians of {} runs of {} s in turn, with the \
             least and the most in brackets; a ratio is the median of the runs' ratios",
            device::DEVICE_CPU,
            settings.runs,
            settings.seconds
        ),
    ]
}

/// A device's folder.
fn folder(settings: &Settings, name: &str) -> PathBuf {
    settings.folder.join(name)
}

/// Reads a counter that an interface has.
fn interface_counter(namespace: &vnic_tests::netns::Netns, interface: &str, name: &str) -> Result<u64> {
    let shown = namespace.ip(&["-json", "-s", "link", "show", "dev", interface])?;
    let links: Value = serde_json::from_str(&shown)?;
    let value = links[0]["stats64"]["rx"][name].as_u64();
    value.with_context(|| format!("{interface} has no counter {name}"))
}

/// CPU time that all threads of a process have had.
fn cpu_time(process: u32) -> Result<Duration> {
    let mut total = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        let first = text.split_whitespace().next().context("an empty schedstat")?;
        total += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_run_is_repeated_and_another_failure_is_not() {
        let mut shares = [0.5, 0.6, 0.99].into_iter();
        let figure = patiently(|| {
            undisturbed("it", shares.next().expect("a third run is the last"))?;
            Ok(7)
        });
        assert_eq!(figure.unwrap(), 7);
        let mut runs = 0;
        let outcome: Result<()> = patiently(|| {
            runs += 1;
            anyhow::bail!("no")
        });
        assert!(outcome.is_err() && runs == 1);
        let mut runs = 0;
        let outcome = patiently(|| {
            runs += 1;
            Ok(undisturbed("it", 0.1)?)
        });
        assert!(outcome.unwrap_err().to_string().contains("10 % of its CPU"));
        assert_eq!(runs, 1 + REPEATS);
    }

    #[test]
    fn this_process_has_had_cpu_time() {
        let before = cpu_time(std::process::id()).unwrap();
        while cpu_time(std::process::id()).unwrap() == before {
            std::hint::spin_loop();
        }
    }
}
