//! NICs that say that their link is up and send nothing.

use std::sync::{Arc, Weak};
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
    /// Whose figures these are: sockets that were opened again, or another NIC with the same index, count from 0.
    nic: Weak<Nic>,
    queues: Vec<Queue>,
    /// A stall was told and is not over.
    told: bool,
    /// Pause frames received by the last look at which nothing moved.
    pauses: Option<u64>,
}

/// What a queue was when it was last looked at.
#[derive(Debug, Default, Clone, Copy)]
struct Queue {
    completed: u64,
    /// Since when it has had frames in flight with none of them coming back.
    since: Option<Instant>,
    /// For how long it had then.
    waited: Duration,
    /// Hard kick errors.
    errors: u64,
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
        nic: &Arc<Nic>,
        now: Instant,
        pauses: impl FnOnce() -> Option<u64>,
    ) -> Vec<Input> {
        let seen = &mut self.nics[usize::from(index) % MAX_NICS];
        if !Weak::ptr_eq(&seen.nic, &Arc::downgrade(nic)) {
            *seen = Seen {
                nic: Arc::downgrade(nic),
                ..Seen::default()
            };
        }
        let count = nic.queues.len().min(QUEUES);
        seen.queues.resize(count, Queue::default());
        let (mut waited, mut errors, mut errno) = (Duration::ZERO, 0, 0);
        for (queue, before) in nic.queues.iter().zip(&mut seen.queues) {
            // Who holds it is working on it, and what was last seen of it stands: it says neither that a stall is over nor that it
            // lasts.
            let Some(sender) = queue.tx.try_lock() else {
                waited = waited.max(before.waited);
                continue;
            };
            let (counters, in_flight) = (sender.tx().counters(), sender.tx().in_flight());
            drop(sender);
            let is_stuck = in_flight > 0 && counters.completed == before.completed;
            let since = before.since.filter(|_| is_stuck).unwrap_or(now);
            if counters.hard_errors > before.errors {
                errors += counters.hard_errors - before.errors;
                errno = counters.hard_errno;
            }
            *before = Queue {
                completed: counters.completed,
                since: (in_flight > 0).then_some(since),
                waited: now.duration_since(since),
                errors: counters.hard_errors,
            };
            waited = waited.max(before.waited);
        }
        let mut inputs = Vec::new();
        if errors > 0 {
            inputs.push(Input::KickFailed {
                errno,
                count: u32::try_from(errors).unwrap_or(u32::MAX),
            });
        }
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
    use std::sync::Mutex;
    use std::vec::Drain;

    use vnic_dataplane::fabric::{NicQueue, NicState};
    use vnic_dataplane::memory::frames::{ChunkCache, Frame, FrameMemory};
    use vnic_dataplane::nic::memory::{MemoryPeer, pair};
    use vnic_dataplane::nic::{NicTx, NicTxCounters};
    use vnic_lb::mac::Mac;

    use super::*;

    /// A NIC with a frame on its ring that the peer does not take.
    fn stuck() -> (Arc<Nic>, MemoryPeer) {
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
        (Arc::new(nic), peer)
    }

    /// The sending half of a queue, with these frames in flight and these counters.
    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<(usize, NicTxCounters)>>);

    impl NicTx for Told {
        fn send(&mut self, _frames: &mut Drain<'_, Frame>) {}

        fn flush(&mut self) {}

        fn reap(&mut self, _chunks: &mut ChunkCache) -> usize {
            0
        }

        fn in_flight(&self) -> usize {
            self.0.lock().unwrap().0
        }

        fn copy_in_flight(&mut self, _chunks: &mut ChunkCache, _out: &mut Vec<Frame>) {}

        fn counters(&self) -> NicTxCounters {
            self.0.lock().unwrap().1
        }
    }

    /// A NIC with two queues, and what they tell.
    fn told_of() -> (Arc<Nic>, [Told; 2]) {
        let memory = FrameMemory::new(64).unwrap();
        let told = [Told::default(), Told::default()];
        let queue = |told: &Told| {
            let (rx, ..) = pair(0, &memory, 4);
            NicQueue::new(Box::new(rx), Box::new(told.clone()))
        };
        let state = Arc::new(NicState::new(0, "up0".to_owned(), 1, 1500));
        let nic = Nic {
            queues: told.iter().map(queue).collect(),
            ..Nic::absent(state, Mac::default())
        };
        (Arc::new(nic), told)
    }

    fn fail(told: &Told, times: u64, errno: i32) {
        let counters = &mut told.0.lock().unwrap().1;
        counters.hard_errors += times;
        counters.hard_errno = errno;
    }

    const fn waiting(for_ms: u32) -> Input {
        let paused = false;
        Input::TxWaiting { for_ms, paused }
    }

    #[test]
    fn failed_kicks_are_told_once_and_counted() {
        let ((nic, told), mut watch) = (told_of(), StallWatch::default());
        let mut look = |nic| watch.look(0, nic, Instant::now(), || None);
        assert_eq!(look(&nic), []);
        fail(&told[0], 5, 100);
        assert_eq!(look(&nic), [Input::KickFailed { errno: 100, count: 5 }]);
        let held = nic.queues[0].tx.try_lock().expect("nobody uses it");
        assert_eq!(look(&nic), []);
        fail(&told[1], 20, 105);
        let of_the_other = Input::KickFailed {
            errno: 105,
            count: 20,
        };
        assert_eq!(look(&nic), [of_the_other]);
        drop(held);
        assert_eq!(look(&nic), [], "nothing new");
        fail(&told[0], 1, 6);
        assert_eq!(look(&nic), [Input::KickFailed { errno: 6, count: 1 }]);
        // Opened again, with as many.
        let (again, told) = told_of();
        fail(&told[0], 6, 100);
        assert_eq!(look(&again), [Input::KickFailed { errno: 100, count: 6 }]);
    }

    #[test]
    fn a_stall_is_not_over_because_somebody_holds_the_queue() {
        let ((nic, told), mut watch) = (told_of(), StallWatch::default());
        let begin = Instant::now();
        let mut look = |number: u32| watch.look(0, &nic, begin + number * LOOK_EVERY, || None);
        told[0].0.lock().unwrap().0 = 1;
        assert_eq!((look(0), look(1)), (vec![], vec![]));
        assert_eq!(look(2), [waiting(200)]);
        let held = nic.queues[0].tx.try_lock().expect("nobody uses it");
        assert_eq!(look(3), [waiting(200)]);
        drop(held);
        assert_eq!(look(4), [waiting(400)]);
        told[0].0.lock().unwrap().1.completed += 1;
        assert_eq!(look(5), [waiting(0)]);
    }

    #[test]
    fn sockets_that_are_opened_again_have_not_stalled_yet() {
        let mut watch = StallWatch::default();
        let begin = Instant::now();
        let mut look = |nic: &_, number: u32| watch.look(0, nic, begin + number * LOOK_EVERY, || None);
        let (before, _peer) = stuck();
        for number in 0..3 {
            look(&before, number);
        }
        let (again, _peer) = stuck();
        assert_eq!((look(&again, 30), look(&again, 31)), (vec![], vec![]));
        assert_eq!(look(&again, 32), [waiting(200)]);
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
