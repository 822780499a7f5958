//! As many frames as the device takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;
use vnic_dataplane::nic::Window;

use crate::driver::DriverRing;
use crate::port::Port;

/// Frames offered, and room given back, at a time at least: each time costs a store to a line that the device reads.
const BURST: u16 = 64;
/// Looks at all rings between looks at the clock.
const ROUNDS: u32 = 64;

/// What to do for how long.
#[derive(Debug, Clone, Copy)]
pub struct FloodPlan {
    /// How many ports send, from the first on.
    pub senders: usize,
    /// Before anything is counted.
    pub warm_up: Duration,
    /// Counted.
    pub measured: Duration,
    /// Pauses of the CPU after a look at the rings that found less than a burst: a look takes the line away from the device,
    /// which is about to write it.
    pub pauses: u32,
}

impl FloodPlan {
    /// Pauses that suit: more or fewer, from 0 to 64, made no difference of more than 3 % with any device tried.
    pub const PAUSES: u32 = 16;
}

/// What one port saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Frames that the device took.
    pub sent: u64,
    /// Frames that it delivered.
    pub received: u64,
    /// Looks at the sending ring.
    pub looks: u64,
    /// ... at which the device had not yet taken enough for another burst: the device is the bottleneck.
    pub refused: u64,
    /// ... at which the device had taken everything: the generator is.
    pub starved: u64,
    /// Looks at the receiving ring at which the device had no room left.
    pub dry: u64,
}

impl Counts {
    fn since(self, earlier: Counts) -> Counts {
        Counts {
            sent: self.sent - earlier.sent,
            received: self.received - earlier.received,
            looks: self.looks - earlier.looks,
            refused: self.refused - earlier.refused,
            starved: self.starved - earlier.starved,
            dry: self.dry - earlier.dry,
        }
    }
}

/// What a flood came to.
#[derive(Debug, Clone, Serialize)]
pub struct FloodReport {
    /// How long it was measured.
    pub seconds: f64,
    /// For each port.
    pub ports: Vec<Counts>,
    /// Notifications that the device asked for, all in all.
    pub kicks: u64,
}

impl FloodReport {
    /// Frames delivered a second, all ports together.
    #[must_use]
    pub fn received_rate(&self) -> f64 {
        self.rate(|counts| counts.received)
    }

    /// Frames taken a second, all ports together.
    #[must_use]
    pub fn sent_rate(&self) -> f64 {
        self.rate(|counts| counts.sent)
    }

    #[allow(clippy::cast_precision_loss, reason = "a rate is not exact")]
    fn rate(&self, what: impl Fn(&Counts) -> u64) -> f64 {
        self.ports.iter().map(what).sum::<u64>() as f64 / self.seconds
    }
}

/// A flood between ports, or from one of them.
pub struct Flood<'p, 'm, R> {
    ports: &'p mut [Port<'m, R>],
    counts: Vec<Counts>,
    plan: FloodPlan,
    /// Is told how many frames have arrived.
    window: Option<Arc<Window>>,
}

impl<'p, 'm, R: DriverRing<'m>> Flood<'p, 'm, R> {
    /// A flood that has not begun.
    #[must_use]
    pub fn new(ports: &'p mut [Port<'m, R>], plan: FloodPlan) -> Flood<'p, 'm, R> {
        Flood {
            counts: vec![Counts::default(); ports.len()],
            ports,
            plan,
            window: None,
        }
    }

    /// Has frames come from elsewhere, too: as many at a time as the window allows.
    #[must_use]
    pub fn fed_through(self, window: Arc<Window>) -> Flood<'p, 'm, R> {
        Flood {
            window: Some(window),
            ..self
        }
    }

    /// Nobody sends any more.
    pub fn only_receive(&mut self) {
        self.plan.senders = 0;
    }

    /// Floods, and measures.
    ///
    /// # Errors
    /// If the device breaks a rule.
    pub fn run(&mut self) -> Result<FloodReport> {
        self.run_for(self.plan.warm_up, true)?;
        let before = self.counts.clone();
        let seconds = self.run_for(self.plan.measured, false)?;
        Ok(FloodReport {
            seconds,
            ports: self
                .counts
                .iter()
                .zip(before)
                .map(|(now, then)| now.since(then))
                .collect(),
            kicks: self.ports.iter().map(|port| port.kicks).sum(),
        })
    }

    fn run_for(&mut self, duration: Duration, introduce: bool) -> Result<f64> {
        let start = Instant::now();
        loop {
            if introduce {
                self.introduce()?;
            }
            for _ in 0..ROUNDS {
                self.round()?;
            }
            let elapsed = start.elapsed();
            if elapsed >= duration {
                return Ok(elapsed.as_secs_f64());
            }
        }
    }

    /// Goes on until `frames` more were counted by `what`; returns how long it took.
    ///
    /// # Errors
    /// If the device breaks a rule, or does nothing for a minute.
    pub fn run_frames(&mut self, frames: u64, what: fn(&Counts) -> u64) -> Result<Duration> {
        const LIMIT: Duration = Duration::from_secs(60);
        let total = |counts: &[Counts]| counts.iter().map(what).sum::<u64>();
        let goal = total(&self.counts) + frames;
        let start = Instant::now();
        let mut rounds = 0u32;
        while total(&self.counts) < goal {
            self.round()?;
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(1 << 16) {
                ensure!(start.elapsed() < LIMIT, "{frames} frames take more than a minute");
            }
        }
        Ok(start.elapsed())
    }

    /// A port that only receives sends a frame all the same, so that a switch learns where it is.
    fn introduce(&mut self) -> Result<()> {
        for at in self.senders()..self.ports.len() {
            let (port, counts) = (&mut self.ports[at], &mut self.counts[at]);
            counts.sent += u64::from(port.tx.completed()?);
            if port.tx.outstanding() == 0 {
                port.send(1)?;
            }
        }
        Ok(())
    }

    fn senders(&self) -> usize {
        self.plan.senders.min(self.ports.len())
    }

    #[inline]
    fn round(&mut self) -> Result<()> {
        let senders = self.senders();
        let mut busy = false;
        let mut arrived = 0;
        for (at, (port, counts)) in self.ports.iter_mut().zip(&mut self.counts).enumerate() {
            if at < senders {
                busy |= send(port, counts)?;
            }
            let before = counts.received;
            busy |= receive(port, counts)?;
            arrived += counts.received - before;
        }
        if let Some(window) = &self.window {
            window.take(arrived);
        }
        if !busy {
            for _ in 0..self.plan.pauses {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }
}

/// Keeps the sending ring full.
#[inline]
fn send<'m, R: DriverRing<'m>>(port: &mut Port<'m, R>, counts: &mut Counts) -> Result<bool> {
    counts.sent += u64::from(port.tx.completed()?);
    counts.looks += 1;
    let room = port.tx.size() - port.tx.outstanding();
    if room < BURST.min(port.tx.size()) {
        counts.refused += 1;
        return Ok(false);
    }
    counts.starved += u64::from(room == port.tx.size());
    port.send(room)?;
    Ok(true)
}

/// Keeps the receiving ring filled with room.
#[inline]
fn receive<'m, R: DriverRing<'m>>(port: &mut Port<'m, R>, counts: &mut Counts) -> Result<bool> {
    let first = port.rx.position();
    let count = port.rx.completed()?;
    counts.received += u64::from(port.frames_in(first, count)?);
    let room = port.rx.size() - port.rx.outstanding();
    counts.dry += u64::from(room == port.rx.size());
    if room < BURST.min(port.rx.size()) {
        return Ok(false);
    }
    port.repost(room)?;
    Ok(true)
}
