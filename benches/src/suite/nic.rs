//! From a guest to NICs and back, by AF_XDP on veth pairs: the kernel's work is on the device's CPU as well.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vnic_tests::frontend::Pages;
use vnic_tests::netns::Netns;
use vnic_tests::sys::PacketSocket;

use super::device::{Device, GUEST_MACS, Wait};
use super::report::{OURS, PEER, Section};
use super::{GENERATOR_CPU, Settings, folder, interface_counter, microseconds, on_cpu, patiently};
use crate::driver::{DriverRing, SplitRing};
use crate::frames::{MIN_FRAME, Traffic};
use crate::latency::{Latency, LatencyPlan, measure};
use crate::port::{Port, PortPlan};

/// A frame that has not come by then is lost.
const LIMIT: Duration = Duration::from_millis(200);
/// Somebody beyond the NICs.
const STRANGER: [u8; 6] = [0x02, 0, 0, 0, 0x99, 1];

/// NICs `up0`, `up1`, ... of a namespace, and their other ends `far0`, ... in another one.
struct Wires {
    near: Netns,
    far: Netns,
    count: usize,
}

impl Wires {
    fn new(count: usize) -> Result<Wires> {
        let (near, far) = (Netns::create("near")?, Netns::create("far")?);
        for namespace in [&near, &far] {
            // Nothing but what is measured.
            namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        }
        for index in 0..count {
            near.add_veth(&format!("up{index}"), &far, &format!("far{index}"), 1)?;
        }
        Ok(Wires { near, far, count })
    }

    fn nics(&self) -> Vec<String> {
        (0..self.count).map(|index| format!("up{index}")).collect()
    }

    /// Frames that have come out of each.
    fn arrived(&self) -> Result<Vec<u64>> {
        (0..self.count)
            .map(|index| interface_counter(&self.far, &format!("far{index}"), "packets"))
            .collect()
    }
}

/// Throughput and latency.
///
/// # Errors
/// If there are no veth pairs to be had.
pub(super) fn run(settings: &Settings) -> Result<Vec<Section>> {
    let [frames, evenness] = throughput(settings)?;
    Ok(vec![frames, evenness, latencies(settings)?])
}

fn throughput(settings: &Settings) -> Result<[Section; 2]> {
    let mut section = Section::new(
        "VM to NICs by AF_XDP on veth, 60 B, 1024 flows",
        "Million frames a second that come out of the other ends. vnicd balances sessions over two NICs; testpmd forwards to one NIC and \
         balances nothing.",
        3,
        &[OURS, PEER],
    );
    let mut evenness = Section::new(
        "Evenness of the two NICs in the same runs",
        "Frames of the NIC that sent less, as a part of an even share.",
        2,
        &[OURS],
    );
    let (ours, theirs) = (Wires::new(2)?, Wires::new(1)?);
    let at = |name: &str| folder(settings, &format!("{name}-nic"));
    let mut devices = [
        (
            OURS,
            &ours,
            Device::vnicd(&at("vnicd"), Wait::Busy, 1, Some(&ours.near), &ours.nics()),
        ),
        (
            PEER,
            &theirs,
            Device::testpmd_to_nic(&at("testpmd"), &theirs.near, "up0"),
        ),
    ];
    for ring in ["split", "packed"] {
        for run in 0..settings.runs {
            for turn in 0..2 {
                let (name, wires, device) = &mut devices[(turn + run) % 2];
                let outcome = match device {
                    Ok(device) => {
                        patiently(|| device.while_running(|device| flood(settings, device, wires, ring)))
                    }
                    Err(error) => Err(anyhow::anyhow!("{error:#}")),
                };
                if let (Ok((_, even)), true) = (&outcome, *name == OURS) {
                    evenness.add(ring, name, Ok(*even));
                }
                section.add(ring, name, outcome.map(|(rate, _)| rate));
            }
        }
    }
    Ok([section, evenness])
}

/// Million frames a second, and the least NIC's part of an even share.
#[allow(clippy::cast_precision_loss, reason = "a rate is not exact")]
fn flood(settings: &Settings, device: &Device, wires: &Wires, ring: &str) -> Result<(f64, f64)> {
    let seconds = settings.seconds + settings.warm_up();
    std::thread::scope(|scope| {
        let generator = scope.spawn(|| {
            let limit = (seconds + 0.3).to_string();
            let arguments = [
                "--ring",
                ring,
                "--queue",
                "1024",
                "--warm-up",
                "0",
                "--seconds",
                &limit,
            ];
            settings.load("flood", device, &arguments)
        });
        std::thread::sleep(Duration::from_secs_f64(settings.warm_up() + 0.2));
        let (began, before) = (Instant::now(), wires.arrived()?);
        std::thread::sleep(Duration::from_secs_f64(settings.seconds - 0.2));
        let (after, took) = (wires.arrived()?, began.elapsed().as_secs_f64());
        match generator.join() {
            Ok(outcome) => outcome.map(drop)?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let each: Vec<u64> = after.iter().zip(&before).map(|(now, then)| now - then).collect();
        let (sum, least) = (each.iter().sum::<u64>(), each.iter().min().copied().unwrap_or(0));
        if sum == 0 {
            bail!("no frame came out of a NIC");
        }
        Ok((
            sum as f64 / took / 1e6,
            least as f64 * each.len() as f64 / sum as f64,
        ))
    })
}

const PATHS: [&str; 4] = ["kernel alone", "vnicd busy", "vnicd adaptive", PEER];

fn latencies(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "Latency between a guest and what is behind a NIC, veth, 60 B",
        "Microseconds, one frame at a time, from the guest's ring to a packet socket at the other end of the pair, or back; \"kernel \
         alone\" is from packet socket to packet socket over such a pair. Frames follow each other at once, or after 3 ms in which \
         an adaptive worker has gone to sleep.",
        1,
        &PATHS,
    );
    let scale = if settings.quick { 1 } else { 5 };
    let plan = |samples: usize, interval_us| LatencyPlan {
        samples: samples * scale,
        warm_up: 20,
        interval: Duration::from_micros(interval_us),
    };
    let plans = [("", plan(1000, 20)), (", after 3 ms", plan(100, 3000))];
    for run in 0..settings.runs {
        for (turn, path) in PATHS.into_iter().enumerate() {
            let at = folder(settings, &format!("latency-{turn}-{run}"));
            let wires = Wires::new(1)?;
            let vnicd = |wait| Device::vnicd(&at, wait, 1, Some(&wires.near), &wires.nics()).map(Some);
            let device = match path {
                "vnicd busy" => vnicd(Wait::Busy),
                "vnicd adaptive" => vnicd(Wait::Adaptive),
                PEER => Device::testpmd_to_nic(&at, &wires.near, "up0").map(Some),
                _ => Ok(None),
            };
            let outcome = device.and_then(|device| {
                on_cpu(GENERATOR_CPU, || match device {
                    Some(mut device) => device.while_running(|device| through(device, &wires, &plans)),
                    None => alone(&wires, &plans),
                })
            });
            for (at, (pace, _)) in plans.iter().enumerate() {
                for (way, direction) in ["guest to NIC", "NIC to guest"].into_iter().enumerate() {
                    for percentile in ["p50", "p99"] {
                        let figure = outcome
                            .as_ref()
                            .map_err(|error| anyhow::anyhow!("{error:#}"))
                            .map(|ways| at_percentile(&ways[way][at], percentile));
                        section.add(&format!("{direction}{pace}, {percentile}"), path, figure);
                    }
                }
            }
        }
    }
    Ok(section)
}

