//! A vhost-user front-end without a virtual machine: the driver's side of split virtqueues over a memfd. It sends frames whose every
//! byte follows from a number, and checks every byte of the answers.

mod device;
pub mod frames;
mod link;
mod memory;
mod ring;
mod stream;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

pub use device::Device;
use frames::Addresses;
pub use link::{IN_ORDER, Link, MRG_RXBUF, RING_PACKED, RingEvents, RingPlace, VERSION_1};
pub use memory::{Pages, SharedMemory};
pub use stream::stream;

/// How long the front-end waits between looks at its rings when no call comes.
const PATIENCE_MS: i32 = 5;
/// Frames that never come back end the run after this long without any progress.
const STALL: Duration = Duration::from_secs(30);

/// An exchange of frames with an echo behind vnicd.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who speaks to whom.
    pub addresses: Addresses,
    /// Frames to send.
    pub frames: u32,
    /// Frames that may be unanswered at a time.
    pub window: usize,
    /// Queue pairs to use; a flow always uses the same.
    pub pairs: usize,
    /// Sends a frame again that was not answered for this long; without it a lost frame is an error.
    pub resend: Option<Duration>,
}

/// What became of an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Frames that were answered, each byte as it should be.
    pub answered: u32,
    /// Frames that had to be sent again.
    pub resent: u32,
    /// Second answers to a frame that was sent again.
    pub duplicates: u32,
    /// Longest time without any answer, in milliseconds.
    pub longest_gap_ms: u64,
    /// How long it all took, in milliseconds.
    pub took_ms: u64,
    /// Answers that came by each queue pair.
    pub per_pair: Vec<u32>,
}

struct Exchange<'a> {
    plan: &'a Plan,
    device: Device,
    /// When each unanswered frame was last sent.
    waiting: HashMap<u32, Instant>,
    answered: Vec<bool>,
    report: Report,
    last_answer: Instant,
}

/// Connects to vnicd's socket and exchanges frames.
///
/// # Errors
/// A frame that is lost, damaged or not ours; an error of the vhost-user protocol.
pub fn exchange(socket: &Path, plan: &Plan) -> Result<Report> {
    let device = Device::connect(socket, plan.pairs)?;
    let began = Instant::now();
    let mut exchange = Exchange {
        plan,
        device,
        waiting: HashMap::new(),
        answered: vec![false; plan.frames as usize],
        report: Report {
            answered: 0,
            resent: 0,
            duplicates: 0,
            longest_gap_ms: 0,
            took_ms: 0,
            per_pair: vec![0; plan.pairs],
        },
        last_answer: began,
    };
    exchange.run()?;
    exchange.report.took_ms = milliseconds(began.elapsed());
    Ok(exchange.report)
}

impl Exchange<'_> {
    fn run(&mut self) -> Result<()> {
        let mut next = 0;
        while self.report.answered < self.plan.frames {
            let mut moved = self.collect()?;
            while next < self.plan.frames && self.waiting.len() < self.plan.window && self.send(next)? {
                next += 1;
                moved = true;
            }
            self.send_again()?;
            ensure!(
                self.last_answer.elapsed() < STALL,
                "{} frames unanswered, {} answered: nothing for {} s",
                self.waiting.len(),
                self.report.answered,
                STALL.as_secs()
            );
            if !moved {
                self.device.wait(PATIENCE_MS)?;
            }
        }
        Ok(())
    }

    /// Sends a frame, unless its ring is full.
    fn send(&mut self, number: u32) -> Result<bool> {
        let frame = frames::request(self.plan.addresses, number);
        let pair = frames::flow(number) as usize % self.plan.pairs;
        let sent = self.device.send(pair, &frame)?;
        if sent {
            self.waiting.insert(number, Instant::now());
        }
        Ok(sent)
    }

    fn send_again(&mut self) -> Result<()> {
        let Some(patience) = self.plan.resend else {
            return Ok(());
        };
        let late: Vec<u32> = self
            .waiting
            .iter()
            .filter(|(_, sent)| sent.elapsed() >= patience)
            .map(|(number, _)| *number)
            .collect();
        for number in late {
            if self.send(number)? {
                self.report.resent += 1;
            }
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<bool> {
        let mut any = false;
        for pair in 0..self.plan.pairs {
            while let Some(frame) = self.device.receive(pair)? {
                // The host's own chatter (IPv6 neighbour discovery and the like) reaches guests, too.
                let Some(number) = frames::number(&frame) else {
                    continue;
                };
                any = true;
                self.check(pair, number, &frame)?;
            }
        }
        Ok(any)
    }

    fn check(&mut self, pair: usize, number: u32, frame: &[u8]) -> Result<()> {
        ensure!(number < self.plan.frames, "frame {number} was never sent");
        let expected = frames::reply(self.plan.addresses, number);
        ensure!(
            frame == expected,
            "frame {number} is damaged: {} bytes instead of {}, the first difference at {:?}",
            frame.len(),
            expected.len(),
            frame
                .iter()
                .zip(&expected)
                .position(|(got, wanted)| got != wanted)
        );
        let gap = milliseconds(self.last_answer.elapsed());
        self.report.longest_gap_ms = self.report.longest_gap_ms.max(gap);
        self.last_answer = Instant::now();
        self.waiting.remove(&number);
        if std::mem::replace(&mut self.answered[number as usize], true) {
            ensure!(self.plan.resend.is_some(), "frame {number} came twice");
            self.report.duplicates += 1;
        } else {
            self.report.answered += 1;
            self.report.per_pair[pair] += 1;
        }
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
