//! Seven entries behind one header, in whole cache lines.
//!
//! Readers take no lock and never wait for one. A removal raises `seq`, so a reader that found a key and sees `seq`
//! unchanged has read one entry and not parts of two; an insertion into a free lane disturbs no reader. Writers
//! (insert, remove) hold the bucket's lock. What frames change (last seen, counters, state) are single words outside
//! of it: the worst that a race with a removal does is to charge one frame to the lane's next entry.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};

use prefetch_index::prefetch_index;

use super::{IdleLimits, Meta};
use crate::Millis;
use crate::key::{KEY_WORDS, KIND_MASK, SessionKey};

/// Entries of a bucket.
pub(super) const LANES: usize = 7;
/// Reads of a bucket that is being rewritten before it counts as a miss; inserting looks again under the lock.
const READ_RETRIES: usize = 8;
/// Turns on a held lock before giving up: a holder needs some hundred cycles unless it was preempted.
pub(super) const LOCK_SPINS: usize = 2000;

/// Words of an entry that hold the key's addresses, VLANs, protocol and ports. The kind is in the state word.
const KEY_ONLY: usize = KEY_WORDS - 1;

#[derive(Default)]
#[repr(C, align(64))]
struct Entry {
    key: [AtomicU64; KEY_ONLY],
    meta: AtomicU64,
    /// `frames:24 bytes:40`, so that a frame costs one atomic addition.
    recent: AtomicU64,
    /// What overflowed from `recent`: `frames / 2^23:32 bytes / 2^39:32`.
    older: AtomicU64,
}

/// State word of a removed entry: its kind is no key's.
const GONE: u64 = KIND_MASK;

const BYTE_BITS: u32 = 40;
const BYTES_CARRY: u64 = 1 << (BYTE_BITS - 1);
const FRAMES_CARRY: u64 = 1 << 23;

#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Bucket {
    seq: AtomicU32,
    /// Entries that belong here first but found no room and went to their other bucket.
    pub(super) overflow: AtomicU16,
    locked: AtomicBool,
    /// Sixteen bits of each entry's hash, 0 for a free lane; four lanes a word.
    signatures: [AtomicU64; 2],
    last_seen: [AtomicU32; LANES],
    /// Each entry's timer, copied from its state so that the expiry scan reads headers only.
    timers: [AtomicU8; LANES],
    entries: [Entry; LANES],
}

/// An entry read as a whole.
#[derive(Clone, Copy)]
pub(super) struct Snapshot {
    pub key: SessionKey,
    pub meta: Meta,
    pub last_seen: Millis,
    pub frames: u64,
    pub bytes: u64,
}

/// Time since `last_seen`; 0 if another worker's clock is ahead of `now`.
pub(crate) fn idle_ms(now: Millis, last_seen: Millis) -> Millis {
    let idle = now.wrapping_sub(last_seen);
    if idle > Millis::MAX / 2 { 0 } else { idle }
}

/// Bit 0, 16, 32 or 48 of the lowest lane whose sixteen bits are `signature`; there may be more above it, some of
/// them wrong. 0 if there is none.
#[inline]
fn lowest_equal_lane(word: u64, signature: u16) -> u64 {
    const LOW: u64 = 0x0001_0001_0001_0001;
    let x = word ^ u64::from(signature).wrapping_mul(LOW);
    // Taking 1 from a zero lane borrows; only lanes above such a one can be wrong about it.
    (x.wrapping_sub(LOW) & !x) >> 15 & LOW
}

/// Lanes of one signature word whose sixteen bits are `signature`, as four bits.
fn equal_lanes(word: u64, signature: u16) -> u8 {
    const LOW: u64 = 0x0001_0001_0001_0001;
    const REST: u64 = 0x7fff_7fff_7fff_7fff;
    let x = word ^ u64::from(signature).wrapping_mul(LOW);
    let zero = !(((x & REST) + REST) | x | REST);
    // Gathers bits 0, 16, 32, 48 into bits 48 to 51.
    let gathered = (zero >> 15).wrapping_mul(1 << 48 | 1 << 33 | 1 << 18 | 1 << 3) >> 48;
    gathered.to_le_bytes()[0] & 0xf
}

/// The numbers of the bits that are set, from the lowest.
#[inline]
pub(super) fn set_bits(mut mask: u32) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let [lowest, ..] = mask.trailing_zeros().to_le_bytes();
        mask &= mask.checked_sub(1)?;
        Some(lowest)
    })
}

/// A lane that may hold a key, and the number of removals from the bucket before that was read.
#[derive(Clone, Copy, Default)]
pub(super) struct Candidate {
    seq: u32,
    pub(super) lane: u8,
}

