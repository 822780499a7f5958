//! The driver's side of virtqueues, as cheap as it can be: descriptors and buffers are laid out once, and what is left to do for a
//! burst is to move an index (split rings) or to write one word for each descriptor (packed rings).
//!
//! Buffers are offered in a fixed order and must come back in that order, which virtio devices are free not to do but all that are
//! measured here do; [`Fault::Order`] says so if one does not.

mod packed;
mod split;
#[cfg(test)]
mod tests;

pub use packed::PackedRing;
pub use split::SplitRing;

use std::sync::atomic::AtomicU64;

use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory as _};
use vnic_tests::frontend::RingPlace;

/// VRING_DESC_F_WRITE.
const WRITE: u16 = 2;
/// Alignment that suits every part of a ring.
const ALIGN: u64 = 64;

/// Buffers that follow each other in memory, one descriptor each.
#[derive(Debug, Clone)]
pub struct Buffers {
    /// Guest address of the first.
    pub first: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// How many there are, at least 1. If they are more than the ring's descriptors, these are rewritten from lap to lap.
    pub count: u32,
    /// Bytes of each, in turn from the first on; at least one.
    pub lengths: Vec<u32>,
    /// Whether the device writes them.
    pub writable: bool,
}

impl Buffers {
    /// Guest address of one of them.
    #[must_use]
    pub fn address(&self, number: u32) -> u64 {
        self.first + self.stride * u64::from(number)
    }

    /// Bytes of one of them.
    #[must_use]
    pub fn length(&self, number: u32) -> u32 {
        self.lengths[number as usize % self.lengths.len()]
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// Walks over [`Buffers`] again and again.
struct Cursor {
    buffers: Buffers,
    number: u32,
    /// Index into the lengths.
    turn: usize,
}

impl Cursor {
    fn new(buffers: Buffers) -> Cursor {
        Cursor {
            buffers,
            number: 0,
            turn: 0,
        }
    }

    /// Address and length of the next one.
    #[inline]
    fn next(&mut self) -> (u64, u32) {
        let next = (self.buffers.address(self.number), self.buffers.lengths[self.turn]);
        self.number += 1;
        self.turn += 1;
        if self.turn == self.buffers.lengths.len() {
            self.turn = 0;
        }
        if self.number == self.buffers.count {
            self.number = 0;
            self.turn = 0;
        }
        next
    }
}

/// What a device did that no device may, or that this driver cannot follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// More came back than was offered.
    #[error("the device returned {count} buffers and had {outstanding}")]
    Count {
        /// What it says.
        count: u16,
        /// What it had.
        outstanding: u16,
    },
    /// Another buffer came back than the one that was next.
    #[error("the device returned buffer {id} where {expected} was next: this driver relies on their order")]
    Order {
        /// The buffer.
        id: u32,
        /// The one that was next.
        expected: u16,
    },
}

/// One virtqueue.
pub trait DriverRing<'m>: Sized {
    /// Lays the ring out with nothing offered; the device is asked not to notify.
    ///
    /// # Panics
    /// If it is not within the memory, or its size no power of two.
    fn new(memory: &'m MmapRegion, place: &RingPlace, buffers: Buffers) -> Self;

    /// Descriptors.
    fn size(&self) -> u16;

    /// Buffers that the device has.
    fn outstanding(&self) -> u16;

    /// The place in the ring of the oldest buffer that the device has, which is the next to come back.
    fn position(&self) -> u16;

    /// How many buffers have come back since the last call, in their order.
    ///
    /// # Errors
    /// See [`Fault`].
    fn completed(&mut self) -> Result<u16, Fault>;

    /// Bytes that the device wrote into the buffer that came back from this place and was not offered again yet.
    fn written(&self, position: u16) -> u32;

    /// Offers the next buffers; not more than the ring has room for.
    fn offer(&mut self, count: u16);

    /// Whether the device wants to be notified of what was offered; to be asked after each [`DriverRing::offer`].
    fn wants_kick(&self) -> bool;
}

/// Where a ring of `size` descriptors is that begins at `base`, and where it ends. What a split and a packed ring need is the same
/// in order, and less for the packed one.
#[must_use]
pub fn place(base: u64, size: u16) -> (RingPlace, u64) {
    let entries = u64::from(size);
    let descriptors = base.next_multiple_of(ALIGN);
    let avail = (descriptors + 16 * entries).next_multiple_of(ALIGN);
    // On a line of its own: driver and device write these.
    let used = (avail + 6 + 2 * entries).next_multiple_of(ALIGN);
    let place = RingPlace {
        size,
        descriptors,
        avail,
        used,
    };
    (place, (used + 6 + 8 * entries).next_multiple_of(ALIGN))
}

/// A word that the other side reads or writes at the same time.
pub(crate) fn word<T: AtomicInteger>(memory: &MmapRegion, address: u64) -> &T {
    let offset = usize::try_from(address).expect("an address in memory");
    memory
        .get_atomic_ref(offset)
        .expect("rings lie within memory and are aligned")
}

/// Many such words, `step` bytes from one to the next.
pub(crate) fn words(memory: &MmapRegion, first: u64, step: u64, count: u16) -> Vec<&AtomicU64> {
    (0..u64::from(count))
        .map(|index| word(memory, first + step * index))
        .collect()
}

/// A kind of ring, over memory of any lifetime.
pub trait RingKind {
    /// The ring.
    type Ring<'m>: DriverRing<'m>;
}

/// Split rings.
pub struct Split;

impl RingKind for Split {
    type Ring<'m> = SplitRing<'m>;
}

/// Packed rings.
pub struct Packed;

impl RingKind for Packed {
    type Ring<'m> = PackedRing<'m>;
}
