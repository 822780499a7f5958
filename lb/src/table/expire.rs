//! Forgetting idle entries, a few at a time.
//!
//! A sweep reads the buckets, which hold all that expiry needs, in a round of [`ROUND_MS`]. Each call does
//! what is due since the last one, within bounds: so the cost is that of the table's size and not of how often workers
//! call, and a million entries that expire at once delay no frame for longer than a call takes. What is left stays due.

use std::ops::Range;
use std::sync::TryLockError;
use std::sync::atomic::Ordering::Relaxed;

use prefetch_index::prefetch_index;

use super::bucket::set_bits;
use super::record::Locked;
use super::{Meta, SessionTable, elapsed_ms};
use crate::Millis;

/// Time in which every bucket is looked at once; what an entry may outlive its time by, as long as calls keep up.
pub const ROUND_MS: Millis = 1000;
/// Buckets looked at in one call.
const MAX_BUCKETS: usize = 128;
/// Entries removed by one call, before it stops behind the group that it is at.
const MAX_REMOVALS: usize = 64;
/// Buckets whose memory reads overlap.
const GROUP: usize = 8;
/// Most entries that one call can remove.
#[cfg(test)]
pub(super) const REMOVALS_BOUND: usize = MAX_REMOVALS - 1 + GROUP * super::LANES;

/// How far the sweep has come.
#[derive(Default)]
pub(super) struct Sweep {
    next: usize,
    last: Option<Millis>,
    /// Buckets that are due, times [`ROUND_MS`].
    owed: u64,
}

impl SessionTable {
    /// Removes entries that have been idle for too long, as far as a bounded call gets; `on_expired` is told their state.
    /// Returns whether more is due already. Several workers may call it at any rate: one of them sweeps, and only when
    /// the time has moved on.
    #[inline]
    pub fn expire(&self, now: Millis, on_expired: &mut dyn FnMut(Meta)) -> bool {
        // Most turns of a busy worker are in the same millisecond as the one before.
        self.swept.load(Relaxed) != swept_mark(now) && self.sweep(now, on_expired)
    }

    #[cold]
    fn sweep(&self, now: Millis, on_expired: &mut dyn FnMut(Meta)) -> bool {
        let mut sweep = match self.sweep.try_lock() {
            Ok(sweep) => sweep,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let (buckets, round) = (self.buckets.len() as u64, u64::from(ROUND_MS));
        let elapsed = sweep
            .last
            .map_or(ROUND_MS, |last| elapsed_ms(now, last).min(ROUND_MS));
        if elapsed > 0 {
            sweep.last = Some(now);
        }
        sweep.owed = (sweep.owed + u64::from(elapsed) * buckets).min(round * buckets);
        let (mut looked_at, mut removed) = (0, 0);
        while looked_at < MAX_BUCKETS && removed < MAX_REMOVALS && sweep.owed >= round {
            let due = usize::try_from(sweep.owed / round).unwrap_or(GROUP).min(GROUP);
            let end = (sweep.next + due).min(self.buckets.len());
            let group = sweep.next..end;
            removed += self.expire_group(group.clone(), now, on_expired);
            looked_at += group.len();
            sweep.owed -= group.len() as u64 * round;
            sweep.next = if end == self.buckets.len() { 0 } else { end };
        }
        if sweep.owed >= round {
            return true;
        }
        self.swept.store(swept_mark(now), Relaxed);
        false
    }

    /// Looks at every bucket, whatever is due.
    #[cfg(test)]
    pub(super) fn expire_now(&self, now: Millis, on_expired: &mut dyn FnMut(Meta)) {
        *self.sweep.lock().unwrap() = Sweep::default();
        self.swept.store(0, Relaxed);
        while self.expire(now, on_expired) {}
    }

    /// At most [`GROUP`] buckets.
    fn expire_group(&self, group: Range<usize>, now: Millis, on_expired: &mut dyn FnMut(Meta)) -> usize {
        for index in group.clone() {
            prefetch_index(&self.buckets, index);
        }
        let mut expired = [0u8; GROUP];
        for (lanes, index) in expired.iter_mut().zip(group.clone()) {
            *lanes = self.buckets[index].expired_lanes(now, &self.idle_limits);
            for lane in set_bits((*lanes).into()) {
                self.records[index].prefetch(lane.into());
            }
        }
        let mut removed = 0;
        for (lanes, index) in expired.into_iter().zip(group) {
            if lanes == 0 {
                continue;
            }
            // A writer is at it: next round.
            if let Some(locked) = self.lock(index, 1) {
                removed += self.remove_expired(&locked, now, on_expired);
            }
        }
        removed
    }

    /// Removes the timed out entries of a bucket; returns how many there were.
    pub(super) fn remove_expired(
        &self,
        locked: &Locked<'_>,
        now: Millis,
        on_expired: &mut dyn FnMut(Meta),
    ) -> usize {
        let expired = locked.bucket().expired_lanes(now, &self.idle_limits);
        let removed = expired.count_ones() as usize;
        for lane in set_bits(expired.into()) {
            let entry = locked.remove(lane.into());
            let home = self.scale(self.hash(&entry.key));
            if !std::ptr::eq(&raw const self.buckets[home], locked.bucket())
                && self.buckets[home].not_elsewhere()
            {
                // If another writer is at it, its filter is left as it is: misses look further for nothing.
                if let Some(home) = self.lock(home, 1) {
                    home.bucket().clear_filter();
                }
            }
            on_expired(entry.meta);
        }
        removed
    }
}

/// What [`SessionTable::expire`] leaves when nothing more is due at `now`; never 0.
fn swept_mark(now: Millis) -> u64 {
    1 << 32 | u64::from(now)
}