impl Candidate {
    /// Whether there is no such lane.
    pub(super) fn is_none(self) -> bool {
        usize::from(self.lane) >= LANES
    }
}

impl Bucket {
    /// Whether there are entries that belong here first and are in their other bucket.
    #[inline]
    pub(super) fn has_overflow(&self) -> bool {
        self.overflow.load(Relaxed) != 0
    }

    /// Brings the entry of a candidate into the cache. For none it is the header, the line before the first entry, which is there.
    #[inline]
    pub(super) fn prefetch(&self, candidate: Candidate) {
        let line = (usize::from(candidate.lane) + 1) % (LANES + 1);
        self.prefetch_entry(line.wrapping_sub(1));
    }

    /// Brings the entry of a lane into the cache.
    #[inline]
    pub(super) fn prefetch_entry(&self, lane: usize) {
        prefetch_index(&self.entries, lane);
    }

    /// One of the lanes that carry a signature.
    #[inline]
    pub(super) fn candidate(&self, signature: u16) -> Candidate {
        let seq = self.seq.load(Acquire);
        let [low, high] = &self.signatures;
        let low = lowest_equal_lane(low.load(Acquire), signature);
        // The last lane of the second word is none. Its signature is always 0, and no key's is.
        let high = lowest_equal_lane(high.load(Acquire), signature);
        // Bits 0, 16, 32, 48 are the first word's lanes, 1, 17, 33, 49 the second's, and bit 63 comes out as lane 7, which is
        // none. No branch, as either word is as likely.
        let [found, ..] = (low | high << 1 | 1 << 63).trailing_zeros().to_le_bytes();
        let lane = (found >> 4) + (found & 1) * 4;
        Candidate { seq, lane }
    }

    /// The state of a candidate, if it holds the key and was not removed meanwhile.
    #[inline]
    pub(super) fn confirm(&self, candidate: Candidate, key: &[u64; KEY_WORDS]) -> Option<Meta> {
        let meta = self.entries.get(usize::from(candidate.lane))?.state_if(key)?;
        // As in `find`.
        fence(Acquire);
        (self.seq.load(Relaxed) == candidate.seq).then_some(meta)
    }

    /// Lanes that carry a signature, as a bit set.
    pub(super) fn lanes_with(&self, signature: u16) -> u8 {
        let [low, high] = &self.signatures;
        // Acquire: whoever sees a signature sees the entry that was written before it.
        let lanes =
            equal_lanes(low.load(Acquire), signature) | equal_lanes(high.load(Acquire), signature) << 4;
        lanes & ((1 << LANES) - 1)
    }

    /// Finds a key: its lane and its state.
    pub(super) fn find(&self, key: &[u64; KEY_WORDS], signature: u16) -> Option<(u8, Meta)> {
        for _ in 0..READ_RETRIES {
            let seq = self.seq.load(Acquire);
            let found = set_bits(self.lanes_with(signature).into())
                .find_map(|lane| Some((lane, self.entries[usize::from(lane)].state_if(key)?)));
            // Pairs with the fence in `Locked::publish`: a reader that saw a word of the next entry sees `seq` raised.
            fence(Acquire);
            if self.seq.load(Relaxed) == seq {
                return found;
            }
        }
        None
    }

    /// Reads a lane as a whole; `None` if it is free or keeps changing.
    pub(super) fn snapshot(&self, lane: usize) -> Option<Snapshot> {
        let entry = self.entries.get(lane)?;
        for _ in 0..READ_RETRIES {
            let seq = self.seq.load(Acquire);
            if self.lanes_with(0) >> lane & 1 == 1 {
                return None;
            }
            let snapshot = self.read(lane, entry);
            fence(Acquire);
            if self.seq.load(Relaxed) == seq {
                return Some(snapshot);
            }
        }
        None
    }

    fn read(&self, lane: usize, entry: &Entry) -> Snapshot {
        let meta = Meta::from_word(entry.meta.load(Relaxed));
        let mut words = [0; KEY_WORDS];
        for (word, stored) in words.iter_mut().zip(&entry.key) {
            *word = stored.load(Relaxed);
        }
        words[KEY_ONLY] = meta.kind();
        let (recent, older) = (entry.recent.load(Relaxed), entry.older.load(Relaxed));
        let frames = (older >> 32) * FRAMES_CARRY + (recent >> BYTE_BITS);
        let bytes = (older & 0xffff_ffff).wrapping_mul(BYTES_CARRY) + (recent & ((1 << BYTE_BITS) - 1));
        let last_seen = self.last_seen[lane].load(Relaxed);
        Snapshot {
            key: SessionKey::from_words(words),
            meta,
            last_seen,
            frames,
            bytes,
        }
    }

