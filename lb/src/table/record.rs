//! What lookups do not need to know of four entries: their keys, when they began, and what their counters had no room for.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};

use prefetch_index::prefetch_index;

use super::Meta;
use super::bucket::{BYTES_UNIT, Bucket, Carry, FRAMES_UNIT, LANES, Use};
use crate::Millis;
use crate::key::{KEY_WORDS, KIND_MASK, SessionKey};

/// Reads of an entry while entries go before it counts as none.
const READ_RETRIES: usize = 8;

/// Words of a key beside the last, its kind.
const KEY_ONLY: usize = KEY_WORDS - 1;
const KIND_BITS: usize = KIND_MASK.trailing_ones() as usize;

/// The records of a bucket's entries.
#[derive(Default)]
#[repr(C)]
pub(super) struct Records {
    keys: [[AtomicU64; KEY_ONLY]; LANES],
    /// What was carried from the counters: `frames / 2^9:32 bytes / 2^21:32`.
    carried: [AtomicU64; LANES],
    created: [AtomicU32; LANES],
    /// Removals so far: whoever reads an entry and sees no other number before and after has read one entry and not parts of two.
    removals: AtomicU32,
    /// The last word of each key, which has [`KIND_BITS`].
    kinds: AtomicU16,
}

/// An entry read as a whole.
#[derive(Clone, Copy)]
pub(super) struct Snapshot {
    pub key: SessionKey,
    pub meta: Meta,
    pub created: Millis,
    pub used: Use,
}

fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_be_bytes();
    [u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])]
}

fn word([high, low]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

impl Records {
    /// Brings the record of a lane into the cache.
    pub(super) fn prefetch(&self, lane: usize) {
        prefetch_index(&self.keys, lane);
        prefetch_index(&self.carried, lane);
    }

    #[cold]
    pub(super) fn carry(&self, lane: usize, carry: Carry) {
        let Some(carried) = self.carried.get(lane) else {
            return;
        };
        // A counter that has come round leaves the other one alone.
        let _always_some = carried.fetch_update(Relaxed, Relaxed, |before| {
            let [frames, bytes] = halves(before);
            Some(word([
                frames.wrapping_add(carry.frames),
                bytes.wrapping_add(carry.bytes),
            ]))
        });
    }

    /// A lane's session begins anew.
    pub(super) fn restart(&self, lane: usize, now: Millis) {
        if let (Some(carried), Some(created)) = (self.carried.get(lane), self.created.get(lane)) {
            carried.store(0, Relaxed);
            created.store(now, Relaxed);
        }
    }

    /// Where a lane's kind is.
    const fn kind_shift(lane: usize) -> usize {
        lane * KIND_BITS
    }

    fn write(&self, lane: usize, snapshot: &Snapshot) {
        let words = snapshot.key.words();
        for (stored, word) in self.keys[lane].iter().zip(words) {
            stored.store(word, Relaxed);
        }
        // Only the holder of the bucket's lock writes this, so load and store lose nothing.
        let others = u64::from(self.kinds.load(Relaxed)) & !(KIND_MASK << Self::kind_shift(lane));
        let [.., high, low] = (others | words[KEY_ONLY] << Self::kind_shift(lane)).to_be_bytes();
        self.kinds.store(u16::from_be_bytes([high, low]), Relaxed);
        let units = |count: u64, unit| halves(count / unit)[1];
        let Use { frames, bytes, .. } = snapshot.used;
        self.carried[lane].store(
            word([units(frames, FRAMES_UNIT), units(bytes, BYTES_UNIT)]),
            Relaxed,
        );
        self.created[lane].store(snapshot.created, Relaxed);
    }

    fn key(&self, lane: usize) -> SessionKey {
        let mut words = [0; KEY_WORDS];
        for (word, stored) in words.iter_mut().zip(&self.keys[lane]) {
            *word = stored.load(Relaxed);
        }
        words[KEY_ONLY] = u64::from(self.kinds.load(Relaxed)) >> Self::kind_shift(lane) & KIND_MASK;
        SessionKey::from_words(words)
    }
}

/// A bucket with its records.
#[derive(Clone, Copy)]
pub(super) struct Whole<'a> {
    pub bucket: &'a Bucket,
    pub records: &'a Records,
}

