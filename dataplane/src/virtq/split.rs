//! The split virtqueue (virtio 1.2, 2.7), device side.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vmm_sys_util::eventfd::EventFd;

use super::chain::{Batch, Chain, Cursor, Direction, Refusal};
use super::layout::{DESC_BYTES, Descriptor, Parts};
use super::notify::{Call, need_event};
use super::{MAX_INDIRECT_CHAIN, RingError, RingSpec};
use crate::memory::guest::Window;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Descriptors after which a gather ends with the chain at hand, so that chains of thousands of empty descriptors
/// cost a worker no more than ordinary ones.
const WALK_BUDGET: u32 = 4096;

/// A split virtqueue (virtio 1.2, 2.7), device side, with its pointers resolved.
///
/// Of the indexes, the driver's are read again only when the entries known of are not enough, and ours are written once a
/// burst. One thread at a time may work on it; it may move between threads.
pub struct SplitRing {
    parts: Parts,
    batch: Batch,
    table_window: Window,
    call: Call,
    indirect: bool,
    event_idx: bool,
    mergeable: bool,
    version_1: bool,
    /// The next available entry to take.
    next_avail: u16,
    /// The driver's available index, as last read.
    avail_idx: u16,
    /// The used index, as last published.
    used_idx: u16,
    /// Used entries written behind it and not yet published.
    staged: u16,
    /// The used index at the last decision to notify; `None` before the first, which always notifies.
    signalled: Option<u16>,
    /// Whether NO_NOTIFY is set in the used ring's flags.
    suppressed: bool,
}

// SAFETY: the addresses it holds belong to no thread, and they stay mapped while the batch holds the memory map.
unsafe impl Send for SplitRing {}

/// What a gather found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    /// This many chains, at least one.
    Chains(usize),
    /// The driver has made nothing more available.
    Empty,
    /// The batch cannot hold the next chain beside the ones it has.
    Full,
}

/// Why a walk along a chain stopped early.
enum Stop {
    Full,
    Broken(RingError),
}

impl From<RingError> for Stop {
    fn from(error: RingError) -> Stop {
        Stop::Broken(error)
    }
}

impl SplitRing {
    /// Resolves and checks the ring's addresses. The used index is read from the ring, where a predecessor left it.
    pub fn new(spec: &RingSpec) -> Result<SplitRing, RingError> {
        let parts = Parts::new(spec)?;
        let used_idx = u16::from_le(parts.used_u16(2).load(Ordering::Relaxed));
        let mut ring = SplitRing {
            parts,
            batch: Batch::new(Arc::clone(&spec.memory)),
            table_window: Window::EMPTY,
            call: Call::new(spec.call.clone()),
            indirect: spec.indirect,
            event_idx: spec.event_idx,
            mergeable: spec.mergeable,
            version_1: spec.version_1,
            next_avail: spec.base,
            avail_idx: spec.base,
            used_idx,
            staged: 0,
            signalled: None,
            suppressed: false,
        };
        // A predecessor may have left NO_NOTIFY behind; with EVENT_IDX the flags must be 0.
        ring.parts.used_u16(0).store(0, Ordering::Relaxed);
        ring.disarm();
        Ok(ring)
    }

