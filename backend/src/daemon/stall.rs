//! NICs that say that their link is up and send nothing.

use std::time::{Duration, Instant};

use vnic_dataplane::fabric::Nic;
use vnic_lb::MAX_NICS;
use vnic_lb::health::Input;
use vnic_lb::nics::NicIndex;

use super::Daemon;
use super::health::Command;
use super::nic::Phase;
use crate::host::netlink::ethtool::Ethtool;

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
    /// Pause frames received by the last look at which nothing moved.
    pauses: Option<u64>,
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
    /// Looks at a NIC; what is to be told of it. `pauses` tells how many pause frames it has received, if anybody knows, and is asked only while
    /// nothing moves.
    fn look(
        &mut self,
        index: NicIndex,
        nic: &Nic,
        now: Instant,
        pauses: impl FnOnce() -> Option<u64>,
    ) -> Vec<Input> {
        let seen = &mut self.nics[usize::from(index) % MAX_NICS];
        let count = nic.queues.len().min(QUEUES);
        seen.queues.resize(count, Queue::default());
        let (mut waited, mut errors, mut errno) = (Duration::ZERO, 0, 0);
        for (queue, before) in nic.queues.iter().zip(&mut seen.queues) {
            // Who holds it is working on it.
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
        let pauses = if stalls { pauses() } else { None };
        let before = std::mem::replace(&mut seen.pauses, pauses);
        // Whoever counts them has to be asked twice.
        let paused = pauses.is_some_and(|count| before != Some(count));
        if stalls || seen.told {
            let for_ms = if stalls { waited.as_millis() } else { 0 };
            inputs.push(Input::TxWaiting {
                for_ms: u32::try_from(for_ms).unwrap_or(u32::MAX),
                paused,
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
        for nic in &self.nics {
            let (Phase::Driven, Some(drive)) = (&nic.phase, &nic.drive) else {
                continue;
            };
            let pauses = || Ethtool::open().ok()?.pauses_received(nic.interface.index).ok()?;
            for input in self.stalls.look(nic.index(), &drive.nic, now, pauses) {
                self.health.tell(Command::Input(nic.index(), input));
            }
        }
        Some(self.stalls.next)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vnic_dataplane::fabric::{NicQueue, NicState};
    use vnic_dataplane::memory::frames::{ChunkCache, FrameMemory};
    use vnic_dataplane::nic::NicTx as _;
    use vnic_dataplane::nic::memory::{MemoryPeer, pair};
    use vnic_lb::mac::Mac;

    use super::*;

    /// A NIC with a frame on its ring that the peer does not take.
    fn stuck() -> (Nic, MemoryPeer) {
        let memory = FrameMemory::new(64).unwrap();
        let mut chunks = ChunkCache::new(Arc::clone(&memory));
        let (rx, mut tx, peer) = pair(0, &memory, 4);
        tx.send(&mut vec![chunks.alloc(60).unwrap()].drain(..));
        tx.flush();
        let state = Arc::new(NicState::new(0, "up0".to_owned(), 1, 1500));
        let nic = Nic {
            queues: Box::new([NicQueue::new(Box::new(rx), Box::new(tx))]),
            ..Nic::absent(state, Mac::default())
        };
        (nic, peer)
    }

    /// What looks every 100 ms tell, with what is counted at each.
    fn told(counts: &[Option<u64>]) -> (Vec<(u32, bool)>, usize) {
        let ((nic, _peer), mut watch) = (stuck(), StallWatch::default());
        let (begin, mut asked) = (Instant::now(), 0);
        let mut all = Vec::new();
        for (number, count) in (0..).zip(counts) {
            let now = begin + number * LOOK_EVERY;
            let inputs = watch.look(0, &nic, now, || {
                asked += 1;
                *count
            });
            all.extend(inputs.into_iter().map(|input| match input {
                Input::TxWaiting { for_ms, paused } => (for_ms, paused),
                other => panic!("{other:?}"),
            }));
        }
        (all, asked)
    }

    #[test]
    fn a_nic_that_is_paused_is_told_as_such_while_the_count_grows() {
        let (all, asked) = told(&[Some(1), Some(2), Some(3), Some(4), Some(4), Some(4), Some(9)]);
        assert_eq!(
            all,
            [(200, true), (300, true), (400, false), (500, false), (600, true)]
        );
        assert_eq!(asked, 5, "not before something is suspected");
    }

    #[test]
    fn where_nobody_counts_pauses_a_stall_is_a_stall() {
        let (all, _) = told(&[None; 4]);
        assert_eq!(all, [(200, false), (300, false)]);
    }
}
