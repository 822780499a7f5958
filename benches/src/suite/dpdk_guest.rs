//! From one guest to another, with DPDK's virtio-user driver in the guests' place: it touches every descriptor, as a busy guest does, and is
//! nearly the bottleneck itself.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vnic_tests::process::{Process, tail, wait_for};

use super::device::{Device, GUEST_MACS, JUMBO_MBUFS};
use super::report::{APART, OURS, OVS, PEER, Section};
use super::{Field, GENERATOR_CPU, Settings};

const LIMIT: Duration = Duration::from_secs(30);
const PROMPT: &str = "testpmd> ";

/// A load: the frames' sizes, and how many bursts of 32 of each circle at each end. No ring can overflow, so none is lost.
type Load = (&'static str, &'static [(u32, u32)]);

const LOADS: [Load; 3] = [
    ("60 B", &[(60, 16)]),
    // As near to 7 : 4 : 1 as whole bursts come.
    ("IMIX", &[(60, 9), (590, 5), (1514, 2)]),
    ("1514 B", &[(1514, 16)]),
];
const JUMBO: [Load; 1] = [("9014 B", &[(9014, 16)])];

/// Floods both ways: frames circle, and as many are under way as the rings hold half.
///
/// # Errors
/// None: what fails is in the table.
pub(super) fn throughput(settings: &Settings) -> Result<Vec<Section>> {
    let mut section = Section::new(
        "VM to VM with DPDK's virtio-user driver as the guests, both ways",
        "Million frames a second that arrive, both directions added; testpmd forwards between its two devices on one CPU.",
        2,
        &[OURS, PEER, OVS, APART],
    );
    for (jumbo, loads) in [(false, &LOADS[..]), (true, &JUMBO[..])] {
        let mut field = Field::of_all(settings, if jumbo { "dpdk-jumbo" } else { "dpdk" }, jumbo);
        for (ring, packed) in [("split", false), ("packed", true)] {
            for (load, bursts) in loads {
                for run in 0..settings.runs {
                    field.take_turns(&mut section, &format!("{ring}, {load}"), run, |device| {
                        flood(settings, device, (packed, jumbo), bursts)
                    });
                }
            }
        }
    }
    Ok(vec![section])
}

/// testpmd at its prompt.
struct Guests {
    process: Process,
    input: std::process::ChildStdin,
}

impl Guests {
    fn output(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.process.log())?).into_owned())
    }

    fn prompts(&mut self, count: usize) -> Result<()> {
        wait_for("testpmd's prompt", LIMIT, Duration::from_millis(5), || {
            self.process.must_run()?;
            Ok((self.output()?.matches(PROMPT).count() >= count).then_some(()))
        })
        .with_context(|| tail(self.process.log(), 5))
    }

    fn command(&mut self, text: &str) -> Result<String> {
        let before = self.output()?;
        writeln!(self.input, "{text}")?;
        self.prompts(before.matches(PROMPT).count() + 1)?;
        Ok(self.output()?[before.len()..].to_owned())
    }

    /// Frames that both devices have received.
    fn received(&mut self) -> Result<u64> {
        let shown = self.command("show port stats all")?;
        let counts = shown.split("RX-packets:").skip(1);
        let counts: Option<Vec<u64>> = counts
            .map(|rest| rest.split_whitespace().next()?.parse().ok())
            .collect();
        let counts = counts.with_context(|| format!("testpmd wrote no counts: {shown}"))?;
        Ok(counts.iter().sum())
    }
}

fn start(folder: &Path, sockets: &[PathBuf], packed: bool, jumbo: bool) -> Result<Guests> {
    let mut command = Command::new("stdbuf");
    command.args(["-oL", "dpdk-testpmd"]);
    command.args(["--lcores", &format!("0@{GENERATOR_CPU},1@{GENERATOR_CPU}")]);
    command.args([
        "--no-pci",
        "--in-memory",
        "--no-telemetry",
        "--single-file-segments",
    ]);
    for (index, (socket, mac)) in sockets.iter().zip(GUEST_MACS).enumerate() {
        let packed = u8::from(packed);
        let device = format!(
            "net_virtio_user{index},path={},mac={mac},queue_size=1024,packed_vq={packed}",
            socket.display()
        );
        command.args(["--vdev", &device]);
    }
    command.args([
        "--",
        "--forward-mode=io",
        "--rxd=1024",
        "--txd=1024",
        // What circles goes on when it is started again with more.
        "--no-flush-rx",
    ]);
    // As many as the rings and the frames under way take, and some; large ones are dear.
    let mbufs = if jumbo { 6144 } else { 16384 };
    command.arg(format!("--total-num-mbufs={mbufs}"));
    if jumbo {
        command.args(JUMBO_MBUFS);
    }
    for (index, mac) in GUEST_MACS.iter().rev().enumerate() {
        command.arg(format!("--eth-peer={index},{mac}"));
    }
    command.arg("-i");
    let log = folder.join("guests.log");
    let _ = std::fs::remove_file(&log);
    let (process, input) = Process::start_with_input("testpmd as guests", command, &log)?;
    let mut guests = Guests { process, input };
    guests.prompts(1)?;
    Ok(guests)
}

fn flood(
    settings: &Settings,
    device: &Device,
    (packed, jumbo): (bool, bool),
    bursts: &[(u32, u32)],
) -> Result<f64> {
    let mut guests = start(&settings.folder, device.sockets(), packed, jumbo)?;
    for (at, (size, count)) in bursts.iter().enumerate() {
        if at > 0 {
            guests.command("stop")?;
        }
        guests.command(&format!("set txpkts {size}"))?;
        guests.command(&format!("start tx_first {count}"))?;
    }
    std::thread::sleep(Duration::from_secs_f64(settings.warm_up()));
    let (began, before) = (Instant::now(), guests.received()?);
    std::thread::sleep(Duration::from_secs_f64(settings.seconds));
    let after = guests.received()?;
    let seconds = began.elapsed().as_secs_f64();
    let frames = u32::try_from(after - before).map_or(f64::from(u32::MAX), f64::from);
    anyhow::ensure!(frames > 0.0, "no frame arrived");
    writeln!(guests.input, "quit")?;
    guests.process.wait(LIMIT)?;
    Ok(frames / seconds / 1e6)
}
