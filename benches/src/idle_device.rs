//! A device that does nothing: it returns what it is given without looking at it. What a flood over it comes to is what the generator
//! could do, so a figure far below it is the device's own.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::MmapRegion;

use crate::driver::{word, words};
use crate::port::Layout;

/// VIRTQ_DESC_F_AVAIL and VIRTQ_DESC_F_USED of a packed descriptor, in the word that holds its flags.
const AVAIL: u64 = 1 << 55;
const USED: u64 = 1 << 63;
/// Buffers returned at a time, as devices do.
const BURST: u16 = 32;

/// The device's side of one ring.
trait Returns {
    /// Buffers that the driver has offered and that were not returned, at most a burst.
    fn offered(&self) -> u16;
    /// Returns that many.
    fn give_back(&mut self, count: u16);
}

struct SplitSide<'m> {
    avail_idx: &'m AtomicU16,
    used_idx: &'m AtomicU16,
    done: u16,
}

impl<'m> SplitSide<'m> {
    fn new(memory: &'m MmapRegion, layout: &Layout, ring: usize) -> SplitSide<'m> {
        let place = &layout.rings[ring];
        // The same entries come lap after lap.
        for index in 0..place.size {
            let entry = place.used + 4 + 8 * u64::from(index);
            word::<AtomicU32>(memory, entry).store(u32::from(index), Ordering::Relaxed);
        }
        word::<AtomicU16>(memory, place.used).store(1, Ordering::Relaxed);
        SplitSide {
            avail_idx: word(memory, place.avail + 2),
            used_idx: word(memory, place.used + 2),
            done: 0,
        }
    }
}

impl Returns for SplitSide<'_> {
    fn offered(&self) -> u16 {
        self.avail_idx
            .load(Ordering::Acquire)
            .wrapping_sub(self.done)
            .min(BURST)
    }

    fn give_back(&mut self, count: u16) {
        self.done = self.done.wrapping_add(count);
        self.used_idx.store(self.done, Ordering::Release);
    }
}

struct PackedSide<'m> {
    words: Vec<&'m AtomicU64>,
    next: usize,
    wrap: bool,
}

impl<'m> PackedSide<'m> {
    fn new(memory: &'m MmapRegion, layout: &Layout, ring: usize) -> PackedSide<'m> {
        let place = &layout.rings[ring];
        word::<AtomicU16>(memory, place.used + 2).store(1, Ordering::Relaxed);
        PackedSide {
            words: words(memory, place.descriptors + 8, 16, place.size),
            next: 0,
            wrap: true,
        }
    }

    fn after(&self, at: (usize, bool)) -> (usize, bool) {
        if at.0 + 1 == self.words.len() {
            (0, !at.1)
        } else {
            (at.0 + 1, at.1)
        }
    }
}

impl Returns for PackedSide<'_> {
    fn offered(&self) -> u16 {
        let mut at = (self.next, self.wrap);
        let mut count = 0;
        while count < BURST {
            let flags = self.words[at.0].load(Ordering::Acquire) & (AVAIL | USED);
            if flags != if at.1 { AVAIL } else { USED } {
                break;
            }
            count += 1;
            at = self.after(at);
        }
        count
    }

    fn give_back(&mut self, count: u16) {
        for _ in 0..count {
            let word = self.words[self.next];
            let rest = word.load(Ordering::Relaxed) & !(AVAIL | USED);
            let flags = if self.wrap { AVAIL | USED } else { 0 };
            word.store(rest | flags, Ordering::Release);
            (self.next, self.wrap) = self.after((self.next, self.wrap));
        }
    }
}

/// "Forwards" from the sending ring of `from` to the receiving ring of `to` until told to stop: as many come back at both.
pub fn run(packed: bool, from: (&MmapRegion, &Layout), to: (&MmapRegion, &Layout), stop: &AtomicBool) {
    if packed {
        forward(
            PackedSide::new(from.0, from.1, 1),
            PackedSide::new(to.0, to.1, 0),
            stop,
        );
    } else {
        forward(
            SplitSide::new(from.0, from.1, 1),
            SplitSide::new(to.0, to.1, 0),
            stop,
        );
    }
}

fn forward(mut from: impl Returns, mut to: impl Returns, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let offered = from.offered();
        let count = if offered > 0 { offered.min(to.offered()) } else { 0 };
        if count == 0 {
            std::hint::spin_loop();
            continue;
        }
        from.give_back(count);
        to.give_back(count);
    }
}