    /// Index of the next available entry that would be taken: the answer to GET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u16 {
        self.next_avail
    }

    /// Asks the driver for notifications (kicks), then looks again: `true` means work is there, do not sleep.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.parts
                .avail_event()
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.parts.used_u16(0).store(0, Ordering::Relaxed);
            self.suppressed = false;
        }
        // The driver stores its index and then loads what was stored above; with a full fence on both sides, either it
        // sees the request and kicks, or its index is seen here.
        fence(Ordering::SeqCst);
        self.load_avail_idx() != self.next_avail
    }

    /// Tells the driver not to kick.
    pub fn disarm(&mut self) {
        // With EVENT_IDX nothing need be written: an event index that stays behind is passed once and then not again
        // for 65536 entries.
        if !self.event_idx && !self.suppressed {
            self.parts
                .used_u16(0)
                .store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.suppressed = true;
        }
    }

    /// Whether the driver has made buffers available that were not taken yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        self.load_avail_idx() != self.next_avail
    }

    /// Notifies the driver of the used buffers published since the last call, if it asked to be told.
    /// Returns whether it wrote the call eventfd. To be called at least once in 65536 used buffers. The first call
    /// always notifies: a predecessor may have ended between publishing and notifying.
    pub fn notify(&mut self) -> bool {
        if self.signalled == Some(self.used_idx) {
            return false;
        }
        let Some(old) = self.signalled.replace(self.used_idx) else {
            return self.call.signal();
        };
        // Our index was stored before, the driver's wish is loaded after: either it sees the index before it sleeps, or
        // we see its wish (the twin of the fence in `arm`).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = u16::from_le(self.parts.used_event().load(Ordering::Relaxed));
            need_event(event, self.used_idx, old)
        } else {
            u16::from_le(self.parts.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        };
        wanted && self.call.signal()
    }

    /// Replaces the call eventfd of a running ring (SET_VRING_CALL).
    pub fn set_call(&mut self, call: Option<Arc<EventFd>>) {
        self.call.replace(call);
        // What was published under the old one may not have been seen through it.
        self.signalled = None;
    }

    /// Writes to the call eventfd that failed.
    #[must_use]
    pub fn call_errors(&self) -> u64 {
        self.call.errors()
    }

    /// Whether VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub(crate) fn mergeable(&self) -> bool {
        self.mergeable
    }

    /// Whether VIRTIO_F_VERSION_1 was negotiated.
    pub(crate) fn version_1(&self) -> bool {
        self.version_1
    }

    /// Descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.parts.size
    }

    /// Takes up to `max` available chains into an empty batch.
    pub(crate) fn gather(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        self.batch.clear();
        self.gather_more(direction, max)
    }

    /// Takes up to `max` more chains into the batch. A chain that breaks a rule is not taken: chains before it are
    /// returned first, the error by the next call.
    pub(crate) fn gather_more(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        let available = usize::from(self.available(max)?);
        if available == 0 {
            return Ok(More::Empty);
        }
        let mut walked = 0;
        let mut taken = 0;
        while taken < available.min(max) && walked < WALK_BUDGET {
            match self.take(direction, &mut walked) {
                Ok(true) => taken += 1,
                Ok(false) => break,
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(if taken == 0 {
            More::Full
        } else {
            More::Chains(taken)
        })
    }

    /// The chains of the batch, in the order taken.
    #[inline]
    pub(crate) fn chain(&self, index: usize) -> Option<Chain> {
        self.batch.chains().get(index).copied()
    }

    /// Number of chains in the batch.
    #[inline]
    pub(crate) fn gathered(&self) -> usize {
        self.batch.chains().len()
    }

    /// Makes the batch's chains from `index` on available again, and empties the batch.
    pub(crate) fn return_from(&mut self, index: usize) {
        let left = u16::try_from(self.gathered().saturating_sub(index)).unwrap_or(0);
        self.next_avail = self.next_avail.wrapping_sub(left);
        self.batch.clear();
    }

    /// Copies the first bytes of a chain, reading each once. Returns whether it has that many.
    #[inline]
    pub(crate) fn read_once(&self, chain: &Chain, out: &mut [u8]) -> bool {
        self.batch.read_once(chain, out)
    }

    /// The place of the byte that `skip` bytes of a chain precede.
    #[inline]
    pub(crate) fn cursor(&self, chain: &Chain, skip: usize) -> Cursor {
        self.batch.cursor(chain, skip)
    }

    /// Copies bytes from the cursor on, across descriptors and chains. Returns how many there were.
    #[inline]
    pub(crate) fn read(&self, cursor: &mut Cursor, out: &mut [u8]) -> usize {
        self.batch.read(cursor, out)
    }

    /// Writes bytes from the cursor on, across descriptors and chains. Returns how many there was room for.
    #[inline]
    pub(crate) fn write(&self, cursor: &mut Cursor, bytes: &[u8]) -> usize {
        self.batch.write(cursor, bytes)
    }

    /// Puts a chain on the used ring, to be seen with the next [`SplitRing::publish`]. Chains must be completed in the
    /// order taken.
    #[inline]
    pub(crate) fn complete(&mut self, chain: &Chain, written: u32) {
        self.parts
            .write_used(self.used_idx.wrapping_add(self.staged), chain.id, written);
        self.staged = self.staged.wrapping_add(1);
    }

    /// Shows the driver what was completed.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.staged > 0 {
            self.used_idx = self.used_idx.wrapping_add(self.staged);
            self.staged = 0;
            // Release: the used elements and the buffers' bytes are written before the index says so.
            self.parts
                .used_u16(2)
                .store(self.used_idx.to_le(), Ordering::Release);
        }
    }

    #[inline]
    fn load_avail_idx(&self) -> u16 {
        // Acquire: entries and descriptors are read after the index that covers them.
        u16::from_le(self.parts.avail_u16(2).load(Ordering::Acquire))
    }

    /// Entries that can be taken; looks at the driver's index if fewer than `wanted` are known of.
    #[inline]
    fn available(&mut self, wanted: usize) -> Result<u16, RingError> {
        let known = self.avail_idx.wrapping_sub(self.next_avail);
        if usize::from(known) >= wanted {
            return Ok(known);
        }
        let avail = self.load_avail_idx();
        let ahead = avail.wrapping_sub(self.next_avail);
        if ahead > self.parts.size {
            let (next, size) = (self.next_avail, self.parts.size);
            return Err(RingError::AvailTooFarAhead {
                avail,
                next,
                ahead,
                size,
            });
        }
        self.avail_idx = avail;
        Ok(ahead)
    }

    /// Takes the next chain. `false`: the batch has no room for it, and it was not taken.
    fn take(&mut self, direction: Direction, walked: &mut u32) -> Result<bool, RingError> {
        if self.batch.is_full() {
            return Ok(false);
        }
        let entry = self.next_avail;
        let head = self.parts.avail_entry(entry);
        if head >= self.parts.size {
            return Err(RingError::HeadOutOfRange {
                entry,
                head,
                size: self.parts.size,
            });
        }
        let truncated = match self.walk(head, direction, walked) {
            Ok(()) => false,
            // Alone and still too long: what was kept of it is all that is ever kept.
            Err(Stop::Full) if self.batch.chains().is_empty() => true,
            Err(Stop::Full) => {
                self.batch.abort();
                return Ok(false);
            }
            Err(Stop::Broken(error)) => {
                self.batch.abort();
                return Err(error);
            }
        };
        self.batch.close(head, truncated);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Follows a chain from its head and pushes its buffers of one direction. Buffers of the other are never touched, so
    /// their addresses do not matter.
    fn walk(&mut self, head: u16, direction: Direction, walked: &mut u32) -> Result<(), Stop> {
        let ring_size = u32::from(self.parts.size);
        // (guest address, descriptors) of the indirect table once the chain has entered one.
        let mut table: Option<(u64, u32)> = None;
        let mut index = head;
        let mut limit = ring_size;
        let mut count = 0;
        let mut bytes = 0u64;
        let mut writable_seen = false;
        loop {
            if count == limit {
                return Err(RingError::ChainTooLong { head, limit }.into());
            }
            count += 1;
            *walked += 1;
            let desc = match table {
                None => self.parts.descriptor(index),
                Some((addr, _)) => self.table_descriptor(head, addr, index)?,
            };
            if desc.flags & DESC_F_INDIRECT != 0 {
                let entries = self.check_indirect(head, &desc, table.is_some())?;
                table = Some((desc.addr, entries));
                index = 0;
                limit = count + entries.min(ring_size.max(u32::from(MAX_INDIRECT_CHAIN)));
                continue;
            }
            let writable = desc.flags & DESC_F_WRITE != 0;
            if writable_seen && !writable {
                return Err(RingError::ReadableAfterWritable { head }.into());
            }
            writable_seen |= writable;
            bytes += u64::from(desc.len);
            if bytes > u64::from(u32::MAX) {
                return Err(RingError::TooManyBytes { head }.into());
            }
            if writable == (direction == Direction::Writable) {
                self.batch
                    .push(desc.addr, desc.len)
                    .map_err(|refusal| match refusal {
                        Refusal::Full => Stop::Full,
                        Refusal::OutsideMemory => RingError::BufferOutsideMemory {
                            head,
                            addr: desc.addr,
                            len: desc.len,
                        }
                        .into(),
                    })?;
            }
            if desc.flags & DESC_F_NEXT == 0 {
                break;
            }
            index = desc.next;
            let entries = table.map_or(ring_size, |(_, entries)| entries);
            if u32::from(index) >= entries {
                return Err(RingError::NextOutOfRange {
                    head,
                    next: index,
                    entries,
                }
                .into());
            }
        }
        if direction == Direction::Writable && !writable_seen {
            return Err(RingError::NothingWritable { head }.into());
        }
        Ok(())
    }

    /// Checks a descriptor that refers to an indirect table; returns the table's number of descriptors.
    fn check_indirect(&self, head: u16, desc: &Descriptor, nested: bool) -> Result<u32, RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated { head });
        }
        if nested {
            return Err(RingError::IndirectNested { head });
        }
        if desc.flags & DESC_F_NEXT != 0 {
            return Err(RingError::IndirectWithNext { head });
        }
        if desc.len == 0 || !desc.len.is_multiple_of(16) {
            return Err(RingError::IndirectLength { head, len: desc.len });
        }
        Ok(desc.len / 16)
    }

    /// Reads a descriptor of an indirect table, which may begin at any address and cross regions.
    fn table_descriptor(&mut self, head: u16, table: u64, index: u16) -> Result<Descriptor, RingError> {
        let outside = |addr| RingError::IndirectOutsideMemory { head, addr };
        let addr = table.checked_add(u64::from(index) * 16).ok_or(outside(table))?;
        let memory = Arc::as_ref(self.batch.memory());
        let (host, here) = memory
            .resolve(&mut self.table_window, addr, 16)
            .ok_or(outside(addr))?;
        if here == 16 {
            // SAFETY: 16 bytes from `host` on lie in the guest's memory, which the batch keeps mapped.
            return Ok(unsafe { Descriptor::read(host) });
        }
        let mut bytes = [0; DESC_BYTES];
        for (byte, at) in bytes.iter_mut().zip(0..) {
            let addr = addr.checked_add(at).ok_or(outside(addr))?;
            let (host, _) = memory
                .resolve(&mut self.table_window, addr, 1)
                .ok_or(outside(addr))?;
            // SAFETY: one byte at `host` lies in the guest's memory, which the batch keeps mapped.
            *byte = unsafe { host.read_volatile() };
        }
        // SAFETY: the array is a readable place of 16 bytes.
        Ok(unsafe { Descriptor::read(NonNull::from(&bytes).cast()) })
    }
}