    /// Charges frames to a lane. `shared`: other threads may do so at the same time.
    #[inline]
    pub(super) fn refresh(&self, lane: usize, now: Millis, frames: u32, bytes: u64, shared: bool) {
        let (Some(last_seen), Some(entry)) = (self.last_seen.get(lane), self.entries.get(lane)) else {
            return;
        };
        // The header is read by every lookup: do not dirty it more than once a millisecond.
        if last_seen.load(Relaxed) != now {
            last_seen.store(now, Relaxed);
        }
        entry.charge(frames, bytes, shared);
    }

    /// A lane's state and the time of its last frame.
    pub(super) fn state(&self, lane: usize) -> Option<(Meta, Millis)> {
        let meta = self.entries.get(lane)?.meta.load(Relaxed);
        Some((Meta::from_word(meta), self.last_seen.get(lane)?.load(Relaxed)))
    }

    /// Replaces a lane's state if it is still `from`; otherwise says what it is, or `None` if the entry is gone.
    pub(super) fn replace_meta(&self, lane: usize, from: Meta, to: Meta) -> Result<(), Option<Meta>> {
        let entry = self.entries.get(lane).ok_or(None)?;
        match entry
            .meta
            .compare_exchange(from.word(), to.word(), Relaxed, Relaxed)
        {
            Ok(_) => {
                self.timers[lane].store(to.progress().timer.number(), Relaxed);
                Ok(())
            }
            Err(found) => Err(Some(Meta::from_word(found)).filter(|found| found.kind() == from.kind())),
        }
    }

    /// Forgets what a lane has counted.
    pub(super) fn clear_counters(&self, lane: usize) {
        if let Some(entry) = self.entries.get(lane) {
            entry.recent.store(0, Relaxed);
            entry.older.store(0, Relaxed);
        }
    }

    /// Lanes whose entries have been idle for longer than their timers allow, as a bit set.
    pub(super) fn expired_lanes(&self, now: Millis, limits: &IdleLimits) -> u8 {
        let used = !self.lanes_with(0) & ((1 << LANES) - 1);
        let mut expired = 0;
        for lane in set_bits(used.into()) {
            let at = usize::from(lane);
            let limit = limits[usize::from(self.timers[at].load(Relaxed) & 0xf)];
            if idle_ms(now, self.last_seen[at].load(Relaxed)) > limit {
                expired |= 1 << lane;
            }
        }
        expired
    }

    /// Takes the writers' lock, looking at it at most `spins` times.
    pub(super) fn lock(&self, spins: usize) -> Option<Locked<'_>> {
        for _ in 0..spins {
            if !self.locked.load(Relaxed) && !self.locked.swap(true, Acquire) {
                return Some(Locked(self));
            }
            std::hint::spin_loop();
        }
        None
    }
}

impl Entry {
    #[inline]
    fn state_if(&self, key: &[u64; KEY_WORDS]) -> Option<Meta> {
        let meta = self.meta.load(Relaxed);
        let mut difference = (meta ^ key[KEY_ONLY]) & KIND_MASK;
        for (stored, word) in self.key.iter().zip(key) {
            difference |= stored.load(Relaxed) ^ word;
        }
        (difference == 0).then_some(Meta::from_word(meta))
    }

    #[inline]
    fn charge(&self, frames: u32, bytes: u64, shared: bool) {
        // One call brings at most a burst, so neither half can pass its carry twice before it is carried over.
        let frames = u64::from(frames).min(FRAMES_CARRY / 2);
        let bytes = bytes.min(BYTES_CARRY / 2);
        let more = frames << BYTE_BITS | bytes;
        let before = if shared {
            self.recent.fetch_add(more, Relaxed)
        } else {
            // An atomic addition costs as much as all the rest of a known frame.
            let before = self.recent.load(Relaxed);
            self.recent.store(before.wrapping_add(more), Relaxed);
            before
        };
        // Only the one addition that passes a mark carries over.
        let passed = before.wrapping_add(more) & !before & (BYTES_CARRY | FRAMES_CARRY << BYTE_BITS);
        if passed != 0 {
            self.carry(passed);
        }
    }

    #[cold]
    fn carry(&self, passed: u64) {
        if passed & BYTES_CARRY != 0 {
            self.recent.fetch_sub(BYTES_CARRY, Relaxed);
            self.older.fetch_add(1, Relaxed);
        }
        if passed & FRAMES_CARRY << BYTE_BITS != 0 {
            self.recent.fetch_sub(FRAMES_CARRY << BYTE_BITS, Relaxed);
            self.older.fetch_add(1 << 32, Relaxed);
        }
    }
}

/// A bucket whose lock is held; released when dropped.
pub(super) struct Locked<'a>(&'a Bucket);

