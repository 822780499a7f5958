//! NICs that say that their link is up and send nothing.

use std::time::{Duration, Instant};

use vnic_dataplane::fabric::Nic;
use vnic_lb::MAX_NICS;
use vnic_lb::health::Input;
use vnic_lb::nics::NicIndex;

use super::Daemon;
use super::health::Command;
use super::nic::Phase;

/// Time between two looks at what is in flight. A stall is told after two of them, at the earliest.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long frames may be in flight. A zero-copy driver may return completions only when it is reminded, see
/// [`vnic_dataplane::xsk::XskTx`], so this is several times that.
pub(super) const STALL_MS: u32 = 500;

/// Queues of a NIC that are looked at; more would be a NIC of another world.
const QUEUES: usize = 64;

/// What was in flight at the last looks.
pub(super) struct StallWatch {
    next: Instant,
    nics: [Seen; MAX_NICS],
}

#[derive(Debug, Default)]
struct Seen {
    queues: Vec<Queue>,
    /// Hard kick errors of all queues together.
    errors: u64,
    /// A stall was told and is not over.
    told: bool,
}

/// Since when a queue has had frames in flight with none of them coming back.
#[derive(Debug, Default, Clone, Copy)]
struct Queue {
    completed: u64,
    since: Option<Instant>,
}

impl Default for StallWatch {
    fn default() -> StallWatch {
        StallWatch {
            next: Instant::now(),
            nics: Default::default(),
        }
    }
}

impl StallWatch {
    /// Looks at a NIC; what is to be told of it.
    fn look(&mut self, index: NicIndex, nic: &Nic, now: Instant) -> Vec<Input> {
        let seen = &mut self.nics[usize::from(index) % MAX_NICS];
        let count = nic.queues.len().min(QUEUES);
        seen.queues.resize(count, Queue::default());
        let (mut waited, mut errors, mut errno) = (Duration::ZERO, 0, 0);
        for (queue, before) in nic.queues.iter().zip(&mut seen.queues) {
            // Who holds it is working on it. Frames that are handed off meanwhile are looked at by the caller.
            let Some(sender) = queue.tx.try_lock() else {
                continue;
            };
            let (counters, in_flight) = (sender.tx().counters(), sender.tx().in_flight());
            drop(sender);
            if in_flight == 0 || counters.completed != before.completed {
                *before = Queue {
                    completed: counters.completed,
                    since: (in_flight > 0).then_some(now),
                };
            }
            let since = *before.since.get_or_insert(now);
            if in_flight > 0 {
                waited = waited.max(now.duration_since(since));
            }
            errors += counters.hard_errors;
            if counters.hard_errors > 0 {
                errno = counters.hard_errno;
            }
        }
        let mut inputs = Vec::new();
        // Sockets that were opened again count from 0.
        if errors > seen.errors {
            inputs.push(Input::KickFailed { errno });
        }
        seen.errors = errors;
        let stalls = waited >= 2 * LOOK_EVERY;
        if stalls || seen.told {
            let for_ms = if stalls { waited.as_millis() } else { 0 };
            inputs.push(Input::TxWaiting {
                for_ms: u32::try_from(for_ms).unwrap_or(u32::MAX),
                paused: false,
            });
        }
        seen.told = stalls;
        inputs
    }
}

impl Daemon {
    /// Looks for NICs that send nothing, and has the balancer work out its figures; returns when to come back.
    pub(super) fn watch_stalls(&mut self) -> Option<Instant> {
        if self.nics.is_empty() {
            return None;
        }
        let now = Instant::now();
        if now < self.stalls.next {
            return Some(self.stalls.next);
        }
        self.stalls.next = now + LOOK_EVERY;
        match self.stations() {
            Some(stations) => stations.tick(self.engine.now()),
            None => self.balancer.tick(self.engine.now()),
        }
        let mut owed = false;
        for nic in &self.nics {
            let (Phase::Driven, Some(drive)) = (&nic.phase, &nic.drive) else {
                continue;
            };
            for input in self.stalls.look(nic.index(), &drive.nic, now) {
                self.health.tell(Command::Input(nic.index(), input));
            }
            owed |= drive.nic.queues.iter().any(|queue| queue.tx.has_handed_off());
        }
        if owed {
            // A worker may have found a queue held by us.
            self.engine.wake();
        }
        Some(self.stalls.next)
    }
}
