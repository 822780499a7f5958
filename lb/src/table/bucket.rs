//! What lookups and frames touch of four entries: one cache line.
//!
//! An entry's signature and state are one word, so that a reader sees both or neither: nobody waits, and nothing is read twice. What frames change
//! are single words as well: the worst that a race with a removal does is to charge one frame to the lane's next entry. Writers
//! (insert, remove) hold the bucket's lock. It is in bits that states leave unused, as are the count of entries that had to go to their other
//! bucket and a filter of their signatures, which spares most misses that one.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::meta::{BUCKET_SHIFT, SIGNATURE_SHIFT};
use super::{IdleLimits, Meta};
use crate::Millis;

/// Entries of a bucket.
pub(super) const LANES: usize = 4;
/// Turns on a held lock before giving up: a holder needs some hundred cycles unless it was preempted.
pub(super) const LOCK_SPINS: usize = 2000;

/// The bits of a state word that are the bucket's and no entry's.
const OWN: u64 = 0x3f << BUCKET_SHIFT;
/// One in the count of entries elsewhere, which is in the first lane's word.
const ELSEWHERE_ONE: u64 = 1 << BUCKET_SHIFT;
/// Set in the second lane's word while a writer holds the bucket.
const LOCKED: u64 = 1 << BUCKET_SHIFT;
/// Bits of the filter, which is in the third lane's word.
const FILTER_BITS: u32 = OWN.count_ones();

/// The bit of the filter that stands for a signature.
#[inline]
fn filter_bit(signature: u32) -> u64 {
    1 << (BUCKET_SHIFT + (((signature & 0xffff) * FILTER_BITS) >> 16))
}

const BYTE_BITS: u32 = 22;
const COUNTED: u64 = (1 << 32) - 1;
const SEEN_SHIFT: u32 = 32;
/// What is carried from a lane's counters to its record, half of what they can hold.
pub(super) const FRAMES_UNIT: u64 = 1 << 9;
pub(super) const BYTES_UNIT: u64 = 1 << 21;
const FRAMES_MARK: u64 = FRAMES_UNIT << BYTE_BITS;
const BYTES_MARK: u64 = BYTES_UNIT;

#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Bucket {
    /// Signature and state of each entry, as [`Meta`] has them, and the bucket's own bits. A free lane has the signature 0.
    states: [AtomicU64; LANES],
    /// `last seen:32 frames:10 bytes:22` of each entry, so that a frame costs one store.
    uses: [AtomicU64; LANES],
}

/// How much an entry was used.
#[derive(Clone, Copy, Default)]
pub(super) struct Use {
    pub last_seen: Millis,
    pub frames: u64,
    pub bytes: u64,
}

/// What a lane's counters have no room for, in [`FRAMES_UNIT`] and [`BYTES_UNIT`].
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Carry {
    pub frames: u32,
    pub bytes: u32,
}

