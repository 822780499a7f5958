//! Lookups in stages: while one waits for memory others go on, or the next frames are parsed.
//!
//! A lookup reads two cache lines that depend on each other: the bucket's header, then the entry that the header names. Each stage ends
//! by asking memory for what the next one reads.

use prefetch_index::prefetch_index;

use super::bucket::{Candidate, set_bits};
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

/// Where a lookup looks.
#[derive(Clone, Copy, Default)]
struct Probe {
    bucket: usize,
    candidate: Candidate,
}

impl SessionTable {
    /// The first stage: asks for the header of the key's first bucket.
    #[must_use]
    #[inline]
    pub fn begin(&self, key: &SessionKey) -> Search {
        let hash = self.hash(key);
        prefetch_index(&self.buckets, self.scale(hash));
        Search { hash }
    }

    /// The other stages, for up to [`BATCH`] items with their keys; best some hundred nanoseconds after the searches began.
    #[inline]
    pub fn finish<T>(
        &self,
        items: &[T],
        search: impl Fn(&T) -> (&SessionKey, Search),
        lookups: &mut [Lookup; BATCH],
    ) {
        let mut probes = [Probe::default(); BATCH];
        let probes = &mut probes[..items.len().min(BATCH)];
        // A bit for each probe that goes on to its second bucket. Most buckets have sent nobody away, so most misses end in the
        // first. No branch: with a full table it would be taken as often as not.
        let mut elsewhere = 0u32;
        for (at, ((probe, item), lookup)) in probes.iter_mut().zip(items).zip(&mut *lookups).enumerate() {
            lookup.hash = search(item).1.hash;
            probe.bucket = self.scale(lookup.hash);
            let first = &self.buckets[probe.bucket];
            probe.candidate = first.candidate(signature(lookup.hash));
            first.prefetch(probe.candidate);
            elsewhere |= u32::from(probe.candidate.is_none() & first.has_overflow()) << at;
        }
        for at in set_bits(elsewhere).map(usize::from) {
            probes[at].bucket = self.place(lookups[at].hash).second;
            prefetch_index(&self.buckets, probes[at].bucket);
        }
        for at in set_bits(elsewhere).map(usize::from) {
            let second = &self.buckets[probes[at].bucket];
            probes[at].candidate = second.candidate(signature(lookups[at].hash));
            second.prefetch(probes[at].candidate);
        }
        for ((item, probe), lookup) in items.iter().zip(probes).zip(lookups) {
            if probe.candidate.is_none() {
                lookup.hit = None;
                continue;
            }
            let (key, _) = search(item);
            // Each branch writes its own result: see `parse::simple`.
            match self.buckets[probe.bucket].confirm(probe.candidate, &key.words()) {
                Some(meta) => lookup.hit = Some(Self::hit(probe.bucket, probe.candidate.lane, meta)),
                None => self.look_again(key, lookup),
            }
        }
    }

    /// For another key with the same signature, or a removal meanwhile.
    #[cold]
    #[inline(never)]
    fn look_again(&self, key: &SessionKey, lookup: &mut Lookup) {
        lookup.hit = self.find_at(self.place(lookup.hash), key);
    }
}
