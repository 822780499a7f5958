//! A flood in which every frame is checked: its bytes, its header, and its place in its flow. It costs the generator far more than a
//! plain one, so its rate says nothing of the device.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::driver::DriverRing;
use crate::frames::{Checker, Traffic};
use crate::port::Port;

/// Frames offered at a time at most: few, so that bursts of many lengths are met.
const MAX_BURST: u16 = 48;
/// Nothing comes any more.
const QUIET: Duration = Duration::from_millis(200);
/// Nothing ever comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was checked, all ports together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Frames that the device took.
    pub sent: u64,
    /// Frames that it delivered, each as it should be.
    pub verified: u64,
    /// Frames that it lost.
    pub lost: u64,
}

/// One direction.
struct Way {
    from: usize,
    to: usize,
    traffic: Traffic,
    checker: Checker,
    /// For each flow, frames sent so far.
    sequences: Vec<u32>,
    /// The next frame in memory.
    number: u32,
    offered: u64,
}

impl Way {
    fn new(from: usize, to: usize, traffic: Traffic) -> Way {
        Way {
            from,
            to,
            checker: Checker::new(traffic.clone()),
            sequences: vec![0; traffic.flows as usize],
            number: 0,
            offered: 0,
            traffic,
        }
    }

    /// Offers up to `limit` frames, each with the next number of its flow.
    fn send<'m, R: DriverRing<'m>>(&mut self, port: &mut Port<'m, R>, limit: u16) -> Result<()> {
        port.tx.completed()?;
        let count = limit.min(port.tx.size() - port.tx.outstanding());
        for _ in 0..count {
            let sequence = &mut self.sequences[self.traffic.flow(self.number) as usize];
            port.set_sequence(self.number, *sequence);
            *sequence += 1;
            self.number = (self.number + 1) % self.traffic.frames;
        }
        self.offered += u64::from(count);
        if count > 0 { port.send(count) } else { Ok(()) }
    }

    /// Checks what has come; returns how many frames that were.
    fn receive<'m, R: DriverRing<'m>>(&mut self, port: &mut Port<'m, R>, frame: &mut Vec<u8>) -> Result<u64> {
        let first = port.rx.position();
        let count = port.rx.completed()?;
        let mut ours = 0;
        for index in 0..count {
            let position = (usize::from(first) + usize::from(index)) % usize::from(port.rx.size());
            port.read(u16::try_from(position)?, frame)?;
            self.checker
                .check(frame)
                .with_context(|| format!("from port {} to port {}", self.from, self.to))?;
            ours += 1;
        }
        if count > 0 {
            port.repost(count)?;
        }
        Ok(ours)
    }
}

/// Floods for `duration` and until `least` frames have arrived, from the first port or from both of two, and checks everything.
///
/// # Errors
/// The first frame that is not as it should be; what the device did wrong; or that nothing arrived at all.
pub fn verify<'m, R: DriverRing<'m>>(
    ports: &mut [Port<'m, R>],
    traffic: &[Traffic],
    both: bool,
    duration: Duration,
    least: u64,
) -> Result<VerifyReport> {
    ensure!(ports.len() == 2, "frames can be checked between two ports");
    for (port, traffic) in ports.iter().zip(traffic) {
        ensure!(
            traffic.frames >= u32::from(port.tx.size()),
            "{} frames for a ring of {}: a frame would be changed while the device has it",
            traffic.frames,
            port.tx.size()
        );
    }
    let mut ways = vec![
        Way::new(0, 1, traffic[0].clone()),
        Way::new(1, 0, traffic[1].clone()),
    ];
    let mut report = VerifyReport::default();
    let mut frame = Vec::new();
    // A switch learns where the other port is.
    let mut burst = 1;
    let start = Instant::now();
    let mut last = start;
    let mut sending = true;
    while sending || last.elapsed() < QUIET {
        sending = start.elapsed() < duration || (report.verified < least && start.elapsed() < PATIENCE);
        for way in &mut ways {
            let sends = way.from == 0 || both || report.verified == 0;
            if sends && sending {
                burst = burst % MAX_BURST + 1;
                way.send(&mut ports[way.from], burst)?;
            } else {
                ports[way.from].tx.completed()?;
            }
            let count = way.receive(&mut ports[way.to], &mut frame)?;
            if count > 0 {
                last = Instant::now();
            }
            report.verified += count;
        }
    }
    let unsent: u64 = ports.iter().map(|port| u64::from(port.tx.outstanding())).sum();
    report.sent = ways.iter().map(|way| way.offered).sum::<u64>() - unsent;
    ensure!(
        report.verified >= least,
        "{} frames arrived of {} that were sent",
        report.verified,
        report.sent
    );
    ensure!(
        report.verified <= report.sent,
        "{} frames arrived of {} that were sent",
        report.verified,
        report.sent
    );
    report.lost = report.sent - report.verified;
    Ok(report)
}
