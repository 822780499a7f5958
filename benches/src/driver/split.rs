//! A split ring (virtio 1.2, 2.7).

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use vm_memory::MmapRegion;
use vnic_tests::frontend::RingPlace;

use super::{Buffers, Cursor, DriverRing, Fault, word, words};

/// VRING_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VRING_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// Entry `i` of the available ring names descriptor `i`, for good.
pub struct SplitRing<'m> {
    size: u16,
    avail_idx: &'m AtomicU16,
    used_idx: &'m AtomicU16,
    used_flags: &'m AtomicU16,
    /// Entries of the used ring, whose alignment is 4 bytes: id and length of each.
    used: Vec<[&'m std::sync::atomic::AtomicU32; 2]>,
    /// Address and the rest of each descriptor, if they are rewritten.
    rewritten: Vec<[&'m AtomicU64; 2]>,
    cursor: Cursor,
    /// Buffers offered and returned since the start.
    offered: u16,
    returned: u16,
}

impl SplitRing<'_> {
    fn slot(&self, index: u16) -> u16 {
        index & (self.size - 1)
    }
}

impl<'m> DriverRing<'m> for SplitRing<'m> {
    fn new(memory: &'m MmapRegion, place: &RingPlace, buffers: Buffers) -> SplitRing<'m> {
        let size = place.size;
        assert!(size.is_power_of_two(), "a split ring's size is a power of two");
        let addresses = words(memory, place.descriptors, 16, size);
        let others = words(memory, place.descriptors + 8, 16, size);
        let rotates = buffers.count > u32::from(size);
        for index in 0..size {
            let number = u32::from(index) % buffers.count;
            addresses[usize::from(index)].store(buffers.address(number), Ordering::Relaxed);
            let rest = u64::from(buffers.length(number)) | u64::from(buffers.flags()) << 32;
            others[usize::from(index)].store(rest, Ordering::Relaxed);
            word::<AtomicU16>(memory, place.avail + 4 + 2 * u64::from(index)).store(index, Ordering::Relaxed);
        }
        word::<AtomicU16>(memory, place.avail).store(NO_INTERRUPT, Ordering::Relaxed);
        let used = (0..u64::from(size))
            .map(|index| [0, 4].map(|part| word(memory, place.used + 4 + 8 * index + part)))
            .collect();
        SplitRing {
            size,
            avail_idx: word(memory, place.avail + 2),
            used_idx: word(memory, place.used + 2),
            used_flags: word(memory, place.used),
            used,
            rewritten: if rotates {
                addresses.into_iter().zip(others).map(Into::into).collect()
            } else {
                Vec::new()
            },
            cursor: Cursor::new(buffers),
            offered: 0,
            returned: 0,
        }
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn outstanding(&self) -> u16 {
        self.offered.wrapping_sub(self.returned)
    }

    fn position(&self) -> u16 {
        self.slot(self.returned)
    }

    #[inline]
    fn completed(&mut self) -> Result<u16, Fault> {
        // Acquire: entries and buffers were written before the index.
        let index = self.used_idx.load(Ordering::Acquire);
        let count = index.wrapping_sub(self.returned);
        if count == 0 {
            return Ok(0);
        }
        let outstanding = self.outstanding();
        if count > outstanding {
            return Err(Fault::Count { count, outstanding });
        }
        // One look a burst: whoever reorders is found out soon.
        let expected = self.slot(index.wrapping_sub(1));
        let id = self.used[usize::from(expected)][0].load(Ordering::Relaxed);
        if id != u32::from(expected) {
            return Err(Fault::Order { id, expected });
        }
        self.returned = index;
        Ok(count)
    }

    fn written(&self, position: u16) -> u32 {
        self.used[usize::from(position)][1].load(Ordering::Relaxed)
    }

    #[inline]
    fn offer(&mut self, count: u16) {
        if !self.rewritten.is_empty() {
            let writable = u64::from(self.cursor.buffers.flags()) << 32;
            for index in 0..count {
                let slot = usize::from(self.slot(self.offered.wrapping_add(index)));
                let (address, length) = self.cursor.next();
                let [at, rest] = self.rewritten[slot];
                at.store(address, Ordering::Relaxed);
                rest.store(u64::from(length) | writable, Ordering::Relaxed);
            }
        }
        self.offered = self.offered.wrapping_add(count);
        // Release: descriptors and frames come before the index.
        self.avail_idx.store(self.offered, Ordering::Release);
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        // The device stores its wish and then looks at the index again.
        fence(Ordering::SeqCst);
        self.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
    }
}
