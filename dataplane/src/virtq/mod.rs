//! Virtqueues, device side.
//!
//! A ring works in bursts: *gather* chains of descriptors into a batch of checked host segments, read or write the batch,
//! *complete* each chain in the order taken, *publish* once, *notify* once. What is specific to a ring's format stays
//! behind these five steps.
//!
//! There are two formats, split and packed; each has an engine of its own. Which one a ring has is settled when it starts:
//! [`Ring`] is asked once a burst, and what works on a burst is compiled for either `Engine`.

mod bytes;
mod chain;
mod cursors;
mod engine;
mod layout;
mod notify;
#[cfg(test)]
mod orderings;
mod packed;
mod packed_layout;
mod signal;
mod split;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod walk;

use std::sync::Arc;

pub(crate) use self::chain::{Chain, Direction, HEAD, HEADER, Head};
pub use self::cursors::{CursorFile, CursorFileError, CursorSlot, Keeping, MAX_RINGS};
pub(crate) use self::engine::{Engine, More};
pub use self::packed::PackedRing;
pub use self::signal::{prepare_to_signal, signal};
pub use self::split::SplitRing;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::guest::GuestMemory;

/// Most descriptors of a ring (virtio 1.2, 2.7 and 2.8.10.1).
pub const MAX_RING_SIZE: u16 = 32768;

/// Descriptors that an indirect table may chain even where the ring is smaller: Linux does not limit a table by the
/// size of the ring, and QEMU takes this many.
pub const MAX_INDIRECT_CHAIN: u16 = 1024;

/// What is needed to run one ring; made by the control thread when the ring starts.
#[derive(Clone)]
pub struct RingSpec {
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// Descriptors, at most 32768; for a split ring a power of two.
    pub size: u16,
    /// Descriptor table, or a packed ring's descriptor ring, as a front-end (user) address.
    pub desc_addr: u64,
    /// Available ring, or a packed ring's driver event suppression area, as a user address.
    pub avail_addr: u64,
    /// Used ring, or a packed ring's device event suppression area, as a user address.
    pub used_addr: u64,
    /// Where to go on, as in GET/SET_VRING_BASE. Split: the index of the next available entry to take, 16 bits. Packed: the next
    /// descriptor to take in bits 0-14 and its wrap counter in bit 15, the next to use in bits 16-30 and its in bit 31.
    pub base: u32,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub mergeable: bool,
    /// VIRTIO_F_VERSION_1 was negotiated (the header is then 12 bytes always).
    pub version_1: bool,
    /// Written when the driver wants to know of used buffers; `None`: the driver polls.
    pub call: Option<Arc<EventFd>>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
}

/// A running virtqueue, device side, of the format that was negotiated.
///
/// One thread at a time may work on it; it may move between threads.
pub enum Ring {
    /// As virtio 1.2, 2.7 describes it.
    Split(SplitRing),
    /// VIRTIO_F_RING_PACKED (virtio 1.2, 2.8).
    Packed(PackedRing),
}

/// The same for either engine.
macro_rules! either {
    ($ring:expr, $engine:ident => $what:expr) => {
        match $ring {
            $crate::virtq::Ring::Split($engine) => $what,
            $crate::virtq::Ring::Packed($engine) => $what,
        }
    };
}
pub(crate) use either;

impl Ring {
    /// Resolves and checks the ring's addresses, and goes on from its base.
    pub fn new(spec: &RingSpec) -> Result<Ring, RingError> {
        Ring::keeping(spec, None)
    }

    /// As [`Ring::new`]; a packed ring's position is kept for the case that this process ends, see [`PackedRing::new`]. A split
    /// ring's is in the guest's memory.
    pub fn keeping(spec: &RingSpec, keep: Option<&Keeping>) -> Result<Ring, RingError> {
        if spec.packed {
            PackedRing::new(spec, keep).map(Ring::Packed)
        } else {
            SplitRing::new(spec).map(Ring::Split)
        }
    }

    /// How far it was processed: the answer to GET_VRING_BASE, in the format of [`RingSpec::base`].
    #[must_use]
    pub fn base(&self) -> u32 {
        either!(self, ring => ring.base())
    }

    /// Asks the driver for notifications (kicks), then looks again: `true` means work is there, do not sleep.
    pub fn arm(&mut self) -> bool {
        either!(self, ring => ring.arm())
    }

    /// Tells the driver not to kick.
    pub fn disarm(&mut self) {
        either!(self, ring => ring.disarm());
    }

    /// Whether the driver has made buffers available that were not taken yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        either!(self, ring => ring.has_available())
    }

    /// Notifies the driver of the used buffers published since the last call, if it asked to be told. Returns whether it
    /// wrote the call eventfd. To be called once a burst. The first call always notifies: a predecessor may have ended
    /// between publishing and notifying.
    pub fn notify(&mut self) -> bool {
        either!(self, ring => ring.notify())
    }
}

