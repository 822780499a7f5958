//! The driver's side of one split virtqueue (virtio 1.3, 2.7), each buffer one descriptor.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryMmap};

/// Entries of each ring.
pub(super) const SIZE: u16 = 256;
/// Bytes of each buffer: a header and a frame of 1514 bytes, rounded up.
pub(super) const BUFFER: u64 = 2048;
/// Bytes of guest memory that a ring with its buffers takes.
pub(super) const FOOTPRINT: u64 = 0x4000 + BUFFER * SIZE as u64;

const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;
/// VRING_DESC_F_WRITE.
const WRITE: u16 = 2;

/// A ring and its buffers, from `base` on; descriptor `i` always means buffer `i`.
pub(super) struct Ring {
    base: GuestAddress,
    /// VRING_DESC_F_WRITE for a ring that receives.
    flags: u16,
    available: Wrapping<u16>,
    taken: Wrapping<u16>,
}

impl Ring {
    pub(super) fn new(base: GuestAddress, receives: bool) -> Ring {
        Ring {
            base,
            flags: if receives { WRITE } else { 0 },
            available: Wrapping(0),
            taken: Wrapping(0),
        }
    }

    pub(super) fn descriptors(&self) -> GuestAddress {
        self.base
    }

    pub(super) fn avail(&self) -> GuestAddress {
        self.base.unchecked_add(AVAIL)
    }

    pub(super) fn used(&self) -> GuestAddress {
        self.base.unchecked_add(USED)
    }

    pub(super) fn buffer(&self, id: u16) -> GuestAddress {
        self.base.unchecked_add(BUFFERS + BUFFER * u64::from(id))
    }

    /// Makes a buffer available: `length` bytes to read, or that many to write.
    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, id: u16, length: u32) -> Result<()> {
        let descriptor = self.base.unchecked_add(16 * u64::from(id));
        memory.write_obj(self.buffer(id).0, descriptor)?;
        memory.write_obj(length, descriptor.unchecked_add(8))?;
        memory.write_obj(self.flags, descriptor.unchecked_add(12))?;
        let slot = u64::from(self.available.0 % SIZE);
        memory.write_obj(id, self.avail().unchecked_add(4 + 2 * slot))?;
        self.available += 1;
        // Release: the device sees descriptor and entry before the index.
        memory.store(self.available.0, self.avail().unchecked_add(2), Ordering::Release)?;
        Ok(())
    }

    /// Puts the index further ahead than the ring has entries.
    pub(super) fn claim_too_many(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        self.available += 2 * SIZE;
        memory.store(self.available.0, self.avail().unchecked_add(2), Ordering::Release)?;
        Ok(())
    }

    /// The next buffer that the device is done with, and how many bytes it wrote.
    pub(super) fn take(&mut self, memory: &GuestMemoryMmap) -> Result<Option<(u16, u32)>> {
        // Acquire: entry and buffer were written before the index.
        let index: u16 = memory.load(self.used().unchecked_add(2), Ordering::Acquire)?;
        if index == self.taken.0 {
            return Ok(None);
        }
        let entry = self.used().unchecked_add(4 + 8 * u64::from(self.taken.0 % SIZE));
        let id: u32 = memory.read_obj(entry)?;
        let length: u32 = memory.read_obj(entry.unchecked_add(4))?;
        ensure!(
            id < u32::from(SIZE),
            "the device returns descriptor {id}, which does not exist"
        );
        ensure!(
            u64::from(length) <= BUFFER,
            "the device says that it wrote {length} bytes into {BUFFER}"
        );
        self.taken += 1;
        Ok(Some((u16::try_from(id)?, length)))
    }
}
