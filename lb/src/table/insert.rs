//! Making entries, and making room for them.

use std::sync::atomic::Ordering::Relaxed;

use super::bucket::{LANES, LOCK_SPINS, Use};
use super::record::{Locked, Snapshot};
use super::{Hit, Meta, SessionTable};
use crate::Millis;
use crate::key::SessionKey;

/// Entries in a chain that move to make room for one. Two are enough below nine tenths and cost at most some hundred
/// hashes in a table that is full.
const MOVES: u32 = 2;

/// What became of an insertion.
#[derive(Debug, Clone, Copy)]
pub enum Insertion {
    /// The entry is new.
    New(Hit),
    /// Another worker, or an earlier frame of the burst, was first.
    Existing(Hit),
    /// Both buckets are full and nothing in them can move, or another writer would not let go of them.
    Full,
}

impl SessionTable {
    /// Makes an entry unless its key has one. `hash` is from the key's lookup. `on_expired` is told the state
    /// of entries that had timed out and were removed to make room.
    pub fn insert(
        &self,
        key: &SessionKey,
        hash: u64,
        meta: Meta,
        now: Millis,
        on_expired: &mut dyn FnMut(Meta),
    ) -> Insertion {
        let place = self.place(hash);
        let meta = meta.with_signature(place.signature);
        let used = Use {
            last_seen: now,
            ..Use::default()
        };
        let entry = Snapshot {
            key: *key,
            meta,
            created: now,
            used,
        };
        // Whoever inserts a key or moves it holds the lock of its first bucket, so what is not there now will not
        // come while we hold it, and the first bucket's filter says whether to look in the second.
        let Some(first) = self.lock(place.first, LOCK_SPINS) else {
            return Insertion::Full;
        };
        if let Some(hit) = self.find_at(place) {
            return Insertion::Existing(hit);
        }
        if let Some(lane) = self.make_room(&first, now, on_expired) {
            first.publish(lane, &entry);
            return Self::inserted(place.first, lane, meta);
        }
        // Bounded: two workers that hold each other's second bucket both give up.
        if first.bucket().may_send_elsewhere()
            && let Some(second) = self.lock(place.second, LOCK_SPINS)
        {
            if let Some(lane) = self.make_room(&second, now, on_expired) {
                first.bucket().sent_elsewhere(place.signature);
                second.publish(lane, &entry);
                return Self::inserted(place.second, lane, meta);
            }
            // A search in vain reads the memory of a hundred buckets, so a full table has one in a millisecond and not one for
            // each frame of a flood.
            let crowded = crowded_mark(now);
            if self.crowded.load(Relaxed) == crowded {
                return Insertion::Full;
            }
            if let Some(lane) = self.displace(&first, place.first, MOVES) {
                first.publish(lane, &entry);
                return Self::inserted(place.first, lane, meta);
            }
            if let Some(lane) = self.displace(&second, place.second, MOVES) {
                first.bucket().sent_elsewhere(place.signature);
                second.publish(lane, &entry);
                return Self::inserted(place.second, lane, meta);
            }
            self.crowded.store(crowded, Relaxed);
        }
        Insertion::Full
    }

    fn inserted(index: usize, lane: usize, meta: Meta) -> Insertion {
        Insertion::New(Self::hit(index, u8::try_from(lane).unwrap_or(0), meta))
    }

    /// A free lane; entries that have timed out make way.
    fn make_room(&self, locked: &Locked<'_>, now: Millis, on_expired: &mut dyn FnMut(Meta)) -> Option<usize> {
        if let Some(lane) = locked.bucket().free_lane() {
            return Some(lane);
        }
        self.remove_expired(locked, now, on_expired);
        locked.bucket().free_lane()
    }

    /// Moves one entry of a full bucket to its other bucket, after at most `moves - 1` others made room for it
    /// there, and returns the freed lane. The original goes before the copy comes, so that a change of state is never
    /// made to the wrong one of two; a reader who misses the entry meanwhile finds it when it inserts, as one of the two
    /// locks held here is that of the entry's first bucket.
    fn displace(&self, full: &Locked<'_>, index: usize, moves: u32) -> Option<usize> {
        for lane in 0..LANES {
            let Some(entry) = full.whole().snapshot(lane) else {
                continue;
            };
            let place = self.place(self.hash(&entry.key));
            let goes_home = place.first != index;
            if !goes_home && !full.bucket().may_send_elsewhere() {
                continue;
            }
            let target = if goes_home { place.first } else { place.second };
            // A bucket that is held already, here or by another worker, is left alone: nobody waits, so nobody deadlocks.
            let Some(other) = self.lock(target, 1) else {
                continue;
            };
            let free = other.bucket().free_lane().or_else(|| {
                (moves > 1)
                    .then(|| self.displace(&other, target, moves - 1))
                    .flatten()
            });
            let Some(free) = free else { continue };
            if !goes_home {
                full.bucket().sent_elsewhere(place.signature);
            }
            other.publish(free, &full.remove(lane));
            if goes_home {
                other.not_elsewhere();
            }
            return Some(lane);
        }
        None
    }
}

/// What a search in vain leaves for the rest of its millisecond; never 0.
pub(super) fn crowded_mark(now: Millis) -> u64 {
    1 << 32 | u64::from(now)
}
