//! `vnic-load`: floods a vhost-user device, or times single frames through it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;
use vnic_benches::driver::{DriverRing, Packed, RingKind, Split};
use vnic_benches::flood::{Flood, FloodPlan};
use vnic_benches::frames::{IMIX, MAX_FRAME, MIN_FRAME, Traffic};
use vnic_benches::latency::{Latency, LatencyPlan, latency};
use vnic_benches::port::{Port, PortPlan};
use vnic_benches::verify::verify;
use vnic_tests::frontend::{Pages, SharedMemory};

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
    /// Floods between two ports and checks each frame's bytes, header and order.
    Verify {
        #[command(flatten)]
        common: Common,
        /// Both ports send.
        #[arg(long)]
        both: bool,
        /// How long, in seconds.
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Times one frame at a time from the first port to the second.
    Latency {
        #[command(flatten)]
        common: Common,
        /// Frames that are timed.
        #[arg(long, default_value_t = 100_000)]
        samples: usize,
        /// Frames before that.
        #[arg(long, default_value_t = 1000)]
        warm_up: usize,
        /// Microseconds from a frame's arrival to the next one.
        #[arg(long, default_value_t = 0)]
        interval: u64,
    },
    /// Connects and does nothing, to have a device that is idle with running rings.
    Idle {
        #[command(flatten)]
        common: Common,
        /// How long, in seconds.
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
    },
}

impl Command {
    fn common(&self) -> &Common {
        match self {
            Command::Flood { common, .. }
            | Command::Verify { common, .. }
            | Command::Latency { common, .. }
            | Command::Idle { common, .. } => common,
        }
    }
}

#[derive(Args)]
struct Common {
    /// The device's socket; with two, frames go from port to port, else to --to.
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
    /// Bytes of each receive buffer; default: a whole frame. Linux guests have about 1.5 to 4 KiB, and a frame takes several then.
    #[arg(long, value_name = "BYTES")]
    receive_buffer: Option<u32>,
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
    #[arg(long, default_value_t = FloodPlan::PAUSES)]
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
        _ => Err(format!(
            "not \"imix\", nor a size from {MIN_FRAME} to {MAX_FRAME}"
        )),
    }
}

fn mac(text: &str) -> Result<Mac, String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| "a MAC address is six bytes such as 52:54:00:00:00:01".to_owned())
}

fn duration(value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value).context("seconds")
}

impl Common {
    fn plans(&self, least_frames: u32) -> Result<Vec<PortPlan>> {
        let ports = self.sockets.len();
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
                to: if ports == 2 { macs[1 - at] } else { self.to },
                frames: self.frames.max(self.flows).max(least_frames),
                flows: self.flows,
                first_flow: 0,
                sizes: self.size.0.clone(),
            };
            PortPlan {
                packed: matches!(self.ring, Kind::Packed),
                in_order: self.in_order && matches!(self.ring, Kind::Split),
                queue_size: self.queue,
                receives: sends.longest(),
                receive_buffer: self.receive_buffer,
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
    let common = options.command.common();
    let mut cpus = CpuSet::new();
    cpus.set(common.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("no CPU {}", common.cpu))?;
    match common.ring {
        Kind::Split => run::<Split>(&options.command),
        Kind::Packed => run::<Packed>(&options.command),
    }
}

fn run<K: RingKind>(command: &Command) -> Result<()> {
    let common = command.common();
    // While frames are checked, one is changed before it is sent again.
    let least_frames = if matches!(command, Command::Verify { .. }) {
        u32::from(common.queue)
    } else {
        1
    };
    let plans = common.plans(least_frames)?;
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
    if !common.json {
        println!(
            "{} ports, features {:#x}, {} of memory in {} pages",
            ports.len(),
            links[0].features(),
            Mebibytes(memories.iter().map(SharedMemory::bytes).sum()),
            if memories.iter().all(SharedMemory::is_huge) {
                "huge"
            } else {
                "ordinary"
            }
        );
    }
    let began = Began::now()?;
    match command {
        Command::Flood { flood, .. } => run_flood(&mut ports, flood, &began, common.json),
        Command::Verify { both, seconds, .. } => {
            let traffic: Vec<_> = plans.into_iter().map(|plan| plan.sends).collect();
            let report = verify(&mut ports, &traffic, *both, duration(*seconds)?, 1)?;
            began.print(common.json, &report, || {
                println!(
                    "{} frames sent, {} arrived as they should, {} lost",
                    report.sent, report.verified, report.lost
                );
            })
        }
        Command::Latency {
            samples,
            warm_up,
            interval,
            ..
        } => {
            let plan = LatencyPlan {
                samples: *samples,
                warm_up: *warm_up,
                interval: Duration::from_micros(*interval),
            };
            let report = latency(&mut ports, &plan)?;
            began.print(common.json, &report, || print_latency(&report))
        }
        Command::Idle { seconds, .. } => {
            std::thread::sleep(duration(*seconds)?);
            Ok(())
        }
    }
}

fn run_flood<'m, R: DriverRing<'m>>(
    ports: &mut [Port<'m, R>],
    options: &FloodOptions,
    began: &Began,
    json: bool,
) -> Result<()> {
    let plan = FloodPlan {
        senders: if options.both { usize::MAX } else { 1 },
        warm_up: duration(options.warm_up)?,
        measured: duration(options.seconds)?,
        pauses: options.pauses,
    };
    let report = Flood::new(ports, plan).run()?;
    began.print(json, &report, || {
        println!(
            "{:.3} M frames/s received, {:.3} M sent, {:.2} s, {} notifications",
            report.received_rate() / 1e6,
            report.sent_rate() / 1e6,
            report.seconds,
            report.kicks,
        );
        for (at, counts) in report.ports.iter().enumerate() {
            println!("port {at}: {counts:?}");
        }
    })
}

fn print_latency(report: &Latency) {
    println!(
        "{} frames, {} lost, ns: min {}, p50 {}, mean of the middle {:.1}, p90 {}, p99 {}, p99.9 {}, max {} (reading the clock: {})",
        report.samples,
        report.lost,
        report.min_ns,
        report.p50_ns,
        report.middle_ns,
        report.p90_ns,
        report.p99_ns,
        report.p999_ns,
        report.max_ns,
        report.clock_ns,
    );
    for (power, count) in report
        .histogram
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
    {
        println!("{:>12} ns and more: {count}", 1u64 << power);
    }
}

/// What is written as JSON: the report, and more.
#[derive(Serialize)]
struct Output<'r, T> {
    /// CPU time of the load, as a part of the time that it took: less than 1 if something else ran on this CPU.
    cpu_share: f64,
    #[serde(flatten)]
    report: &'r T,
}

/// When the load began: by the clock, and in CPU time of this thread.
struct Began(Instant, Duration);

impl Began {
    fn now() -> Result<Began> {
        Ok(Began(Instant::now(), thread_time()?))
    }

    fn print(&self, json: bool, report: &impl Serialize, text: impl FnOnce()) -> Result<()> {
        let cpu_share = (thread_time()? - self.1).as_secs_f64() / self.0.elapsed().as_secs_f64();
        if json {
            println!("{}", serde_json::to_string(&Output { cpu_share, report })?);
        } else {
            println!("{:.0} % of the CPU", cpu_share * 100.0);
            text();
        }
        Ok(())
    }
}

fn thread_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

struct Mebibytes(u64);

impl std::fmt::Display for Mebibytes {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} MiB", self.0.div_ceil(1 << 20))
    }
}
