//! A packed ring (virtio 1.2, 2.8).

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use vm_memory::MmapRegion;
use vnic_tests::frontend::RingPlace;

use super::{Buffers, Cursor, DriverRing, Fault, word, words};

/// VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// RING_EVENT_FLAGS_DISABLE.
const DISABLE: u16 = 1;

/// The descriptor at place `i` always has the id `i`. The device overwrites length, id and flags of a descriptor when it is done
/// with it; the driver restores them with one store.
pub struct PackedRing<'m> {
    size: u16,
    addresses: Vec<&'m AtomicU64>,
    /// Length, id and flags of each descriptor.
    words: Vec<&'m AtomicU64>,
    /// What is written there, but for the bits that depend on the wrap counter.
    templates: Vec<u64>,
    rotates: bool,
    device_flags: &'m AtomicU16,
    cursor: Cursor,
    /// Where the next buffer is offered, and the wrap counter there.
    next: u16,
    next_wrap: bool,
    /// Where the next one comes back, and the wrap counter there.
    back: u16,
    back_wrap: bool,
    outstanding: u16,
}

fn parts(length: u32, id: u16, flags: u16) -> u64 {
    u64::from(length) | u64::from(id) << 32 | u64::from(flags) << 48
}

/// The flags of a descriptor that is available at this wrap counter: AVAIL equals it, USED does not.
fn available(wrap: bool) -> u64 {
    parts(0, 0, if wrap { AVAIL } else { USED })
}

impl PackedRing<'_> {
    fn is_used(&self, place: u16, wrap: bool) -> bool {
        let both = parts(0, 0, AVAIL | USED);
        // Acquire: length, id and buffer were written before the flags.
        let seen = self.words[usize::from(place)].load(Ordering::Acquire) & both;
        seen == if wrap { both } else { 0 }
    }

    /// Used descriptors from `back` on, not beyond the end of the ring. Each is looked at: of a burst the device writes the first one
    /// last.
    #[inline]
    fn used_run(&self, limit: u16) -> u16 {
        let limit = limit.min(self.size - self.back);
        let mut count = 0;
        while count < limit && self.is_used(self.back + count, self.back_wrap) {
            count += 1;
        }
        count
    }

    /// Offers buffers up to the end of the ring. The first descriptor comes last: until then the device sees nothing, and keeps away
    /// from the lines that are being written.
    #[inline]
    fn offer_run(&mut self, count: u16) {
        let first = usize::from(self.next);
        let range = first..first + usize::from(count);
        let flags = available(self.next_wrap);
        if self.rotates {
            for index in range.clone() {
                let (address, length) = self.cursor.next();
                self.addresses[index].store(address, Ordering::Relaxed);
                let template = &mut self.templates[index];
                *template = *template >> 32 << 32 | u64::from(length);
            }
        }
        for (word, template) in self.words[range.clone()].iter().zip(&self.templates[range]).rev() {
            // Release: the frame and the address come before the flags. All of the word is stored at once.
            word.store(template | flags, Ordering::Release);
        }
        self.next += count;
        if self.next == self.size {
            self.next = 0;
            self.next_wrap = !self.next_wrap;
        }
    }
}

impl<'m> DriverRing<'m> for PackedRing<'m> {
    fn new(memory: &'m MmapRegion, place: &RingPlace, buffers: Buffers) -> PackedRing<'m> {
        let size = place.size;
        let addresses = words(memory, place.descriptors, 16, size);
        let mut templates = Vec::with_capacity(usize::from(size));
        for index in 0..size {
            let number = u32::from(index) % buffers.count;
            addresses[usize::from(index)].store(buffers.address(number), Ordering::Relaxed);
            templates.push(parts(buffers.length(number), index, buffers.flags()));
        }
        word::<AtomicU16>(memory, place.avail + 2).store(DISABLE, Ordering::Relaxed);
        PackedRing {
            size,
            addresses,
            words: words(memory, place.descriptors + 8, 16, size),
            templates,
            rotates: buffers.count > u32::from(size),
            device_flags: word(memory, place.used + 2),
            cursor: Cursor::new(buffers),
            next: 0,
            next_wrap: true,
            back: 0,
            back_wrap: true,
            outstanding: 0,
        }
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn outstanding(&self) -> u16 {
        self.outstanding
    }

    fn position(&self) -> u16 {
        self.back
    }

    #[inline]
    fn completed(&mut self) -> Result<u16, Fault> {
        let mut total = 0;
        loop {
            let count = self.used_run(self.outstanding);
            if count == 0 {
                return Ok(total);
            }
            let expected = self.back + count - 1;
            let word = self.words[usize::from(expected)].load(Ordering::Relaxed);
            let id = u32::try_from(word >> 32 & 0xffff).expect("16 bits");
            if id != u32::from(expected) {
                return Err(Fault::Order { id, expected });
            }
            total += count;
            self.outstanding -= count;
            self.back += count;
            if self.back < self.size {
                return Ok(total);
            }
            self.back = 0;
            self.back_wrap = !self.back_wrap;
        }
    }

    fn written(&self, position: u16) -> u32 {
        let word = self.words[usize::from(position)].load(Ordering::Relaxed);
        u32::try_from(word & 0xffff_ffff).expect("32 bits")
    }

    #[inline]
    fn offer(&mut self, count: u16) {
        debug_assert!(count <= self.size - self.outstanding, "the ring has room");
        self.outstanding += count;
        let before_end = count.min(self.size - self.next);
        self.offer_run(before_end);
        if count > before_end {
            self.offer_run(count - before_end);
        }
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        // The device stores its wish and then looks at the descriptors again.
        fence(Ordering::SeqCst);
        self.device_flags.load(Ordering::Relaxed) != DISABLE
    }
}