/// Time since `last_seen`; 0 if another worker's clock is ahead of `now`.
pub(crate) fn idle_ms(now: Millis, last_seen: Millis) -> Millis {
    let idle = now.wrapping_sub(last_seen);
    if idle > Millis::MAX / 2 { 0 } else { idle }
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

fn is_free(state: u64) -> bool {
    state >> SIGNATURE_SHIFT == 0
}

fn last_seen(used: u64) -> Millis {
    let [a, b, c, d, ..] = used.to_be_bytes();
    Millis::from_be_bytes([a, b, c, d])
}

/// The low 32 bits.
fn low(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl Bucket {
    /// The entry with a signature, and whether it may be in its other bucket if it is not here.
    #[inline]
    pub(super) fn find(&self, signature: u32) -> (Option<(u8, Meta)>, bool) {
        let (mut at, mut found, mut filter) = (0, 0, 0);
        for (lane, state) in (0u8..).zip(&self.states) {
            // Acquire: whoever sees a signature sees the entry's record, which was written before it.
            let state = state.load(Acquire);
            filter = if lane == 2 { state } else { filter };
            // No branch: any lane is as likely.
            let is_it = state >> SIGNATURE_SHIFT == u64::from(signature);
            at = if is_it { lane } else { at };
            found = if is_it { state } else { found };
        }
        // No key has the signature 0, so the state of an entry is never 0.
        let hit = (found != 0).then(|| (at, Meta::from_word(found & !OWN)));
        (hit, filter & filter_bit(signature) != 0)
    }

    /// Counts frames for a lane. `shared`: other threads may do so at the same time. Returns what is to be added to the record.
    #[inline]
    pub(super) fn charge(&self, lane: usize, now: Millis, frames: u32, bytes: u64, shared: bool) -> Carry {
        let Some(used) = self.uses.get(lane) else {
            return Carry::default();
        };
        let frames = u64::from(frames);
        let more = ((frames % FRAMES_UNIT) << BYTE_BITS) | (bytes % BYTES_UNIT);
        let seen = u64::from(now) << SEEN_SHIFT;
        let mut before = used.load(Relaxed);
        // Neither half has as much as its mark, nor gets as much, so neither runs over.
        let mut counted = (before & COUNTED) + more;
        let after = |counted: u64| seen | counted & !(FRAMES_MARK | BYTES_MARK);
        if shared {
            while let Err(found) = used.compare_exchange_weak(before, after(counted), Relaxed, Relaxed) {
                before = found;
                counted = (before & COUNTED) + more;
            }
        } else {
            // An atomic exchange costs as much as all the rest of a known frame.
            used.store(after(counted), Relaxed);
        }
        Carry {
            frames: low(frames / FRAMES_UNIT + (counted >> (BYTE_BITS + FRAMES_UNIT.ilog2()))),
            bytes: low(bytes / BYTES_UNIT + ((counted / BYTES_UNIT) & 1)),
        }
    }

    /// A lane's state and the time of its last frame; `None` if it is free.
    pub(super) fn state(&self, lane: usize) -> Option<(Meta, Millis)> {
        let state = self.states.get(lane)?.load(Acquire);
        let last_seen = last_seen(self.uses.get(lane)?.load(Relaxed));
        (!is_free(state)).then(|| (Meta::from_word(state & !OWN), last_seen))
    }

    /// What a lane has counted since the last carry.
    pub(super) fn used(&self, lane: usize) -> Use {
        let used = self.uses[lane].load(Relaxed);
        Use {
            last_seen: last_seen(used),
            frames: (used & COUNTED) >> BYTE_BITS,
            bytes: used & ((1 << BYTE_BITS) - 1),
        }
    }

    /// Replaces a lane's state if it is still `from`; otherwise says what it is, or `None` if the entry is gone.
    pub(super) fn replace(&self, lane: usize, from: Meta, to: Meta) -> Result<(), Option<Meta>> {
        let state = self.states.get(lane).ok_or(None)?;
        let mut found = state.load(Relaxed);
        loop {
            let entry = Meta::from_word(found & !OWN);
            if entry != from {
                return Err(Some(entry).filter(|entry| entry.signature() == from.signature()));
            }
            match state.compare_exchange_weak(found, to.word() | found & OWN, Relaxed, Relaxed) {
                Ok(_) => return Ok(()),
                // Most likely the bucket's own bits.
                Err(other) => found = other,
            }
        }
    }

    /// Forgets what a lane has counted.
    pub(super) fn clear_counters(&self, lane: usize) {
        if let Some(used) = self.uses.get(lane) {
            used.fetch_and(!COUNTED, Relaxed);
        }
    }

    /// Lanes whose entries have been idle for longer than their timers allow, as a bit set.
    pub(super) fn expired_lanes(&self, now: Millis, limits: &IdleLimits) -> u8 {
        let mut expired = 0;
        for lane in 0..LANES {
            if let Some((meta, last_seen)) = self.state(lane) {
                expired |= u8::from(idle_ms(now, last_seen) > limits[meta.timer_number()]) << lane;
            }
        }
        expired
    }

    /// A lane without an entry.
    pub(super) fn free_lane(&self) -> Option<usize> {
        self.states.iter().position(|state| is_free(state.load(Relaxed)))
    }

    /// Entries that belong here first and are in their other bucket.
    pub(super) fn elsewhere(&self) -> u64 {
        (self.states[0].load(Relaxed) & OWN) / ELSEWHERE_ONE
    }

    /// Whether one more such entry can be counted. No hash spreads so badly that it cannot.
    pub(super) fn may_send_elsewhere(&self) -> bool {
        self.elsewhere() < OWN / ELSEWHERE_ONE
    }

    /// Counts an entry that goes to its other bucket, before it appears there, so that a reader who misses it here looks further. The
    /// caller holds the lock, and [`Bucket::may_send_elsewhere`].
    pub(super) fn sent_elsewhere(&self, signature: u32) {
        self.states[0].fetch_add(ELSEWHERE_ONE, Relaxed);
        self.states[2].fetch_or(filter_bit(signature), Relaxed);
    }

    /// One that was counted is gone or has come here. Returns whether it was the last.
    pub(super) fn not_elsewhere(&self) -> bool {
        self.states[0].fetch_sub(ELSEWHERE_ONE, Relaxed) & OWN == ELSEWHERE_ONE
    }

    /// Empties the filter if nothing is elsewhere. The caller holds the lock, so nothing goes there meanwhile.
    pub(super) fn clear_filter(&self) {
        if self.elsewhere() == 0 {
            self.states[2].fetch_and(!OWN, Relaxed);
        }
    }

    /// Takes the writers' lock, looking at it at most `spins` times.
    pub(super) fn try_lock(&self, spins: usize) -> bool {
        for _ in 0..spins {
            let is_held = self.states[1].load(Relaxed) & LOCKED != 0;
            if !is_held && self.states[1].fetch_or(LOCKED, Acquire) & LOCKED == 0 {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Gives it back.
    pub(super) fn unlock(&self) {
        self.states[1].fetch_and(!LOCKED, Release);
    }

    /// Makes a free lane an entry whose record is written. The caller holds the lock.
    pub(super) fn publish(&self, lane: usize, meta: Meta, used: Use) {
        self.uses[lane].store(
            u64::from(used.last_seen) << SEEN_SHIFT
                | (used.frames % FRAMES_UNIT) << BYTE_BITS
                | (used.bytes % BYTES_UNIT),
            Relaxed,
        );
        // The bucket's own bits in the word are others' to change. Of the entry's bits none is set in a free lane.
        self.states[lane].fetch_or(meta.word(), Release);
    }

    /// Frees a lane and returns its last state: a change comes either before and is in it, or after and fails. The caller holds the lock.
    pub(super) fn free(&self, lane: usize) -> Meta {
        Meta::from_word(self.states[lane].fetch_and(OWN, Relaxed) & !OWN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_a_cache_line() {
        assert_eq!((size_of::<Bucket>(), align_of::<Bucket>()), (64, 64));
    }

    proptest::proptest! {
        #[test]
        fn what_is_found_has_the_signature(lanes: [u32; LANES], pick in 0..LANES, near in 0u32..3, other: u32, away: Option<u32>, held: bool) {
            let bucket = Bucket::default();
            for (lane, &signature) in lanes.iter().enumerate().filter(|(_, signature)| **signature != 0) {
                bucket.publish(lane, Meta::default().with_signature(signature), Use::default());
            }
            proptest::prop_assert!(!held || bucket.try_lock(1));
            if let Some(away) = away {
                bucket.sent_elsewhere(away);
            }
            for signature in [lanes[pick], lanes[pick] ^ near, other].map(|signature| signature.max(1)) {
                let (found, elsewhere) = bucket.find(signature);
                proptest::prop_assert_eq!(found.is_some(), lanes.contains(&signature));
                proptest::prop_assert!(elsewhere || away != Some(signature));
                proptest::prop_assert!(!elsewhere || away.is_some());
                if let Some((lane, meta)) = found {
                    proptest::prop_assert_eq!(lanes[usize::from(lane)], signature);
                    proptest::prop_assert_eq!(meta, Meta::default().with_signature(signature));
                }
            }
        }

        #[test]
        fn counters_are_exact_across_their_carries(steps in proptest::collection::vec(
            (0u32..1 << 20, 0u64..1 << 38, proptest::bool::ANY), 0..64)
        ) {
            let bucket = Bucket::default();
            let (mut frames, mut bytes) = (0, 0);
            for &(more_frames, more_bytes, shared) in &steps {
                let carry = bucket.charge(3, 7, more_frames, more_bytes, shared);
                frames += u64::from(carry.frames) * FRAMES_UNIT;
                bytes += u64::from(carry.bytes) * BYTES_UNIT;
            }
            let used = bucket.used(3);
            proptest::prop_assert_eq!(frames + used.frames, steps.iter().map(|step| u64::from(step.0)).sum::<u64>());
            proptest::prop_assert_eq!(bytes + used.bytes, steps.iter().map(|step| step.1).sum::<u64>());
            proptest::prop_assert_eq!(used.last_seen, if steps.is_empty() { 0 } else { 7 });
        }
    }

    #[test]
    fn a_state_changes_whatever_the_bucket_keeps_beside_it() {
        let bucket = Bucket::default();
        let [before, after] = [1, 2].map(|nic| Meta::default().with_signature(9).with_nic(nic));
        for lane in 0..LANES {
            bucket.publish(lane, before, Use::default());
            assert!(bucket.try_lock(1) && !bucket.try_lock(3));
            bucket.sent_elsewhere(9);
            assert_eq!(bucket.replace(lane, before, after), Ok(()));
            assert_eq!(bucket.replace(lane, before, after), Err(Some(after)));
            bucket.unlock();
            assert!(bucket.find(9).1);
            assert!(bucket.not_elsewhere());
            bucket.clear_filter();
            assert!(!bucket.find(9).1);
            assert_eq!(bucket.free(lane), after);
            assert_eq!(bucket.replace(lane, after, before), Err(None));
            assert_eq!(bucket.states[lane].load(Relaxed), 0);
        }
    }

    #[test]
    fn a_clock_that_is_behind_does_not_expire() {
        assert_eq!(idle_ms(5, 7), 0);
        assert_eq!(idle_ms(5, u32::MAX - 4), 10);
    }
}
