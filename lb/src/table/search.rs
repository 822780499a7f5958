//! Lookups in stages: while one waits for memory others go on, or the next frames are parsed.

use prefetch_index::prefetch_index;

use super::bucket::set_bits;
use super::{BATCH, Lookup, SessionTable, signature};
use crate::key::SessionKey;

/// A lookup that has begun. It belongs to the table that began it, and to its key.
#[derive(Debug, Clone, Copy)]
pub struct Search {
    hash: u64,
}

impl Search {
    /// Before there is one.
    pub(crate) const NONE: Search = Search { hash: 0 };
}

impl SessionTable {
    /// The first stage: asks memory for the key's first bucket.
    #[must_use]
    #[inline]
    pub fn begin(&self, key: &SessionKey) -> Search {
        let hash = self.hash(key);
        prefetch_index(&self.buckets, self.scale(hash));
        Search { hash }
    }

    /// The other stages, for up to [`BATCH`] items; best some hundred nanoseconds after the searches began.
    #[inline]
    pub fn finish<T>(&self, items: &[T], search: impl Fn(&T) -> Search, lookups: &mut [Lookup; BATCH]) {
        // A bit for each that goes on to its second bucket. Most buckets have sent nobody away, so most misses end in the first. No
        // branch: with a full table it would be taken as often as not.
        let mut elsewhere = 0u32;
        for (at, (item, lookup)) in items.iter().zip(&mut *lookups).enumerate() {
            let Search { hash } = search(item);
            let index = self.scale(hash);
            let (found, may_be_elsewhere) = self.buckets[index].find(signature(hash));
            lookup.hash = hash;
            lookup.hit = found.map(|(lane, meta)| Self::hit(index, lane, meta));
            elsewhere |= u32::from(found.is_none() & may_be_elsewhere) << at;
        }
        for at in set_bits(elsewhere).map(usize::from) {
            prefetch_index(&self.buckets, self.place(lookups[at].hash).second);
        }
        for at in set_bits(elsewhere).map(usize::from) {
            let place = self.place(lookups[at].hash);
            let (found, _) = self.buckets[place.second].find(place.signature);
            lookups[at].hit = found.map(|(lane, meta)| Self::hit(place.second, lane, meta));
        }
    }
}
