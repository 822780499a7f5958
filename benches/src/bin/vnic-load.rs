//! `vnic-load`: floods a vhost-user device, or times single frames through it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vnic_benches::driver::{Packed, RingKind, Split};
use vnic_benches::flood::{Flood, FloodPlan};
use vnic_benches::frames::{IMIX, MAX_FRAME, MIN_FRAME, Traffic};
use vnic_benches::port::{Port, PortPlan};
use vnic_tests::frontend::Pages;

/// Loads a vhost-user network device as one or two guests would, at next to no cost of its own.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sends as many frames as the device takes, from the first port or from both.
    Flood {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        flood: FloodOptions,
    },
}

#[derive(Args)]
struct Common {
    /// The device's socket; given twice, frames go from port to port, else to --to.
    #[arg(long = "socket", required = true, value_name = "PATH")]
    sockets: Vec<PathBuf>,
    /// Kind of the rings.
    #[arg(long, value_enum, default_value_t = Kind::Split)]
    ring: Kind,
    /// Descriptors of each ring, a power of two.
    #[arg(long, default_value_t = 1024)]
    queue: u16,
    /// Bytes of a frame without its checksum, 60 to 9014, or "imix" (7 of 60, 4 of 590, 1 of 1514).
    #[arg(long, default_value = "60", value_parser = sizes, value_name = "BYTES")]
    size: Sizes,
    /// Flows; frames of a flow have addresses and ports of their own.
    #[arg(long, default_value_t = 1024)]
    flows: u32,
    /// Frames in memory, sent in turn; at least as many as flows.
    #[arg(long, default_value_t = 1)]
    frames: u32,
    /// Bytes from one frame in memory to the next, a multiple of 64; default: as far apart as guests have them.
    #[arg(long)]
    stride: Option<u32>,
    /// Negotiates VIRTIO_F_IN_ORDER (split rings).
    #[arg(long)]
    in_order: bool,
    /// Ordinary pages even if huge ones are free.
    #[arg(long)]
    small_pages: bool,
    /// Address of each port.
    #[arg(long = "mac", value_parser = mac, value_name = "MAC")]
    macs: Vec<Mac>,
    /// With one socket: where frames go.
    #[arg(long, default_value = "02:00:00:00:99:01", value_parser = mac, value_name = "MAC")]
    to: Mac,
    /// Runs on this CPU.
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// Writes JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct FloodOptions {
    /// Both ports send.
    #[arg(long)]
    both: bool,
    /// Seconds before anything is counted.
    #[arg(long, default_value_t = 0.5)]
    warm_up: f64,
    /// Seconds that are counted.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Pauses of the CPU when the device has not done enough for another burst.
    #[arg(long, default_value_t = 4)]
    pauses: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Split,
    Packed,
}

#[derive(Clone)]
struct Sizes(Vec<u32>);

type Mac = [u8; 6];

fn sizes(text: &str) -> Result<Sizes, String> {
    if text == "imix" {
        return Ok(Sizes(IMIX.to_vec()));
    }
    match text.parse() {
        Ok(size) if (MIN_FRAME..=MAX_FRAME).contains(&size) => Ok(Sizes(vec![size])),
        _ => Err(format!("not \"imix\", nor a size from {MIN_FRAME} to {MAX_FRAME}")),
    }
}

fn mac(text: &str) -> Result<Mac, String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| "a MAC address is six bytes such as 52:54:00:00:00:01".to_owned())
}

fn seconds(value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value).context("seconds")
}

impl Common {
    fn plans(&self) -> Result<Vec<PortPlan>> {
        let ports = self.sockets.len();
        ensure!(ports <= 2, "one or two sockets");
        ensure!(self.flows > 0, "at least one flow");
        ensure!(
            self.queue >= 2 && self.queue.is_power_of_two() && self.queue <= 32768,
            "--queue {}: a power of two from 2 to 32768",
            self.queue
        );
        let mut macs = self.macs.clone();
        for last in macs.len()..ports {
            macs.push([0x52, 0x54, 0, 0, 0, u8::try_from(last + 1)?]);
        }
        let plans = (0..ports).map(|at| {
            let sends = Traffic {
                from: macs[at],
                to: if ports == 1 { self.to } else { macs[1 - at] },
                frames: self.frames.max(self.flows),
                flows: self.flows,
                sizes: self.size.0.clone(),
            };
            PortPlan {
                packed: matches!(self.ring, Kind::Packed),
                in_order: self.in_order && matches!(self.ring, Kind::Split),
                queue_size: self.queue,
                receives: sends.longest(),
                sends,
                stride: self.stride,
                pages: if self.small_pages {
                    Pages::Ordinary
                } else {
                    Pages::HugeIfFree
                },
            }
        });
        Ok(plans.collect())
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Command::Flood { common, .. } = &options.command;
    let mut cpus = CpuSet::new();
    cpus.set(common.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("no CPU {}", common.cpu))?;
    match common.ring {
        Kind::Split => run::<Split>(&options.command),
        Kind::Packed => run::<Packed>(&options.command),
    }
}

fn run<K: RingKind>(command: &Command) -> Result<()> {
    let Command::Flood { common, flood } = command;
    let plans = common.plans()?;
    let layouts: Vec<_> = plans.iter().map(PortPlan::layout).collect::<Result<_>>()?;
    let mut memories = Vec::new();
    for (plan, layout) in plans.iter().zip(&layouts) {
        memories.push(plan.memory(layout)?);
    }
    let mut ports: Vec<Port<'_, K::Ring<'_>>> = Vec::new();
    let mut links = Vec::new();
    for (at, socket) in common.sockets.iter().enumerate() {
        let mut port = Port::new(&layouts[at], &memories[at]);
        links.push(port.connect(socket, &plans[at], &layouts[at], &memories[at])?);
        ports.push(port);
    }
    let plan = FloodPlan {
        both: flood.both,
        warm_up: seconds(flood.warm_up)?,
        measured: seconds(flood.seconds)?,
        pauses: flood.pauses,
    };
    let report = Flood::new(&mut ports, plan).run()?;
    if common.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!(
        "{:.3} M frames/s received, {:.3} M sent, {:.2} s, {} notifications, features {:#x}, {} pages",
        report.received_rate() / 1e6,
        report.sent_rate() / 1e6,
        report.seconds,
        report.kicks,
        links[0].features(),
        if memories[0].is_huge() { "huge" } else { "ordinary" }
    );
    for (at, counts) in report.ports.iter().enumerate() {
        println!("port {at}: {counts:?}");
    }
    Ok(())
}
