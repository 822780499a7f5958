//! Counters, one padded set a worker, so that workers do not share cache lines.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use crossbeam_utils::CachePadded;

use crate::MAX_NICS;
use crate::nics::NicIndex;
use crate::policy::Loads;
use crate::state::Timer;
use crate::table::Meta;

/// Sets of counters. Workers beyond share them, which is slower but not wrong.
const SETS: usize = 64;

/// What one worker has counted. Sums over all workers mean something; a single gauge may be below zero (wrapped).
#[derive(Default)]
pub(crate) struct Counters {
    pub created: AtomicU64,
    pub expired: AtomicU64,
    pub repinned: AtomicU64,
    pub moved: AtomicU64,
    pub table_full: AtomicU64,
    pub half_open_full: AtomicU64,
    pub one_way_full: AtomicU64,
    pub new_capped: AtomicU64,
    pub fragments_full: AtomicU64,
    pinned: [AtomicU64; MAX_NICS],
    half_open: [AtomicU64; MAX_NICS],
    sent_bytes: [AtomicU64; MAX_NICS],
    sent_frames: [AtomicU64; MAX_NICS],
}

impl Counters {
    /// An entry with this state has come.
    pub(crate) fn enter(&self, meta: Meta) {
        self.count(meta, 1);
    }

    /// An entry with this state has gone.
    pub(crate) fn leave(&self, meta: Meta) {
        self.count(meta, u64::MAX);
    }

    /// An entry's state has changed.
    pub(crate) fn change(&self, from: Meta, to: Meta) {
        if from.nic() != to.nic() || is_half_open(from) != is_half_open(to) {
            self.leave(from);
            self.enter(to);
        }
    }

    fn count(&self, meta: Meta, step: u64) {
        let at = usize::from(meta.nic()) % MAX_NICS;
        if meta.progress().timer == Timer::Fragment {
            return;
        }
        self.pinned[at].fetch_add(step, Relaxed);
        if is_half_open(meta) {
            self.half_open[at].fetch_add(step, Relaxed);
        }
    }

    /// Counts what a burst sent by a NIC.
    pub(crate) fn sent(&self, nic: usize, frames: u64, bytes: u64) {
        self.sent_frames[nic % MAX_NICS].fetch_add(frames, Relaxed);
        self.sent_bytes[nic % MAX_NICS].fetch_add(bytes, Relaxed);
    }
}

fn is_half_open(meta: Meta) -> bool {
    meta.progress().timer == Timer::TcpSyn
}

/// What the workers have sent by one NIC, since start; counted while `adaptive` is in force.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub frames: u64,
    pub bytes: u64,
}

/// All workers' counters.
pub(crate) struct AllCounters {
    sets: Box<[CachePadded<Counters>]>,
    /// Sets that a worker has taken: the others are all zero and not worth reading.
    used: AtomicUsize,
}

impl AllCounters {
    pub(crate) fn new() -> AllCounters {
        AllCounters {
            sets: (0..SETS).map(|_| CachePadded::default()).collect(),
            used: AtomicUsize::new(0),
        }
    }

    pub(crate) fn of(&self, worker: usize) -> &Counters {
        let set = worker % SETS;
        if set >= self.used.load(Relaxed) {
            self.used.fetch_max(set + 1, Relaxed);
        }
        &self.sets[set]
    }

    pub(crate) fn sum(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.sets
            .iter()
            .take(self.used.load(Relaxed))
            .fold(0u64, |sum, set| sum.wrapping_add(counter(set).load(Relaxed)))
    }

    /// Sessions of each NIC now.
    pub(crate) fn loads(&self) -> Loads {
        // Read one after the other, the gauges of a session on the move may sum to -1.
        let gauge = |sum: u64| u64::try_from(sum.cast_signed()).unwrap_or(0);
        Loads {
            sessions: std::array::from_fn(|nic| gauge(self.sum(|set| &set.pinned[nic]))),
            half_open: std::array::from_fn(|nic| gauge(self.sum(|set| &set.half_open[nic]))),
        }
    }

    /// Sessions pinned to one NIC now.
    pub(crate) fn sessions(&self, nic: NicIndex) -> u64 {
        self.loads().sessions.get(usize::from(nic)).copied().unwrap_or(0)
    }

    /// What was sent by each NIC.
    pub(crate) fn sent(&self) -> [Sent; MAX_NICS] {
        std::array::from_fn(|nic| Sent {
            frames: self.sum(|set| &set.sent_frames[nic]),
            bytes: self.sum(|set| &set.sent_bytes[nic]),
        })
    }
}