impl Locked<'_> {
    /// The bucket itself.
    pub(super) fn bucket(&self) -> &Bucket {
        self.0
    }

    /// A lane without an entry.
    pub(super) fn free_lane(&self) -> Option<usize> {
        let free = self.0.lanes_with(0);
        (free != 0).then(|| free.trailing_zeros() as usize)
    }

    /// Makes a free lane an entry. What `snapshot` has counted goes along.
    pub(super) fn publish(&self, lane: usize, signature: u16, snapshot: &Snapshot) {
        // The lane's last removal raised `seq` before this fence; see `Bucket::find`.
        fence(Release);
        let entry = &self.0.entries[lane];
        for (stored, word) in entry.key.iter().zip(snapshot.key.words()) {
            stored.store(word, Relaxed);
        }
        entry.meta.store(snapshot.meta.word(), Relaxed);
        entry.recent.store(
            ((snapshot.frames % FRAMES_CARRY) << BYTE_BITS) | (snapshot.bytes % BYTES_CARRY),
            Relaxed,
        );
        entry.older.store(
            ((snapshot.frames / FRAMES_CARRY) << 32) | (snapshot.bytes / BYTES_CARRY),
            Relaxed,
        );
        self.0.last_seen[lane].store(snapshot.last_seen, Relaxed);
        self.0.timers[lane].store(snapshot.meta.progress().timer.number(), Relaxed);
        self.set_signature(lane, signature);
    }

    /// Frees a lane and returns what it held.
    pub(super) fn remove(&self, lane: usize) -> Snapshot {
        let entry = &self.0.entries[lane];
        let mut snapshot = self.0.read(lane, entry);
        // A change of state comes either before this and is in the snapshot, or after it and fails: it is never lost.
        snapshot.meta = Meta::from_word(entry.meta.swap(GONE, Relaxed));
        self.set_signature(lane, 0);
        // Release: whoever sees the new number does not see the old signature.
        self.0.seq.fetch_add(1, Release);
        snapshot
    }

    fn set_signature(&self, lane: usize, signature: u16) {
        let (word, shift) = (&self.0.signatures[lane / 4], lane % 4 * 16);
        // Only the holder of the lock writes signatures, so load and store lose nothing.
        let others = word.load(Relaxed) & !(0xffff << shift);
        word.store(others | u64::from(signature) << shift, Release);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.locked.store(false, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_eight_cache_lines() {
        assert_eq!(
            (size_of::<Bucket>(), size_of::<Entry>(), align_of::<Bucket>()),
            (512, 64, 64)
        );
    }

    proptest::proptest! {
        #[test]
        fn a_candidate_is_a_lane_with_the_signature(
            lanes: [u16; LANES], pick in 0usize..LANES, near in 0u16..3, other: u16,
        ) {
            let bucket = Bucket::default();
            let locked = bucket.lock(1).unwrap();
            lanes.iter().enumerate().for_each(|(lane, &signature)| locked.set_signature(lane, signature));
            drop(locked);
            for signature in [lanes[pick], lanes[pick] ^ near, other].map(|signature| signature.max(1)) {
                let candidate = bucket.candidate(signature);
                proptest::prop_assert_eq!(candidate.is_none(), !lanes.contains(&signature));
                proptest::prop_assert!(candidate.is_none() || lanes[usize::from(candidate.lane)] == signature);
            }
        }

        #[test]
        fn equal_lanes_are_exact(lanes: [u16; 4], pick in 0usize..4, near in 0u16..3) {
            let word = lanes.iter().rev().fold(0u64, |word, &lane| word << 16 | u64::from(lane));
            for signature in [lanes[pick], lanes[pick] ^ near, 0, 1] {
                let expected = (0..4).filter(|&lane| lanes[lane] == signature).fold(0u8, |set, lane| set | 1 << lane);
                proptest::prop_assert_eq!(equal_lanes(word, signature), expected);
            }
        }

        #[test]
        fn counters_are_exact_across_their_carries(steps in proptest::collection::vec(
            (0u32..1 << 22, 0u64..1 << 38, proptest::bool::ANY), 0..64)
        ) {
            let bucket = Bucket::default();
            for &(frames, bytes, shared) in &steps {
                bucket.refresh(3, 1, frames, bytes, shared);
            }
            let read = bucket.read(3, &bucket.entries[3]);
            proptest::prop_assert_eq!(read.frames, steps.iter().map(|step| u64::from(step.0)).sum::<u64>());
            proptest::prop_assert_eq!(read.bytes, steps.iter().map(|step| step.1).sum::<u64>());
        }
    }

    #[test]
    fn a_clock_that_is_behind_does_not_expire() {
        assert_eq!(idle_ms(5, 7), 0);
        assert_eq!(idle_ms(5, u32::MAX - 4), 10);
    }
}
