//! The split virtqueue (virtio 1.2, 2.7), device side.

use std::sync::atomic::{Ordering, fence};

use super::chain::{Direction, Lone};
use super::engine::{Core, Engine, More};
use super::layout::{Descriptor, Parts};
use super::notify::need_event;
use super::walk::{DESC_F_INDIRECT, DESC_F_NEXT, Stop, Walk};
use super::{MAX_INDIRECT_CHAIN, RingError, RingSpec};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// A split virtqueue (virtio 1.2, 2.7), device side, with its pointers resolved.
///
/// Of the indexes, the driver's are read again only when the entries known of are not enough, and ours are written once a
/// burst. One thread at a time may work on it; it may move between threads.
pub struct SplitRing {
    parts: Parts,
    core: Core,
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

// SAFETY: the addresses it holds belong to no thread, and they stay mapped while the batch in it holds the memory map.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Resolves and checks the ring's addresses. The used index is read from the ring, where a predecessor left it.
    pub fn new(spec: &RingSpec) -> Result<SplitRing, RingError> {
        let parts = Parts::new(spec)?;
        let used_idx = u16::from_le(parts.used_u16(2).load(Ordering::Relaxed));
        let [low, high, ..] = spec.base.to_le_bytes();
        let base = u16::from_le_bytes([low, high]);
        let mut ring = SplitRing {
            parts,
            core: Core::new(spec),
            next_avail: base,
            avail_idx: base,
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
    pub fn base(&self) -> u32 {
        self.next_avail.into()
    }

    /// Asks the driver for notifications (kicks), then looks again: `true` means work is there, do not sleep.
    pub fn arm(&mut self) -> bool {
        if self.core.event_idx {
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
        if !self.core.event_idx && !self.suppressed {
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
            return self.core.call.signal();
        };
        // Our index was stored before, the driver's wish is loaded after: either it sees the index before it sleeps, or
        // we see its wish (the twin of the fence in `arm`).
        fence(Ordering::SeqCst);
        let wanted = if self.core.event_idx {
            let event = u16::from_le(self.parts.used_event().load(Ordering::Relaxed));
            need_event(event, self.used_idx, old)
        } else {
            u16::from_le(self.parts.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        };
        wanted && self.core.call.signal()
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

    /// Takes chains of one buffer, as most are, up to the first other one or `most`, of which all are available; returns how many.
    #[inline(always)]
    fn take_lone(&mut self, direction: Direction, most: usize) -> u16 {
        let (next, parts) = (self.next_avail, &self.parts);
        let taken = self.core.batch.push_lone(most, direction, |by| {
            let head = parts.avail_entry(next.wrapping_add(by));
            if head >= parts.size {
                return None;
            }
            let Descriptor { addr, len, flags, .. } = parts.descriptor(head);
            (flags == direction.flag()).then_some(Lone { id: head, addr, len })
        });
        self.next_avail = next.wrapping_add(taken);
        taken
    }

    /// Takes the next chain. `false`: the batch has no room for it, and it was not taken.
    // Seldom called, and the loop of `take_lone` beside it needs the registers.
    #[inline(never)]
    fn take(&mut self, direction: Direction) -> Result<bool, RingError> {
        if self.core.batch.is_full() {
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
        match self.walk(head, direction) {
            Ok(truncated) => {
                self.core.batch.close(head, 1, truncated);
                self.next_avail = self.next_avail.wrapping_add(1);
                Ok(true)
            }
            Err(stop) => {
                self.core.batch.abort();
                match stop {
                    Stop::Full => Ok(false),
                    Stop::Broken(error) => Err(error),
                }
            }
        }
    }

    /// Follows a chain from its head; returns whether only a part of it was kept.
    fn walk(&mut self, head: u16, direction: Direction) -> Result<bool, Stop> {
        let Core { batch, tables, .. } = &mut self.core;
        let ring_size = u32::from(self.parts.size);
        let mut walk = Walk::new(head, direction);
        // (guest address, descriptors) of the indirect table once the chain has entered one.
        let mut table: Option<(u64, u32)> = None;
        let mut index = head;
        let mut limit = ring_size;
        let mut count = 0;
        loop {
            if count == limit {
                return Err(RingError::ChainTooLong { head, limit }.into());
            }
            count += 1;
            batch.walk(1);
            let desc = match table {
                None => self.parts.descriptor(index),
                Some((addr, _)) => Descriptor::from(tables.read(batch.memory(), head, addr, index)?),
            };
            if desc.flags & DESC_F_INDIRECT != 0 {
                let entries = tables.check(head, desc.len, desc.flags, table.is_some())?;
                table = Some((desc.addr, entries));
                index = 0;
                limit = count + entries.min(ring_size.max(u32::from(MAX_INDIRECT_CHAIN)));
                continue;
            }
            walk.buffer(batch, desc.addr, desc.len, desc.flags)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return walk.end();
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
    }
}

impl Engine for SplitRing {
    #[inline]
    fn core(&self) -> &Core {
        &self.core
    }

    #[inline]
    fn size(&self) -> u16 {
        self.parts.size
    }

    fn gather(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        self.core.batch.clear();
        self.gather_more(direction, max)
    }

    fn gather_more(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        let available = usize::from(self.available(max)?);
        if available == 0 {
            return Ok(More::Empty);
        }
        let mut taken = 0;
        let most = available.min(max);
        loop {
            let lone = self.take_lone(direction, most - taken);
            taken += usize::from(lone);
            if taken == most {
                break;
            }
            match self.take(direction) {
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

    fn return_from(&mut self, index: usize) {
        let left = self.core.batch.entries_from(index);
        self.next_avail = self.next_avail.wrapping_sub(left);
        self.core.batch.clear();
    }

    #[inline(always)]
    fn complete(&mut self, from: usize, written: impl IntoIterator<Item = u32>) {
        let chains = self.core.batch.chains().get(from..).unwrap_or_default();
        let mut counter = self.used_idx.wrapping_add(self.staged);
        for (chain, written) in chains.iter().zip(written) {
            self.parts.write_used(counter, chain.id, written);
            counter = counter.wrapping_add(1);
        }
        self.staged = counter.wrapping_sub(self.used_idx);
    }

    #[inline]
    fn forget(&mut self) {
        self.core.batch.clear();
    }

    #[inline]
    fn publish(&mut self) {
        if self.staged > 0 {
            self.used_idx = self.used_idx.wrapping_add(self.staged);
            self.staged = 0;
            // Release: the used elements and the buffers' bytes are written before the index says so.
            self.parts
                .used_u16(2)
                .store(self.used_idx.to_le(), Ordering::Release);
        }
    }
}
