//! Following a chain of descriptors: what is the same in both kinds of ring.

use std::ptr::NonNull;

use super::RingError;
use super::chain::{Batch, Direction, Refusal};
use super::layout::{DESC_BYTES, RawDescriptor};
use crate::memory::guest::{GuestMemory, Window};

pub(super) const DESC_F_NEXT: u16 = 1;
pub(super) const DESC_F_WRITE: u16 = 2;
pub(super) const DESC_F_INDIRECT: u16 = 4;

/// Descriptors after which a batch ends with the chain at hand, however many gathers filled it: thousands of empty descriptors, which no
/// room is found in, cost a worker no more than ordinary ones.
pub(super) const WALK_BUDGET: u32 = 4096;

/// Why a walk along a chain stopped early.
pub(super) enum Stop {
    /// The batch cannot hold it beside the chains that it has.
    Full,
    /// It breaks a rule.
    Broken(RingError),
}

impl From<RingError> for Stop {
    fn from(error: RingError) -> Stop {
        Stop::Broken(error)
    }
}

/// A walk along one chain, whose buffers of one direction go into a batch. Buffers of the other are never touched, so their
/// addresses do not matter.
pub(super) struct Walk {
    head: u16,
    direction: Direction,
    bytes: u64,
    writable_seen: bool,
    truncated: bool,
}

impl Walk {
    /// A walk from the descriptor `head` on.
    #[inline]
    pub(super) fn new(head: u16, direction: Direction) -> Walk {
        Walk {
            head,
            direction,
            bytes: 0,
            writable_seen: false,
            truncated: false,
        }
    }

    /// The next buffer of the chain.
    #[inline]
    pub(super) fn buffer(&mut self, batch: &mut Batch, addr: u64, len: u32, flags: u16) -> Result<(), Stop> {
        let head = self.head;
        let writable = flags & DESC_F_WRITE != 0;
        if self.writable_seen && !writable {
            return Err(RingError::ReadableAfterWritable { head }.into());
        }
        self.writable_seen |= writable;
        self.bytes += u64::from(len);
        if self.bytes > u64::from(u32::MAX) {
            return Err(RingError::TooManyBytes { head }.into());
        }
        if self.truncated || writable != (self.direction == Direction::Writable) {
            return Ok(());
        }
        match batch.push(addr, len) {
            Ok(()) => Ok(()),
            Err(Refusal::OutsideMemory) => Err(RingError::BufferOutsideMemory { head, addr, len }.into()),
            // Alone and still too long: what was kept of it is all that is ever kept, but its end must be found.
            Err(Refusal::Full) if batch.chains().is_empty() => {
                self.truncated = true;
                Ok(())
            }
            Err(Refusal::Full) => Err(Stop::Full),
        }
    }

    /// The chain has ended; returns whether only a part of it was kept.
    #[inline]
    pub(super) fn end(self) -> Result<bool, Stop> {
        if self.direction == Direction::Writable && !self.writable_seen {
            return Err(RingError::NothingWritable { head: self.head }.into());
        }
        Ok(self.truncated)
    }
}

/// Reads indirect tables.
pub(super) struct Tables {
    negotiated: bool,
    window: Window,
}

impl Tables {
    /// `negotiated`: VIRTIO_RING_F_INDIRECT_DESC was.
    pub(super) fn new(negotiated: bool) -> Tables {
        Tables {
            negotiated,
            window: Window::EMPTY,
        }
    }

    /// Checks a descriptor that refers to a table; returns the table's number of descriptors.
    pub(super) fn check(&self, head: u16, len: u32, flags: u16, nested: bool) -> Result<u32, RingError> {
        if !self.negotiated {
            return Err(RingError::IndirectNotNegotiated { head });
        }
        if nested {
            return Err(RingError::IndirectNested { head });
        }
        if flags & DESC_F_NEXT != 0 {
            return Err(RingError::IndirectWithNext { head });
        }
        if len == 0 || !len.is_multiple_of(16) {
            return Err(RingError::IndirectLength { head, len });
        }
        Ok(len / 16)
    }

    /// Reads a descriptor of a table, which may begin at any address and cross regions.
    pub(super) fn read(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        table: u64,
        index: u16,
    ) -> Result<RawDescriptor, RingError> {
        let outside = |addr| RingError::IndirectOutsideMemory { head, addr };
        let addr = table.checked_add(u64::from(index) * 16).ok_or(outside(table))?;
        let (host, here) = memory.resolve(&mut self.window, addr, 16).ok_or(outside(addr))?;
        if here == 16 {
            // SAFETY: 16 bytes from `host` on lie in the guest's memory, which the caller's reference keeps mapped.
            return Ok(unsafe { RawDescriptor::read(host) });
        }
        let mut bytes = [0; DESC_BYTES];
        for (byte, at) in bytes.iter_mut().zip(0..) {
            let addr = addr.checked_add(at).ok_or(outside(addr))?;
            let (host, _) = memory.resolve(&mut self.window, addr, 1).ok_or(outside(addr))?;
            // SAFETY: one byte at `host` lies in the guest's memory, which the caller's reference keeps mapped.
            *byte = unsafe { host.read_volatile() };
        }
        // SAFETY: the array is a readable place of 16 bytes.
        Ok(unsafe { RawDescriptor::read(NonNull::from(&bytes).cast()) })
    }
}
