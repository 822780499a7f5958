//! Chains of descriptors, gathered into host segments that were checked once.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::bytes::{
    CACHE_LINE, Lines, copy, copy_and_fetch, copy_once, prefetch_read, prefetch_write, read_once,
    read_once_16,
};
use super::walk::{DESC_F_WRITE, WALK_BUDGET};
use crate::memory::guest::{GuestMemory, Window};

/// Segments that a batch has room for: a chain that alone needs more is an absurd way to describe a frame.
pub(super) const MAX_SEGMENTS: usize = 1024;
const _: () = assert!(MAX_SEGMENTS <= u16::MAX as usize);

/// Chains that a batch has room for.
pub(super) const MAX_CHAINS: usize = 256;

/// The first bytes of a frame: addresses, type and a VLAN tag's id.
pub(crate) type Head = [u8; 16];
/// Bytes of a [`Head`].
pub(crate) const HEAD: usize = size_of::<Head>();

/// The beginning of a chain, each byte of it read exactly once; zeros behind its end.
pub(crate) struct Front {
    /// Its first two bytes.
    pub(crate) first: [u8; 2],
    /// What comes behind the header.
    pub(crate) head: Head,
}

/// Bytes of a virtio-net header with the number of buffers.
pub(crate) const HEADER: usize = 12;

/// Which descriptors of a chain are wanted, as the device sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Those it may read: guest TX.
    Readable,
    /// Those it may write: guest RX.
    Writable,
}

impl Direction {
    /// What the flags of a descriptor say of the direction.
    #[inline(always)]
    pub(super) fn flag(self) -> u16 {
        match self {
            Direction::Readable => 0,
            Direction::Writable => DESC_F_WRITE,
        }
    }

    /// Starts to bring a line of a buffer into the cache.
    #[inline(always)]
    fn prefetch(self, host: NonNull<u8>) {
        match self {
            Direction::Readable => prefetch_read(host.as_ptr()),
            Direction::Writable => prefetch_write(host.as_ptr()),
        }
    }

    /// Starts to bring the beginning of a buffer of `len` bytes into the cache.
    #[inline(always)]
    fn prefetch_front(self, host: NonNull<u8>, len: u32) {
        if ends_a_line(host) && len as usize > HEADER {
            // Only to be read in either direction: see `put_header`.
            prefetch_read(host.as_ptr());
            // SAFETY: the buffer is longer than that.
            self.prefetch(unsafe { host.add(HEADER) });
        } else {
            self.prefetch(host);
        }
    }
}

/// Whether a virtio-net header at `host` ends where a cache line does, so that it has that line without any of the frame.
#[inline(always)]
fn ends_a_line(host: NonNull<u8>) -> bool {
    host.as_ptr()
        .addr()
        .wrapping_add(HEADER)
        .is_multiple_of(CACHE_LINE)
}

