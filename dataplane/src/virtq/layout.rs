//! A split ring in memory (virtio 1.2, 2.7.5 to 2.7.8): where its parts are, and each access to them.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::{MAX_RING_SIZE, RingError, RingSpec};

/// Bytes of a descriptor.
pub(super) const DESC_BYTES: usize = 16;

/// A descriptor of either kind of ring, as it was at the moment of the only read.
pub(super) struct RawDescriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    /// Bytes 12 and 13: the flags in a split ring, the buffer id in a packed one.
    pub(super) third: u16,
    /// Bytes 14 and 15: the next descriptor in a split ring, the flags in a packed one.
    pub(super) fourth: u16,
}

impl RawDescriptor {
    /// # Safety
    /// `at` must be valid for reading 16 bytes; it need not be aligned.
    #[inline]
    pub(super) unsafe fn read(at: NonNull<u8>) -> RawDescriptor {
        #[repr(C, packed)]
        struct Raw {
            addr: u64,
            len: u32,
            third: u16,
            fourth: u16,
        }
        // Volatile: the guest may write at the same time, and what is checked must be what was read.
        // SAFETY: the caller vouches for 16 bytes; `Raw` is packed, so it has their size and any alignment.
        let raw = unsafe { at.cast::<Raw>().read_volatile() };
        RawDescriptor {
            addr: u64::from_le(raw.addr),
            len: u32::from_le(raw.len),
            third: u16::from_le(raw.third),
            fourth: u16::from_le(raw.fourth),
        }
    }
}

/// A descriptor of a split ring (virtio 1.2, 2.7.5).
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl From<RawDescriptor> for Descriptor {
    #[inline]
    fn from(raw: RawDescriptor) -> Descriptor {
        Descriptor {
            addr: raw.addr,
            len: raw.len,
            flags: raw.third,
            next: raw.fourth,
        }
    }
}

/// The pointer to a part of a ring, if it lies in one region and is aligned there.
pub(super) fn resolve_part(
    spec: &RingSpec,
    part: &'static str,
    addr: u64,
    align: usize,
    bytes: usize,
) -> Result<NonNull<u8>, RingError> {
    spec.memory
        .host_of_user(addr, bytes)
        // The mapping could shift an aligned address off its alignment, so ask the pointer.
        .filter(|host| host.as_ptr().addr().is_multiple_of(align))
        .ok_or(RingError::BadAddress { part, addr })
}

/// The three parts of a ring in our memory. Whoever makes it keeps the memory map for as long.
pub(super) struct Parts {
    pub(super) size: u16,
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    /// Whether the event words behind the rings exist.
    event_idx: bool,
}

impl Parts {
    pub(super) fn new(spec: &RingSpec) -> Result<Parts, RingError> {
        let size = spec.size;
        if !size.is_power_of_two() || size > MAX_RING_SIZE {
            return Err(RingError::BadSize { size });
        }
        let entries = usize::from(size);
        let event = if spec.event_idx { 2 } else { 0 };
        let part = |part, addr, align, bytes| resolve_part(spec, part, addr, align, bytes);
        Ok(Parts {
            size,
            desc: part("descriptor table", spec.desc_addr, 16, DESC_BYTES * entries)?,
            avail: part("available ring", spec.avail_addr, 2, 4 + 2 * entries + event)?,
            used: part("used ring", spec.used_addr, 4, 4 + 8 * entries + event)?,
            event_idx: spec.event_idx,
        })
    }

    /// The ring's index of a free-running counter: its size is a power of two.
    #[inline]
    fn slot(&self, counter: u16) -> usize {
        usize::from(counter & (self.size - 1))
    }

    /// `index` is below `size`: the walk checks it, or it wrapped.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        let at = self.slot(index) * DESC_BYTES;
        // SAFETY: the slot is below size, and `new` checked that the table of size descriptors is mapped.
        unsafe { RawDescriptor::read(self.desc.add(at)) }.into()
    }

    #[inline]
    pub(super) fn avail_entry(&self, counter: u16) -> u16 {
        u16::from_le(self.avail_u16(4 + 2 * self.slot(counter)).load(Ordering::Relaxed))
    }

    /// A 16-bit word of the available ring. `offset`: 0 flags, 2 index, 4 + 2 * slot an entry.
    #[inline]
    pub(super) fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `new` checked that the ring is mapped and 2-aligned; the callers' offsets are even and within it. Every
        // access of ours to it is atomic.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).as_ptr().cast()) }
    }

    /// A 16-bit word of the used ring. `offset`: 0 flags, 2 index.
    #[inline]
    pub(super) fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `avail_u16`; the used ring is 4-aligned.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).as_ptr().cast()) }
    }

    /// Where the driver says after which used entry it wants to be notified.
    #[inline]
    pub(super) fn used_event(&self) -> &AtomicU16 {
        debug_assert!(self.event_idx);
        self.avail_u16(4 + 2 * usize::from(self.size))
    }

    /// Where the device says after which available entry it wants to be kicked.
    #[inline]
    pub(super) fn avail_event(&self) -> &AtomicU16 {
        debug_assert!(self.event_idx);
        self.used_u16(4 + 8 * usize::from(self.size))
    }

    #[inline]
    pub(super) fn write_used(&self, counter: u16, id: u16, len: u32) {
        let at = 4 + 8 * self.slot(counter);
        // SAFETY: `new` checked that the ring of size elements of 8 bytes is mapped and 4-aligned; `at` is a multiple of
        // 4 and the slot is below size. Every access of ours to it is atomic.
        let (id_word, len_word) = unsafe {
            let element = self.used.add(at).as_ptr().cast::<u32>();
            (AtomicU32::from_ptr(element), AtomicU32::from_ptr(element.add(1)))
        };
        id_word.store(u32::from(id).to_le(), Ordering::Relaxed);
        len_word.store(len.to_le(), Ordering::Relaxed);
    }
}
