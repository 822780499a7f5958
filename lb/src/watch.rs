//! What workers note down of the sessions that they send, so that `adaptive` finds the heavy ones and knows their rates.
//! All of it is one worker's own memory, and all of it is written only while `adaptive` is in force.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use crossbeam_utils::CachePadded;

use crate::table::Hit;

/// Sets of notes. Workers beyond share them, and some bytes go uncounted.
const SETS: usize = 64;
/// Sessions noted by a worker between two ticks, the latest.
const SAMPLES: usize = 128;
/// Sessions whose bytes are counted one by one. Number 0 is none.
pub(crate) const WATCHED: usize = 512;

/// One worker's notes.
pub(crate) struct Notes {
    samples: [AtomicU64; SAMPLES],
    next: AtomicUsize,
    bytes: [AtomicU64; WATCHED],
}

impl Notes {
    fn new() -> Notes {
        Notes {
            samples: [const { AtomicU64::new(0) }; SAMPLES],
            next: AtomicUsize::new(0),
            bytes: [const { AtomicU64::new(0) }; WATCHED],
        }
    }

    /// A number that is another one each burst: which frame of it to note.
    pub(crate) fn turn(&self) -> usize {
        self.next.load(Relaxed)
    }

    /// Notes a session of this burst.
    pub(crate) fn sample(&self, hit: &Hit) {
        let next = self.next.load(Relaxed);
        self.next.store(next.wrapping_add(1), Relaxed);
        self.samples[next % SAMPLES].store(hit.place() + 1, Relaxed);
    }

    /// Counts bytes of a watched session. Load and store, as nobody else writes here.
    pub(crate) fn charge(&self, watch: u16, bytes: u64) {
        let count = &self.bytes[usize::from(watch) % WATCHED];
        count.store(count.load(Relaxed).wrapping_add(bytes), Relaxed);
    }
}

/// All workers' notes.
pub(crate) struct AllNotes {
    sets: Box<[CachePadded<Notes>]>,
    used: AtomicUsize,
}

impl AllNotes {
    pub(crate) fn new() -> AllNotes {
        AllNotes {
            sets: (0..SETS).map(|_| CachePadded::new(Notes::new())).collect(),
            used: AtomicUsize::new(0),
        }
    }

    pub(crate) fn of(&self, worker: usize) -> &Notes {
        let set = worker % SETS;
        if set >= self.used.load(Relaxed) {
            self.used.fetch_max(set + 1, Relaxed);
        }
        &self.sets[set]
    }

    fn used(&self) -> impl Iterator<Item = &CachePadded<Notes>> {
        self.sets.iter().take(self.used.load(Relaxed))
    }

    /// Takes the sessions noted since the last call.
    pub(crate) fn take_samples(&self) -> impl Iterator<Item = u64> + '_ {
        let samples = self.used().flat_map(|notes| &notes.samples);
        samples.filter_map(|sample| match sample.load(Relaxed) {
            0 => None,
            _ => sample.swap(0, Relaxed).checked_sub(1),
        })
    }

    /// Bytes counted for a watched session, since start.
    pub(crate) fn bytes(&self, watch: u16) -> u64 {
        let at = usize::from(watch) % WATCHED;
        self.used()
            .fold(0, |sum, notes| sum.wrapping_add(notes.bytes[at].load(Relaxed)))
    }
}