/// Writes a header, unless it is there and in lines of its own.
///
/// Drivers that keep the header right before the payload, as DPDK's do, get the same header in the same place again and again. As
/// long as neither side writes it both keep its line; writing it moves the line to our core and back for each frame.
///
/// # Safety
/// `host` must be valid for reading and writing as many bytes.
#[inline(always)]
unsafe fn put_header(header: &[u8; HEADER], host: NonNull<u8>) {
    // SAFETY: as the caller vouches; the array is ours. The guest may write meanwhile: then it spoils its own header.
    unsafe {
        let is_there = || {
            let (first, last) = (read_once::<u64>(host), read_once::<u32>(host.add(8)));
            first.to_ne_bytes() == header[..8] && last.to_ne_bytes() == header[8..]
        };
        if !(ends_a_line(host) && is_there()) {
            copy(NonNull::from(header).cast(), host, HEADER);
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

/// A descriptor that is a chain of its own.
pub(super) struct Lone {
    pub(super) id: u16,
    pub(super) addr: u64,
    pub(super) len: u32,
}

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
    open: (u16, u32),
    /// Descriptors that were followed for it.
    walked: u32,
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
            walked: 0,
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.chains.clear();
        self.open = (0, 0);
        self.walked = 0;
    }

    /// Counts descriptors that are followed.
    #[inline]
    pub(super) fn walk(&mut self, descriptors: u32) {
        self.walked += descriptors;
    }

    pub(super) fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// Whether the batch can or should not take one chain more, however short.
    pub(super) fn is_full(&self) -> bool {
        self.chains.len() == MAX_CHAINS || self.walked >= WALK_BUDGET
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

    /// Adds chains of one buffer, each of which takes one place in the ring, while `next` gives them, at most `most`; returns how many
    /// there were. Nearly every chain is like that. Stops before one whose buffer does not lie in the region that was used last,
    /// which must be looked into.
    #[inline(always)]
    pub(super) fn push_lone(
        &mut self,
        most: usize,
        direction: Direction,
        mut next: impl FnMut(u16) -> Option<Lone>,
    ) -> u16 {
        let first = self.segments.len();
        let room = (MAX_SEGMENTS - first).min(MAX_CHAINS - self.chains.len());
        let segments = self.segments.spare_capacity_mut().iter_mut();
        let chains = self.chains.spare_capacity_mut().iter_mut();
        let mut count = 0;
        for ((segment, chain), at) in segments.zip(chains).zip(0..).take(most.min(room)) {
            let Some(Lone { id, addr, len }) = next(at) else {
                break;
            };
            let Some(host) = self.window.holds(addr, len) else {
                break;
            };
            direction.prefetch_front(host, len);
            segment.write(Segment { host, len });
            chain.write(Chain {
                id,
                entries: 1,
                first: narrow(first + usize::from(at)),
                segments: 1,
                len,
                truncated: false,
            });
            count = at + 1;
        }
        let added = usize::from(count);
        // SAFETY: so many elements behind the former end were just written, in both, within their capacities.
        unsafe {
            self.segments.set_len(first + added);
            self.chains.set_len(self.chains.len() + added);
        }
        self.open = (narrow(first + added), 0);
        self.walked += u32::from(count);
        count
    }

    /// Ends the open chain, which takes `entries` places in the ring.
    pub(super) fn close(&mut self, id: u16, entries: u16, truncated: bool) {
        let (first, len) = self.open;
        self.chains.push(Chain {
            id,
            entries,
            first,
            segments: narrow(self.segments.len()) - first,
            len,
            truncated,
        });
        self.open = (narrow(self.segments.len()), 0);
    }

    /// Forgets the open chain.
    pub(super) fn abort(&mut self) {
        self.segments.truncate(self.open.0.into());
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

    /// The beginning of a chain whose header has `skip` bytes, at least two.
    #[inline(always)]
    pub(super) fn front(&self, chain: &Chain, skip: usize) -> Front {
        match self.segments.get(usize::from(chain.first)) {
            Some(segment) if segment.len as usize >= skip + HEAD => {
                // SAFETY: the segment, which lies in `self.memory`, has at least as many bytes; packed words may lie at any
                // address.
                unsafe {
                    Front {
                        first: read_once::<u16>(segment.host).to_ne_bytes(),
                        head: read_once_16(segment.host.add(skip)),
                    }
                }
            }
            _ => self.scattered_front(chain, skip),
        }
    }

    #[cold]
    fn scattered_front(&self, chain: &Chain, skip: usize) -> Front {
        const LONGEST_HEADER: usize = 12;
        let mut bytes = [0; LONGEST_HEADER + HEAD];
        // A legacy header is shorter: what is read for a longer one is not looked at.
        let len = chain.len().min(bytes.len());
        self.read_once(chain, &mut bytes[..len]);
        let head = bytes.get(skip..).and_then(|bytes| bytes.first_chunk());
        Front {
            first: [bytes[0], bytes[1]],
            head: head.copied().unwrap_or_default(),
        }
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

    /// Takes a line of each segment, the one behind a header at its beginning, away from other cores, all at once, by writing to it: it
    /// is about to be overwritten. What a driver has read is in our cache still, but shared, and a prefetch to write does nothing for
    /// a line that is there: each frame's first store would wait for the other core in turn. It does so too if these stores are not
    /// close together.
    #[inline(always)]
    pub(super) fn claim(&self) {
        for segment in &self.segments {
            if segment.len as usize > HEADER {
                // SAFETY: the segment, which lies in `self.memory`, has that byte. Its chain is available, so its bytes are ours to
                // write (virtio 1.2, 2.7.4), also if it should not be filled now.
                unsafe { segment.host.add(HEADER).write_volatile(0) };
            }
        }
    }

    /// The second and further cache lines of the first `len` bytes of a chain, as far as these lie together: the first one is on its way
    /// since it was gathered.
    #[inline(always)]
    pub(super) fn lines(&self, chain: &Chain, len: usize) -> Lines {
        match self.segments.get(usize::from(chain.first)) {
            Some(segment) => Lines::behind_the_first(segment.host, len.min(segment.len as usize)),
            None => Lines::NONE,
        }
    }

    /// Copies the bytes of a chain from `skip` on, as many as `out` takes: at once, if the chain is of one segment and has them. `false`,
    /// and nothing done, if not.
    #[inline(always)]
    pub(super) fn read_whole(&self, chain: &Chain, skip: usize, out: &mut [u8]) -> bool {
        let Some(from) = self.lone_segment(chain) else {
            return false;
        };
        if skip + out.len() > from.len as usize {
            return false;
        }
        // SAFETY: the range was just found to lie in the segment; for the rest, as in `read`.
        unsafe { copy(from.host.add(skip), NonNull::from(&mut *out).cast(), out.len()) };
        true
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

    /// Puts `header` and `frame` into a chain: at once, if it is of one segment and has room. `false`, and nothing done, if not. Meanwhile
    /// brings in the `next` frame, but for its first line.
    #[inline(always)]
    pub(super) fn write_whole(
        &self,
        chain: &Chain,
        header: &[u8; HEADER],
        frame: &[u8],
        next: Option<&[u8]>,
    ) -> bool {
        let Some(into) = self.lone_segment(chain) else {
            return false;
        };
        if header.len() + frame.len() > into.len as usize {
            return false;
        }
        // SAFETY: the segment was just found to have room for both; for the rest, as in `write`.
        unsafe {
            put_header(header, into.host);
            let (from, into) = (NonNull::from(frame).cast(), into.host.add(header.len()));
            match next {
                Some(next) => {
                    let lines = Lines::behind_the_first(NonNull::from(next).cast(), next.len());
                    copy_and_fetch(from, into, frame.len(), lines);
                }
                None => copy(from, into, frame.len()),
            }
        }
        true
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

    /// Puts `header`, `head` and then the bytes of a chain of another batch from `from` up to `to` into a chain: at once, if both
    /// chains are of one segment and have them. `false`, and nothing done, if not. Meanwhile brings in what is read `next`.
    #[inline(always)]
    pub(super) fn pass_whole(
        &self,
        chain: &Chain,
        rest: Range<usize>,
        target: (&Batch, &Chain),
        (header, head): (&[u8; HEADER], &Head),
        next: Option<Lines>,
    ) -> bool {
        let (Some(from), Some(into)) = (self.lone_segment(chain), target.0.lone_segment(target.1)) else {
            return false;
        };
        let len = rest.end.wrapping_sub(rest.start);
        let lead = header.len() + HEAD;
        if rest.start > rest.end || rest.end > from.len as usize || lead + len > into.len as usize {
            return false;
        }
        // SAFETY: both ranges were just found to lie in their segments; for the rest, as in `transfer`. The arrays are ours.
        unsafe {
            put_header(header, into.host);
            copy(NonNull::from(head).cast(), into.host.add(header.len()), HEAD);
            let (from, into) = (from.host.add(rest.start), into.host.add(lead));
            match next {
                Some(lines) => copy_and_fetch(from, into, len, lines),
                None => copy(from, into, len),
            }
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
