//! The side-by-side runs: the same load on vnicd and on its peers, in turn, each alone on its CPU.

mod adaptive;
mod device;
mod dpdk_guest;
mod joined;
mod nic;
mod ovs;
pub mod report;
mod vm;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;
use vnic_tests::process::run;

use device::Device;
use report::{Report, Section};

/// The CPU of the generator.
pub const GENERATOR_CPU: usize = 0;

/// A part of the suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
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

    /// One load on one device: what `vnic-load` says.
    fn load(&self, command: &str, sockets: &[PathBuf], arguments: &[&str]) -> Result<Value> {
        let mut generator = Command::new("timeout");
        generator.args(["--kill-after=5", "60"]).arg(&self.generator);
        generator.args([command, "--json", "--cpu", &GENERATOR_CPU.to_string()]);
        for socket in sockets {
            generator.arg("--socket").arg(socket);
        }
        let output = run(generator.args(arguments))?;
        serde_json::from_str(&output).with_context(|| format!("vnic-load wrote no JSON: {output:.200}"))
    }

    /// Guests that are connected and do nothing for some seconds.
    fn run_idle(&self, sockets: &[PathBuf], seconds: &str) -> Result<()> {
        let mut generator = Command::new("timeout");
        generator.args(["--kill-after=5", "60"]).arg(&self.generator);
        generator.args(["idle", "--json", "--seconds", seconds]);
        for socket in sockets {
            generator.arg("--socket").arg(socket);
        }
        run(&mut generator).map(drop)
    }

    /// A flood; million frames delivered a second, both directions added. Fails if the generator was the bottleneck.
    fn flood(&self, sockets: &[PathBuf], arguments: &[&str]) -> Result<f64> {
        let (warm_up, seconds) = (self.warm_up().to_string(), self.seconds.to_string());
        let mut all = vec!["--warm-up", &warm_up, "--seconds", &seconds];
        all.extend(arguments);
        let report = self.load("flood", sockets, &all)?;
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

/// Devices that take turns; one that does not start is missing with its reason.
struct Field {
    devices: Vec<(&'static str, Result<Device>)>,
}

impl Field {
    /// Measures one load on each, starting with another one each time, so that none is always first.
    fn take_turns(
        &mut self,
        section: &mut Section,
        load: &str,
        run: usize,
        mut measure: impl FnMut(&Device) -> Result<f64>,
    ) {
        let count = self.devices.len();
        for turn in 0..count {
            let (name, device) = &mut self.devices[(turn + run) % count];
            let outcome = match device {
                Ok(device) => device.while_running(&mut measure),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            };
            if let Err(error) = &outcome {
                eprintln!("{load}, {name}: {error:#}");
            }
            section.add(load, name, outcome);
        }
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
            Part::Vm => vm::throughput(settings)?,
            Part::Latency => vm::latencies(settings)?,
            Part::DpdkGuest => dpdk_guest::throughput(settings)?,
            Part::Adaptive => adaptive::run(settings)?,
            Part::Joined => joined::run(settings)?,
            Part::Nic => nic::run(settings)?,
        };
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
    vec![
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
        let path: &Path = &thread?.path().join("schedstat");
        let text = std::fs::read_to_string(path)?;
        let first = text.split_whitespace().next().context("an empty schedstat")?;
        total += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}