/// A rule of the virtio specification that the driver broke; the ring is unusable from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A split ring's size is 0, not a power of two or above [`MAX_RING_SIZE`] (virtio 1.2, 2.7).
    #[error("the ring size is {size}; it must be a power of two from 1 to {MAX_RING_SIZE}")]
    BadSize {
        /// The size asked for.
        size: u16,
    },
    /// A packed ring's size is 0 or above [`MAX_RING_SIZE`] (virtio 1.2, 2.8.10.1).
    #[error("the packed ring's size is {size}; it must be from 1 to {MAX_RING_SIZE}")]
    BadPackedSize {
        /// The size asked for.
        size: u16,
    },
    /// A packed ring is to go on where it cannot be: an index is not below the size, or more descriptors than the ring
    /// has were taken and not used.
    #[error("a packed ring of {size} descriptors cannot be at the base {base:#010x}")]
    BadBase {
        /// The base asked for.
        base: u32,
        /// The ring's size.
        size: u16,
    },
    /// A ring part lies outside the guest's memory or is not aligned (virtio 1.2, 2.7).
    #[error("the {part} at {addr:#x} is outside the guest's memory or not aligned")]
    BadAddress {
        /// Which part.
        part: &'static str,
        /// User address.
        addr: u64,
    },
    /// The driver claims to have made more entries available than the ring has (virtio 1.2, 2.7.6).
    #[error(
        "the available index {avail} is {ahead} ahead of the next entry {next}, more than the ring's {size}"
    )]
    AvailTooFarAhead {
        /// The driver's index.
        avail: u16,
        /// The index of the next entry to take.
        next: u16,
        /// Their distance.
        ahead: u16,
        /// The ring's size.
        size: u16,
    },
    /// An available entry names a descriptor that does not exist.
    #[error("available entry {entry} names descriptor {head} of a ring of {size}")]
    HeadOutOfRange {
        /// The entry's index, before it is wrapped to the ring.
        entry: u16,
        /// The descriptor it names.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// A descriptor's `next` lies outside its table.
    #[error("the chain at descriptor {head} goes on at {next} of a table of {entries}")]
    NextOutOfRange {
        /// The chain.
        head: u16,
        /// The index.
        next: u16,
        /// Descriptors in the table.
        entries: u32,
    },
    /// A chain has more descriptors than its table, so it loops, or more than are taken (virtio 1.2, 2.7.5.3.1).
    #[error("the chain at descriptor {head} has more than {limit} descriptors, or loops")]
    ChainTooLong {
        /// The chain.
        head: u16,
        /// The limit that applied.
        limit: u32,
    },
    /// A packed ring's chain goes on at a descriptor that the driver has not made available (virtio 1.2, 2.8.6).
    #[error("the chain at descriptor {head} goes on at descriptor {at}, which is not available")]
    NotAvailable {
        /// The chain.
        head: u16,
        /// The descriptor.
        at: u16,
    },
    /// A chain of 4 GiB or more (virtio 1.2, 2.7.5).
    #[error("the buffers of the chain at descriptor {head} have 4 GiB or more")]
    TooManyBytes {
        /// The chain.
        head: u16,
    },
    /// A buffer is not within the guest's memory.
    #[error(
        "a buffer of the chain at descriptor {head}, {len} bytes at {addr:#x}, is outside the guest's memory"
    )]
    BufferOutsideMemory {
        /// The chain.
        head: u16,
        /// The buffer's guest address.
        addr: u64,
        /// Its length.
        len: u32,
    },
    /// A device-readable descriptor after a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("the chain at descriptor {head} has a readable descriptor after a writable one")]
    ReadableAfterWritable {
        /// The chain.
        head: u16,
    },
    /// A receive buffer that the device may not write to.
    #[error("the receive buffer at descriptor {head} has no writable descriptor")]
    NothingWritable {
        /// The chain.
        head: u16,
    },
    /// An indirect descriptor without VIRTIO_RING_F_INDIRECT_DESC.
    #[error("the chain at descriptor {head} is indirect, which was not negotiated")]
    IndirectNotNegotiated {
        /// The chain.
        head: u16,
    },
    /// A descriptor with both INDIRECT and NEXT (virtio 1.2, 2.7.5.3.1).
    #[error("an indirect descriptor of the chain at descriptor {head} has a next")]
    IndirectWithNext {
        /// The chain.
        head: u16,
    },
    /// An indirect descriptor in an indirect table (virtio 1.2, 2.7.5.3.1).
    #[error("the indirect table of descriptor {head} refers to another table")]
    IndirectNested {
        /// The chain.
        head: u16,
    },
    /// A packed ring's chain in which an indirect descriptor is not the only one (virtio 1.2, 2.8.7).
    #[error("the chain at descriptor {head} mixes direct and indirect descriptors")]
    IndirectMixed {
        /// The chain.
        head: u16,
    },
    /// An indirect table whose length is 0 or no multiple of a descriptor's 16 bytes.
    #[error("the indirect table of descriptor {head} has {len} bytes; it must be a multiple of 16, not 0")]
    IndirectLength {
        /// The chain.
        head: u16,
        /// Bytes.
        len: u32,
    },
    /// An indirect table that is not within the guest's memory.
    #[error("the indirect table of descriptor {head} at {addr:#x} is outside the guest's memory")]
    IndirectOutsideMemory {
        /// The chain.
        head: u16,
        /// Guest address of the descriptor that cannot be read.
        addr: u64,
    },
}
