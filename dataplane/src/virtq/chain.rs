//! Chains of descriptors, gathered into host segments that were checked once.

use std::ptr::NonNull;
use std::sync::Arc;

use super::bytes::{copy, copy_once, prefetch_read, prefetch_write};
use crate::memory::guest::{GuestMemory, Window};

/// Segments that a batch has room for: a chain that alone needs more is an absurd way to describe a frame.
pub(super) const MAX_SEGMENTS: usize = 1024;
const _: () = assert!(MAX_SEGMENTS <= u16::MAX as usize);

/// Chains that a batch has room for.
pub(super) const MAX_CHAINS: usize = 256;

/// Bytes that [`Batch::front`] reads: a virtio-net header and the addresses, type and tag of a frame.
pub(crate) const FRONT: usize = 32;

/// Which descriptors of a chain are wanted, as the device sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Those it may read: guest TX.
    Readable,
    /// Those it may write: guest RX.
    Writable,
}

impl Direction {
    /// Starts to bring the beginning of a buffer into the cache.
    #[inline(always)]
    fn prefetch(self, host: NonNull<u8>) {
        match self {
            Direction::Readable => prefetch_read(host),
            Direction::Writable => prefetch_write(host),
        }
    }
}

/// A gathered chain. It stands for the chain in the calls of the ring that it came from, until the ring gathers anew.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chain {
    /// What the used element names: the chain's first descriptor in a split ring, its buffer id in a packed one.
    pub(super) id: u16,
    /// Places that it takes in the ring: one of a split ring's available ring, its descriptors in a packed ring.
    pub(super) entries: u16,
    /// Of its segments, in the batch.
    first: u16,
    segments: u16,
    len: u32,
    truncated: bool,
}

impl Chain {
    /// Bytes in the descriptors of the wanted direction.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the chain has more segments than are kept; [`Chain::len`] counts those kept.
    #[inline]
    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }
}

/// A place in a batch, for copying across descriptors and chains.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor {
    segment: usize,
    offset: usize,
}

/// Bytes of the guest's memory that lie together in ours. Never empty.
#[derive(Clone, Copy)]
struct Segment {
    host: NonNull<u8>,
    len: u32,
}

// SAFETY: an address belongs to no thread; the batch holds the map that keeps it valid.
unsafe impl Send for Segment {}

/// Why a buffer cannot be added to a batch.
pub(super) enum Refusal {
    /// No room; adding it to an emptier batch may work.
    Full,
    /// It is not within the guest's memory.
    OutsideMemory,
}

/// The chains of a burst. Every segment lies in `memory`, and only [`Batch::push`] adds them: that is what the
/// unsafe blocks here rest on.
pub(super) struct Batch {
    memory: Arc<GuestMemory>,
    window: Window,
    /// Never grows beyond the capacity it was made with.
    segments: Vec<Segment>,
    /// Likewise.
    chains: Vec<Chain>,
    /// The chain that is being gathered: its first segment and its bytes.
    open: (usize, u32),
}

// SAFETY: the only part that is not Send is the address in the window, which belongs to no thread.
unsafe impl Send for Batch {}

