//! The shared session table: fixed memory, one entry for both directions, readers that never wait.
//!
//! A key has two buckets of four entries. It goes into the first unless that is full, so nearly every lookup reads one cache
//! line, which is all that a known session's frame needs (module `bucket`); the keys are elsewhere (module `record`). Full buckets make room
//! by moving an entry to its other bucket, which fills the table to nine tenths. Every probe is bounded.
//!
//! A session is known by its buckets and 32 more bits of a keyed hash, not by its key: one that is new is taken for another with a
//! probability of one in 500 million (eight lanes, 2^-32), and then shares its NIC and its state. Nobody can aim at that without the hash's seed.

mod bucket;
mod expire;
mod insert;
mod meta;
mod record;
mod search;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use rapidhash::v3::{RapidSecrets, rapidhash_v3_micro_inline};

pub(crate) use self::bucket::idle_ms as elapsed_ms;
use self::bucket::{Bucket, Carry, LANES};
pub use self::expire::ROUND_MS;
use self::expire::Sweep;
pub use self::insert::Insertion;
pub use self::meta::Meta;
use self::record::{Locked, Records, Snapshot, Whole};
pub use self::search::Search;
use crate::Millis;
use crate::key::SessionKey;
use crate::limits::Timeouts;
use crate::state::Timer;

/// Searches that are finished at once: a bit of a word each. More than a core has outstanding reads gain nothing.
pub const BATCH: usize = 32;

/// Entries per hundred lanes that the table is sized for. Beyond nine tenths insertions begin to fail now and then.
const FILL_PERCENT: usize = 87;

/// Where an entry was found, and its state then. It stays usable after the entry is gone: see the module `bucket`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hit {
    bucket: u32,
    lane: u8,
    /// State at the time of the lookup.
    pub meta: Meta,
}

impl Hit {
    /// The entry's place as a number, for [`SessionTable::at`].
    pub(crate) fn place(&self) -> u64 {
        u64::from(self.bucket) << 3 | u64::from(self.lane)
    }
}

/// What a lookup found.
#[derive(Debug, Clone, Copy)]
pub struct Lookup {
    /// The key's hash, which an insertion needs again.
    pub hash: u64,
    /// The entry, if there is one.
    pub hit: Option<Hit>,
}

impl Lookup {
    /// The result before there is one.
    pub const NONE: Lookup = Lookup { hash: 0, hit: None };
}

/// One session of the table.
#[derive(Debug, Clone, Copy)]
pub struct Listed {
    /// The key.
    pub key: SessionKey,
    /// Pin and state.
    pub meta: Meta,
    /// When it began.
    pub created: Millis,
    /// When its last frame came.
    pub last_seen: Millis,
    /// Frames in both directions.
    pub frames: u64,
    /// Bytes in both directions.
    pub bytes: u64,
}

/// The table. All methods take `&self` and may be called from any thread.
pub struct SessionTable {
    buckets: Box<[Bucket]>,
    /// As many.
    records: Box<[Records]>,
    secrets: RapidSecrets,
    idle_limits: IdleLimits,
    sweep: Mutex<Sweep>,
    /// The millisecond up to which entries have been expired: see `expire`.
    swept: AtomicU64,
    /// The millisecond of the last search for room that found none: see `insert`.
    crowded: AtomicU64,
    /// Whether several threads charge frames.
    shared: bool,
}

/// Idle time that an entry is allowed, by the number of its timer.
type IdleLimits = [Millis; 16];

fn idle_limits(timeouts: &Timeouts) -> IdleLimits {
    let mut limits = [timeouts.of(Timer::Other); 16];
    for timer in Timer::all() {
        limits[usize::from(timer.number() & 0xf)] = timeouts.of(timer);
    }
    limits
}

/// A key's two buckets and its signature.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    second: usize,
    signature: u32,
}