impl<'a> Whole<'a> {
    /// Reads a lane as a whole; `None` if it is free or keeps changing.
    pub(super) fn snapshot(self, lane: usize) -> Option<Snapshot> {
        for _ in 0..READ_RETRIES {
            let removals = self.records.removals.load(Acquire);
            let (meta, _) = self.bucket.state(lane)?;
            let snapshot = self.read(lane, meta);
            // Pairs with the fence in `Locked::publish`: a reader that saw a word of the next entry sees the removal before it.
            fence(Acquire);
            if self.records.removals.load(Relaxed) == removals {
                return Some(snapshot);
            }
        }
        None
    }

    fn read(self, lane: usize, meta: Meta) -> Snapshot {
        let mut used = self.bucket.used(lane);
        let [frames, bytes] = halves(self.records.carried[lane].load(Relaxed));
        used.frames += u64::from(frames) * FRAMES_UNIT;
        used.bytes += u64::from(bytes) * BYTES_UNIT;
        Snapshot {
            key: self.records.key(lane),
            meta,
            created: self.records.created[lane].load(Relaxed),
            used,
        }
    }

    /// Takes the writers' lock, looking at it at most `spins` times.
    pub(super) fn lock(self, spins: usize) -> Option<Locked<'a>> {
        // Not `then_some`: a guard that is made in vain would be dropped, and give back another's lock.
        self.bucket.try_lock(spins).then(|| Locked(self))
    }
}

/// A bucket whose lock is held; released when dropped.
pub(super) struct Locked<'a>(Whole<'a>);

impl<'a> Locked<'a> {
    /// What is locked.
    pub(super) fn whole(&self) -> Whole<'a> {
        self.0
    }

    /// The bucket itself.
    pub(super) fn bucket(&self) -> &'a Bucket {
        self.0.bucket
    }

    /// One of its entries that was elsewhere is here now, or gone.
    pub(super) fn not_elsewhere(&self) {
        if self.0.bucket.not_elsewhere() {
            self.0.bucket.clear_filter();
        }
    }

    /// Makes a free lane an entry. What `snapshot` has counted goes along.
    pub(super) fn publish(&self, lane: usize, snapshot: &Snapshot) {
        // The lane's last removal was counted before this fence; see `Whole::snapshot`.
        fence(Release);
        self.0.records.write(lane, snapshot);
        self.0.bucket.publish(lane, snapshot.meta, snapshot.used);
    }

    /// Frees a lane and returns what it held.
    pub(super) fn remove(&self, lane: usize) -> Snapshot {
        let meta = self.0.bucket.free(lane);
        let snapshot = self.0.read(lane, meta);
        // Release: whoever sees the new number does not see the old state.
        self.0.records.removals.fetch_add(1, Release);
        snapshot
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.bucket.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::key;

    #[test]
    fn a_lane_takes_54_bytes_beside_its_bucket() {
        assert_eq!(size_of::<Records>(), 54 * LANES);
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_moves_with_what_it_counted() {
        let (bucket, records) = (Bucket::default(), Records::default());
        let whole = Whole {
            bucket: &bucket,
            records: &records,
        };
        let locked = whole.lock(1).unwrap();
        let entry = |lane: u32| Snapshot {
            key: if lane.is_multiple_of(2) {
                key(lane)
            } else {
                key(lane).fragment(crate::key::Direction::AToB, lane)
            },
            meta: Meta::default().with_signature(lane + 1),
            created: 100 + lane,
            used: Use {
                last_seen: 200 + lane,
                frames: 1 << 33 | 5,
                bytes: 1 << 50 | 3,
            },
        };
        for lane in 0..4 {
            locked.publish(lane as usize, &entry(lane));
        }
        assert!(
            whole.lock(1).is_none() && whole.lock(2).is_none(),
            "a failure gives no lock back"
        );
        drop(locked);
        assert!(whole.lock(1).is_some());
        for lane in 0..4 {
            let (read, wrote) = (whole.snapshot(lane as usize).unwrap(), entry(lane));
            assert_eq!(
                (read.key, read.meta, read.created),
                (wrote.key, wrote.meta, wrote.created)
            );
            let Use {
                last_seen,
                frames,
                bytes,
            } = wrote.used;
            assert_eq!(
                (read.used.last_seen, read.used.frames, read.used.bytes),
                (last_seen, frames, bytes)
            );
        }
        records.carry(
            2,
            Carry {
                frames: u32::MAX,
                bytes: 1,
            },
        );
        let used = whole.snapshot(2).unwrap().used;
        assert_eq!(used.bytes, (1 << 50 | 3) + BYTES_UNIT, "frames have come round");
    }
}