impl Batch {
    pub(super) fn new(memory: Arc<GuestMemory>) -> Batch {
        Batch {
            memory,
            window: Window::EMPTY,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            chains: Vec::with_capacity(MAX_CHAINS),
            open: (0, 0),
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.chains.clear();
        self.open = (0, 0);
    }

    pub(super) fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// Whether the batch cannot take one chain more, however short.
    pub(super) fn is_full(&self) -> bool {
        self.chains.len() == MAX_CHAINS
    }

    /// Adds a buffer to the open chain, split where it crosses regions. After a refusal the chain must be aborted or closed.
    #[inline]
    pub(super) fn push(&mut self, mut addr: u64, mut len: u32) -> Result<(), Refusal> {
        while len > 0 {
            let (host, here) = self
                .memory
                .resolve(&mut self.window, addr, len)
                .ok_or(Refusal::OutsideMemory)?;
            if self.segments.len() == MAX_SEGMENTS {
                return Err(Refusal::Full);
            }
            self.segments.push(Segment { host, len: here });
            self.open.1 = self.open.1.saturating_add(here);
            len -= here;
            // Wraps only behind the last byte of the address space, where no region begins.
            addr = addr.wrapping_add(u64::from(here));
        }
        Ok(())
    }

    /// Adds a chain of one buffer, which takes one place in the ring, if the buffer lies in the region that was used last and there
    /// is room: nearly every chain is like that. `false`, and nothing done, where that must be looked into.
    #[inline(always)]
    pub(super) fn push_lone(&mut self, id: u16, addr: u64, len: u32, direction: Direction) -> bool {
        let Some(host) = self.window.holds(addr, len) else {
            return false;
        };
        if self.segments.len() == MAX_SEGMENTS || self.chains.len() == MAX_CHAINS {
            return false;
        }
        direction.prefetch(host);
        let first = self.segments.len();
        self.segments.push(Segment { host, len });
        self.chains.push(Chain {
            id,
            entries: 1,
            first: narrow(first),
            segments: 1,
            len,
            truncated: false,
        });
        self.open = (first + 1, 0);
        true
    }

    /// Ends the open chain, which takes `entries` places in the ring.
    pub(super) fn close(&mut self, id: u16, entries: u16, truncated: bool) {
        let (first, len) = self.open;
        self.chains.push(Chain {
            id,
            entries,
            first: narrow(first),
            segments: narrow(self.segments.len() - first),
            len,
            truncated,
        });
        self.open = (self.segments.len(), 0);
    }

    /// Forgets the open chain.
    pub(super) fn abort(&mut self) {
        self.segments.truncate(self.open.0);
        self.open.1 = 0;
    }

    /// Places in the ring that the chains from `index` on take. They are all different ones, so they are no more than the
    /// ring has.
    pub(super) fn entries_from(&self, index: usize) -> u16 {
        let chains = self.chains.get(index..).unwrap_or_default();
        chains
            .iter()
            .fold(0, |sum, chain| sum.saturating_add(chain.entries))
    }

    fn segments_of(&self, chain: &Chain) -> &[Segment] {
        let first = usize::from(chain.first);
        self.segments
            .get(first..first + usize::from(chain.segments))
            .unwrap_or_default()
    }

    /// The segment of a chain that has just one.
    #[inline]
    fn lone_segment(&self, chain: &Chain) -> Option<&Segment> {
        self.segments
            .get(usize::from(chain.first))
            .filter(|_| chain.segments == 1)
    }

    /// The first bytes of a chain, each read exactly once; zeros behind its end.
    #[inline(always)]
    pub(super) fn front(&self, chain: &Chain) -> [u8; FRONT] {
        let mut front = [0; FRONT];
        match self.segments.get(usize::from(chain.first)) {
            Some(segment) if segment.len as usize >= FRONT => {
                // SAFETY: the segment, which lies in `self.memory`, has as many bytes as `front`.
                unsafe { copy_once(segment.host, &mut front) };
            }
            _ => {
                let len = chain.len().min(FRONT);
                self.read_once(chain, &mut front[..len]);
            }
        }
        front
    }

    /// Copies bytes from the start of a chain; each byte of the guest's memory is read exactly once. Returns whether the
    /// chain has that many.
    fn read_once(&self, chain: &Chain, out: &mut [u8]) -> bool {
        if chain.len() < out.len() {
            return false;
        }
        let mut rest = out;
        for segment in self.segments_of(chain) {
            let here = rest.len().min(segment.len as usize);
            let (now, later) = rest.split_at_mut(here);
            // SAFETY: `now` is no longer than the segment, which lies in `self.memory`.
            unsafe { copy_once(segment.host, now) };
            if later.is_empty() {
                return true;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// The place of the byte that `skip` bytes of a chain precede.
    #[inline]
    pub(super) fn cursor(&self, chain: &Chain, mut skip: usize) -> Cursor {
        let mut segment = usize::from(chain.first);
        while let Some(here) = self
            .segments
            .get(segment)
            .map(|s| s.len as usize)
            .filter(|&here| here <= skip)
        {
            skip -= here;
            segment += 1;
        }
        Cursor {
            segment,
            offset: skip,
        }
    }

    /// The bytes that follow a cursor, as far as they lie together, up to `most`; moves the cursor behind them.
    #[inline]
    fn advance(&self, cursor: &mut Cursor, most: usize) -> Option<(NonNull<u8>, usize)> {
        loop {
            let segment = self.segments.get(cursor.segment)?;
            let left = (segment.len as usize).saturating_sub(cursor.offset);
            if left == 0 {
                *cursor = Cursor {
                    segment: cursor.segment + 1,
                    offset: 0,
                };
                continue;
            }
            // SAFETY: offset < segment.len, so the place lies in the segment.
            let host = unsafe { segment.host.add(cursor.offset) };
            let here = left.min(most);
            cursor.offset += here;
            return Some((host, here));
        }
    }

    /// Copies bytes from the cursor on, across segments and chains. Returns how many there were.
    #[inline]
    pub(super) fn read(&self, cursor: &mut Cursor, out: &mut [u8]) -> usize {
        let mut done = 0;
        while done < out.len() {
            let rest = &mut out[done..];
            let Some((host, here)) = self.advance(cursor, rest.len()) else {
                break;
            };
            // SAFETY: `advance` gave `here` bytes of a segment, which lie in `self.memory`, mapped while it lives; `rest` has
            // as many. The guest may write meanwhile: then the copy is a mixture, but it is a copy, and only that is looked
            // at from here on.
            unsafe { copy(host, NonNull::from(rest).cast(), here) };
            done += here;
        }
        done
    }

    /// Writes bytes from the cursor on, across segments and chains. Returns how many there was room for.
    #[inline]
    pub(super) fn write(&self, cursor: &mut Cursor, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let Some((host, here)) = self.advance(cursor, rest.len()) else {
                break;
            };
            // SAFETY: as in `read`, with the segment mapped for writing, too.
            unsafe { copy(NonNull::from(rest).cast(), host, here) };
            done += here;
        }
        done
    }

    /// Copies up to `most` bytes from the cursor on to another batch's cursor, across segments and chains of both. Returns how many
    /// were there and had room.
    #[inline]
    pub(super) fn transfer(&self, from: &mut Cursor, to: &Batch, at: &mut Cursor, most: usize) -> usize {
        let mut done = 0;
        while done < most {
            let mut ahead = *from;
            let Some((source, there)) = self.advance(&mut ahead, most - done) else {
                break;
            };
            let Some((target, here)) = to.advance(at, there) else {
                break;
            };
            ahead.offset -= there - here;
            *from = ahead;
            // SAFETY: `advance` gave at least `here` bytes of a segment of either batch, which its own memory map keeps mapped, for
            // reading and for writing. Two guests may share memory, and either may write meanwhile: then the copy is a
            // mixture, but nothing of it is looked at.
            unsafe { copy(source, target, here) };
            done += here;
        }
        done
    }

    /// Puts `front` and then `len` bytes of a chain of another batch, those that `skip` bytes precede, into a chain: at once, if both
    /// chains are of one segment and have them. `false`, and nothing done, if not.
    #[inline(always)]
    pub(super) fn pass_whole(
        &self,
        chain: &Chain,
        skip: usize,
        len: usize,
        to: &Batch,
        target: &Chain,
        front: &[u8; FRONT],
    ) -> bool {
        let (Some(from), Some(into)) = (self.lone_segment(chain), to.lone_segment(target)) else {
            return false;
        };
        if skip + len > from.len as usize || FRONT + len > into.len as usize {
            return false;
        }
        // SAFETY: both ranges were just found to lie in their segments; for the rest, as in `transfer`. `front` is ours.
        unsafe {
            copy(NonNull::from(front).cast(), into.host, FRONT);
            copy(from.host.add(skip), into.host.add(FRONT), len);
        }
        true
    }
}

/// A batch has no more segments than that.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "MAX_SEGMENTS is checked where it is defined"
)]
fn narrow(segments: usize) -> u16 {
    debug_assert!(segments <= MAX_SEGMENTS);
    segments as u16
}