/// What an entry's bucket keeps of its hash; 0 is for free lanes.
#[inline]
fn signature(hash: u64) -> u32 {
    let [.., a, b, c, d] = hash.to_be_bytes();
    u32::from_be_bytes([a, b, c, d]).max(1)
}

impl SessionTable {
    /// Allocates a table for `capacity` entries that `workers` threads charge frames to. The hash's seed is new each time, so
    /// nobody can aim at a bucket.
    #[must_use]
    pub fn new(capacity: usize, workers: usize, timeouts: &Timeouts) -> SessionTable {
        let lanes = capacity.saturating_mul(100) / FILL_PERCENT;
        let buckets = lanes.div_ceil(LANES).clamp(2, u32::MAX as usize);
        SessionTable {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            records: (0..buckets).map(|_| Records::default()).collect(),
            secrets: RapidSecrets::seed(RandomState::new().hash_one(0u8)),
            idle_limits: idle_limits(timeouts),
            sweep: Mutex::default(),
            swept: AtomicU64::new(0),
            crowded: AtomicU64::new(0),
            shared: workers > 1,
        }
    }

    /// Entries that there is memory for.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.buckets.len() * LANES
    }

    /// Bytes that the table occupies.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.buckets) + size_of_val(&*self.records)
    }

    /// The addresses that the table occupies, for whoever can put them on huge pages: the table is far larger than what a
    /// processor translates with small ones at hand.
    #[must_use]
    pub fn addresses(&self) -> [Range<usize>; 2] {
        let (buckets, records) = (self.buckets.as_ptr_range(), self.records.as_ptr_range());
        [
            buckets.start.addr()..buckets.end.addr(),
            records.start.addr()..records.end.addr(),
        ]
    }

    #[inline]
    fn hash(&self, key: &SessionKey) -> u64 {
        rapidhash_v3_micro_inline::<true, false>(&key.bytes(), &self.secrets)
    }

    /// The first bucket of a hash.
    #[inline]
    fn scale(&self, hash: u64) -> usize {
        // Multiply-shift: the upper half of a 32-bit fraction times the number of buckets is below that number.
        let scaled = (hash >> 32).wrapping_mul(self.buckets.len() as u64) >> 32;
        usize::try_from(scaled).unwrap_or(0)
    }

    fn place(&self, hash: u64) -> Place {
        let first = self.scale(hash);
        let mut second = self.scale(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if second == first {
            second = if first + 1 == self.buckets.len() {
                0
            } else {
                first + 1
            };
        }
        Place {
            first,
            second,
            signature: signature(hash),
        }
    }

    /// Whether two hits are of one entry.
    #[must_use]
    #[inline]
    pub fn same_entry(one: &Hit, other: &Hit) -> bool {
        (one.bucket, one.lane) == (other.bucket, other.lane)
    }

    #[inline]
    fn hit(index: usize, lane: u8, meta: Meta) -> Hit {
        // There are no more than u32::MAX buckets.
        Hit {
            bucket: u32::try_from(index).unwrap_or(0),
            lane,
            meta,
        }
    }

    /// The bucket of an index that is in range, with its records.
    fn whole(&self, index: usize) -> Whole<'_> {
        Whole {
            bucket: &self.buckets[index],
            records: &self.records[index],
        }
    }

    fn lock(&self, index: usize, spins: usize) -> Option<Locked<'_>> {
        self.whole(index).lock(spins)
    }

    fn whole_of(&self, hit: &Hit) -> Option<Whole<'_>> {
        let index = hit.bucket as usize;
        (index < self.buckets.len()).then(|| self.whole(index))
    }

    fn find_at(&self, place: Place) -> Option<Hit> {
        for index in [place.first, place.second] {
            match self.buckets[index].find(place.signature) {
                (Some((lane, meta)), _) => return Some(Self::hit(index, lane, meta)),
                // Most buckets have sent nobody away, so most misses end here.
                (None, false) => return None,
                (None, true) => {}
            }
        }
        None
    }

    /// Looks one key up. A miss may be false for an entry on the move to its other bucket; [`SessionTable::insert`]
    /// is sure.
    #[must_use]
    pub fn lookup(&self, key: &SessionKey) -> Lookup {
        let hash = self.hash(key);
        Lookup {
            hash,
            hit: self.find_at(self.place(hash)),
        }
    }

    /// Charges frames to an entry and restarts its timer.
    #[inline]
    pub fn refresh(&self, hit: &Hit, now: Millis, frames: u32, bytes: u64) {
        let (index, lane) = (hit.bucket as usize, usize::from(hit.lane));
        if let Some(bucket) = self.buckets.get(index) {
            let carry = bucket.charge(lane, now, frames, bytes, self.shared);
            if carry != Carry::default() {
                self.records[index].carry(lane, carry);
            }
        }
    }

    /// Replaces the state of an entry if it is still what the lookup saw; returns the new state.
    ///
    /// # Errors
    /// The present state if it is another, or `None` if the entry is gone.
    pub fn replace(&self, hit: &Hit, to: Meta) -> Result<Meta, Option<Meta>> {
        let to = to.with_signature_of(hit.meta);
        let whole = self.whole_of(hit).ok_or(None)?;
        whole
            .bucket
            .replace(usize::from(hit.lane), hit.meta, to)
            .map(|()| to)
    }

    /// The entry at a place: its key, and where to change its state. `None` if there is none.
    pub(crate) fn at(&self, place: u64) -> Option<(SessionKey, Hit)> {
        let bucket = usize::try_from(place >> 3).ok()?;
        let lane = u8::try_from(place & 7).ok()?;
        let hit = Self::hit(bucket, lane, Meta::default());
        let entry = self.read(&hit)?;
        Some((
            entry.key,
            Hit {
                meta: entry.meta,
                ..hit
            },
        ))
    }

    /// All that is known of an entry; `None` if it is gone.
    pub(crate) fn read(&self, hit: &Hit) -> Option<Listed> {
        let lane = usize::from(hit.lane);
        self.whole_of(hit)?.snapshot(lane).map(Listed::from)
    }

    /// The state of an entry now, and how long its last frame was ago; `None` if it is gone.
    pub(crate) fn now_at(&self, hit: &Hit, now: Millis) -> Option<(Meta, Millis)> {
        let (meta, last_seen) = self.whole_of(hit)?.bucket.state(hit.lane.into())?;
        (meta.signature() == hit.meta.signature()).then_some((meta, elapsed_ms(now, last_seen)))
    }

    /// Another session begins in an entry: it is as old as `now`, and has counted nothing.
    pub(crate) fn restart(&self, hit: &Hit, now: Millis) {
        if let Some(whole) = self.whole_of(hit) {
            whole.bucket.clear_counters(hit.lane.into());
            whole.records.restart(hit.lane.into(), now);
        }
    }

    /// Entries of the bucket `index`, each read as a whole, in no particular order; `None`: there is no such bucket. One that
    /// moves or goes meanwhile may be left out, or come in two buckets.
    pub fn entries(&self, index: usize) -> Option<impl Iterator<Item = Listed> + use<>> {
        let whole = (index < self.buckets.len()).then(|| self.whole(index))?;
        let entries: [Option<Snapshot>; LANES] = std::array::from_fn(|lane| whole.snapshot(lane));
        Some(entries.into_iter().flatten().map(Listed::from))
    }

    /// The entries of all buckets.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = Listed> + '_ {
        (0..).map_while(|index| self.entries(index)).flatten()
    }
}

impl From<Snapshot> for Listed {
    fn from(entry: Snapshot) -> Listed {
        Listed {
            key: entry.key,
            meta: entry.meta,
            created: entry.created,
            last_seen: entry.used.last_seen,
            frames: entry.used.frames,
            bytes: entry.used.bytes,
        }
    }
}
