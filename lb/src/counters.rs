//! Counters, one padded set a worker, so that workers do not share cache lines.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crossbeam_utils::CachePadded;

use crate::MAX_NICS;
use crate::nics::NicIndex;
use crate::policy::NicLoad;

/// Sets of counters. Workers beyond share them, which is slower but not wrong.
const SETS: usize = 64;

/// What one worker has counted. Sums over all workers mean something; a single gauge may be below zero (wrapped).
#[derive(Default)]
pub(crate) struct Counters {
    pub created: AtomicU64,
    pub expired: AtomicU64,
    pub repinned: AtomicU64,
    pub table_full: AtomicU64,
    pinned: [AtomicU64; MAX_NICS],
}

impl Counters {
    /// A session was pinned to a NIC.
    pub(crate) fn pin(&self, nic: NicIndex) {
        if let Some(gauge) = self.pinned.get(usize::from(nic)) {
            gauge.fetch_add(1, Relaxed);
        }
    }

    /// A session left a NIC.
    pub(crate) fn unpin(&self, nic: NicIndex) {
        if let Some(gauge) = self.pinned.get(usize::from(nic)) {
            gauge.fetch_sub(1, Relaxed);
        }
    }
}

/// All workers' counters.
pub(crate) struct AllCounters(Box<[CachePadded<Counters>]>);

impl AllCounters {
    pub(crate) fn new() -> AllCounters {
        AllCounters((0..SETS).map(|_| CachePadded::default()).collect())
    }

    pub(crate) fn of(&self, worker: usize) -> &Counters {
        &self.0[worker % SETS]
    }

    pub(crate) fn sum(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.0
            .iter()
            .fold(0u64, |sum, set| sum.wrapping_add(counter(set).load(Relaxed)))
    }
}

impl NicLoad for AllCounters {
    fn sessions(&self, nic: NicIndex) -> u64 {
        if usize::from(nic) >= MAX_NICS {
            return 0;
        }
        // Read one after the other, the gauges of a session on the move may sum to -1.
        i64::try_from(self.sum(|set| &set.pinned[usize::from(nic)])).map_or(0, i64::unsigned_abs)
    }
}
