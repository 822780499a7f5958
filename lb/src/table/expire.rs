//! Forgetting idle entries, a few at a time.

use std::sync::atomic::Ordering::Relaxed;

use super::bucket::{LANES, Locked};
use super::{Meta, SessionTable};
use crate::Millis;

impl SessionTable {
    /// Looks at about `budget` lanes, from where the last call ended, and removes the entries that have been idle for
    /// too long; `on_expired` is told their state. Several workers may call it: they share the work.
    pub fn expire(&self, now: Millis, budget: usize, on_expired: &mut dyn FnMut(Meta)) {
        let count = budget.div_ceil(LANES).min(self.buckets.len());
        let start = self.cursor.fetch_add(count, Relaxed) % self.buckets.len();
        let (before, from) = self.buckets.split_at(start);
        for bucket in from.iter().chain(before).take(count) {
            if bucket.expired_lanes(now) != 0
                && let Some(locked) = bucket.lock(1)
            {
                self.remove_expired(&locked, now, on_expired);
            }
        }
    }

    /// Removes the timed out entries of a bucket.
    pub(super) fn remove_expired(&self, locked: &Locked<'_>, now: Millis, on_expired: &mut dyn FnMut(Meta)) {
        let mut expired = locked.bucket().expired_lanes(now);
        while expired != 0 {
            let lane = expired.trailing_zeros() as usize;
            expired &= expired - 1;
            let entry = locked.remove(lane);
            let home = &self.buckets[self.place(self.hash(&entry.key)).first];
            if !std::ptr::eq(home, locked.bucket()) {
                home.overflow.fetch_sub(1, Relaxed);
            }
            on_expired(entry.meta);
        }
    }
}