/// The same trip at each pace.
fn at_each_pace(
    plans: &[(&str, LatencyPlan)],
    mut trip: impl FnMut() -> Result<Option<Duration>>,
) -> Result<Vec<Latency>> {
    plans.iter().map(|(_, plan)| measure(plan, &mut trip)).collect()
}

fn at_percentile(latency: &Latency, percentile: &str) -> f64 {
    microseconds(if percentile == "p50" {
        latency.p50_ns
    } else {
        latency.p99_ns
    })
}

fn traffic(from: [u8; 6], to: [u8; 6]) -> Traffic {
    Traffic {
        from,
        to,
        frames: 1,
        flows: 1,
        first_flow: 0,
        sizes: vec![MIN_FRAME],
    }
}

/// Sends a frame from one socket and waits for it at the other.
fn alone(wires: &Wires, plans: &[(&str, LatencyPlan)]) -> Result<[Vec<Latency>; 2]> {
    let near = wires.near.run(|| Ok(PacketSocket::open("up0")?))?;
    let far = wires.far.run(|| Ok(PacketSocket::open("far0")?))?;
    let frame = traffic(guest_mac(), STRANGER).frame(0);
    let way = |from: &PacketSocket, to: &PacketSocket| {
        at_each_pace(plans, || {
            let start = Instant::now();
            from.send(&frame)?;
            arrival(to, &frame, start)
        })
    };
    Ok([way(&near, &far)?, way(&far, &near)?])
}

fn guest_mac() -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, 1]
}

/// The time until the frame is at a socket.
fn arrival(socket: &PacketSocket, frame: &[u8], start: Instant) -> Result<Option<Duration>> {
    let mut buffer = [0; 2048];
    loop {
        match socket.receive(&mut buffer)? {
            Some(length) if buffer[..length] == *frame => return Ok(Some(start.elapsed())),
            Some(_) => {}
            None if start.elapsed() > LIMIT => return Ok(None),
            None => {}
        }
    }
}

/// A guest with split rings behind the device.
fn through(device: &Device, wires: &Wires, plans: &[(&str, LatencyPlan)]) -> Result<[Vec<Latency>; 2]> {
    let guest = PortPlan {
        packed: false,
        in_order: false,
        queue_size: 256,
        sends: traffic(guest_mac(), STRANGER),
        receives: 1514,
        receive_buffer: None,
        stride: None,
        pages: Pages::HugeIfFree,
    };
    debug_assert_eq!(GUEST_MACS[0], "52:54:00:00:00:01");
    let layout = guest.layout()?;
    let memory = guest.memory(&layout)?;
    let mut port: Port<'_, SplitRing<'_>> = Port::new(&layout, &memory);
    let _link = port.connect(&device.sockets()[0], &guest, &layout, &memory)?;
    let far = wires.far.run(|| Ok(PacketSocket::open("far0")?))?;
    // A device may take a while to see that a guest is there.
    std::thread::sleep(Duration::from_millis(500));
    let frame = guest.sends.frame(0);
    let out = at_each_pace(plans, || {
        port.tx.completed()?;
        if port.tx.outstanding() == port.tx.size() {
            return Ok(None);
        }
        let start = Instant::now();
        port.send(1)?;
        arrival(&far, &frame, start)
    })
    .context("from the guest")?;
    let reply = traffic(STRANGER, guest_mac()).frame(0);
    let mut received = Vec::new();
    let back = at_each_pace(plans, || {
        let start = Instant::now();
        far.send(&reply)?;
        loop {
            let position = port.rx.position();
            let count = port.rx.completed()?;
            let took = start.elapsed();
            if count > 0 {
                let whole = port.read(position, &mut received)?;
                port.repost(count)?;
                // What the host itself may send is not ours.
                if whole && received == reply {
                    return Ok(Some(took));
                }
            }
            if took > LIMIT {
                return Ok(None);
            }
        }
    })
    .context("to the guest")?;
    Ok([out, back])
}
