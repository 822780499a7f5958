//! Frame memory: one memfd-backed region cut into chunks, registered with every NIC queue, with a state for
//! every chunk.
//!
//! One region for the whole daemon, so that a frame that any worker holds can be sent on any NIC. A [`Frame`] is an owning
//! token: who holds it may read and write its bytes, nobody else can, and it must be given back.
//!
//! # Who may touch a chunk
//!
//! Each chunk has a [`ChunkState`], and only the party that the state names may move it on:
//!
//! ```text
//!            alloc                        send
//!   Free ------------> Held (a Frame) -------------> Tx(queue)
//!   ^ ^  <------------   ^                               |
//!   | |      free        | receive                       | reap (completion)
//!   | |                  |                               |
//!   | +---------------- Fill(queue) <--- refill --- Free <
//!   |                      |
//!   +-- Quarantined <------+---- socket retired (also from Tx)
//! ```
//!
//! Every arrow checks the state it comes from. A mismatch (a kernel that returns an address twice, or a coding error) is counted
//! in [`FrameMemory::state_errors`] and the chunk is left where it is: a lost chunk is better than one with two owners.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

mod cache;
mod frame;
mod handover;
mod region;
#[cfg(test)]
mod tests;

pub use cache::ChunkCache;
pub use frame::Frame;
use frame::{MAX_CHUNKS, MAX_MEMORIES};
use region::Region;

/// Bytes of one chunk. AF_XDP takes no larger one (a jumbo frame is several chunks).
pub const CHUNK_SIZE: usize = 4096;

/// Most chunks of one frame.
pub const MAX_SEGMENTS: usize = 4;

/// Bytes left free before the data of each chunk, on both ways: the kernel does so when it receives (XDP_PACKET_HEADROOM), and
/// frames made here do so that TX metadata fits in front.
pub const HEADROOM: usize = 256;

/// Most bytes of one segment of a frame that [`ChunkCache::alloc`] makes. A frame up to this long has one segment.
pub const SEGMENT_SIZE: usize = CHUNK_SIZE - HEADROOM;

/// [`CHUNK_SIZE`] as the kernel writes it.
pub(crate) const CHUNK_SIZE_U32: u32 = 4096;
const CHUNK_SHIFT: u32 = 12;
const NO_CHUNK: u32 = u32::MAX;

/// Where a chunk is. Stored per chunk, checked at every hand-over, so that neither a kernel nor a coding error can make
/// two owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// In a pool.
    Free,
    /// Part of a [`Frame`] that a worker or a hand-off ring holds.
    Held,
    /// On the fill ring of the NIC with this index: the kernel may write to it.
    Fill(u8),
    /// On the TX ring of the NIC with this index: the kernel may read from it.
    Tx(u8),
    /// Belongs to a retired socket: nobody's until its teardown is over.
    Quarantined(u8),
}

/// One opened NIC queue, as the states name it: the NIC's index and a serial number that no two living queues of a NIC share (it
/// would take 65,536 openings while one of them stays open), so that a NIC's several queues, and an old and a new socket of one queue, are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueOwner(u32);

impl QueueOwner {
    /// A new owner for a queue of the NIC with this index.
    pub(crate) fn new(nic: u8) -> QueueOwner {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed) & 0xffff;
        QueueOwner((u32::from(nic) << 16) | serial)
    }

    fn nic(bits: u32) -> u8 {
        let [_, nic, _, _] = bits.to_be_bytes();
        nic
    }
}

/// Bits 24 and up: the kind; bits 0 to 23: the [`QueueOwner`].
mod state {
    use super::QueueOwner;

    pub(super) const FREE: u32 = 0;
    pub(super) const HELD: u32 = 1 << 24;
    const FILL: u32 = 2 << 24;
    const TX: u32 = 3 << 24;
    const QUARANTINED: u32 = 4 << 24;
    const KIND: u32 = 0xff << 24;

    pub(super) fn fill(owner: QueueOwner) -> u32 {
        FILL | owner.0
    }

    pub(super) fn tx(owner: QueueOwner) -> u32 {
        TX | owner.0
    }

    pub(super) fn quarantined(owner: QueueOwner) -> u32 {
        QUARANTINED | owner.0
    }

    pub(super) fn decode(bits: u32) -> super::ChunkState {
        use super::ChunkState;
        match bits & KIND {
            FREE => ChunkState::Free,
            HELD => ChunkState::Held,
            FILL => ChunkState::Fill(QueueOwner::nic(bits)),
            TX => ChunkState::Tx(QueueOwner::nic(bits)),
            _ => ChunkState::Quarantined(QueueOwner::nic(bits)),
        }
    }
}

/// What is known of a chunk. `next`, `offset` and `len` mean something only in a frame, and only its holder touches them; they
/// are atomics, used relaxed, because the type must be shared, and cost what plain loads and stores do. One chunk
/// is 16 bytes, so that a hand-over touches one cache line.
#[repr(align(16))]
struct Chunk {
    state: AtomicU32,
    next: AtomicU32,
    offset: AtomicU16,
    len: AtomicU16,
}

/// The region, the chunks' states, and the pool that workers' caches draw from.
pub struct FrameMemory {
    id: u16,
    region: Region,
    chunks: Box<[Chunk]>,
    pool: Mutex<Vec<u32>>,
    retired: Mutex<Vec<RetiredQueue>>,
    state_errors: AtomicU64,
}

/// A closed socket whose chunks are quarantined until the kernel is known to be done with them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetiredQueue {
    pub(crate) owner: QueueOwner,
    pub(crate) ifindex: u32,
    pub(crate) queue: u32,
    pub(crate) since: Instant,
}

/// Why frame memory cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of frame memory: {source}")]
pub struct FrameMemoryError {
    bytes: usize,
    source: std::io::Error,
}

impl FrameMemory {
    /// Maps a memfd of `chunks` chunks, on huge pages if there are enough, else on ordinary ones.
    ///
    /// # Errors
    ///
    /// `chunks` is 0 or more than 16,777,216 (64 GiB), or the kernel cannot make or map a file of that size.
    pub fn new(chunks: u32) -> Result<Arc<FrameMemory>, FrameMemoryError> {
        /// Memories made so far. A frame names its own by a number that must not come again.
        static MADE: AtomicU16 = AtomicU16::new(0);
        let bytes = chunks as usize * CHUNK_SIZE;
        let refused = |kind: std::io::ErrorKind| FrameMemoryError {
            bytes,
            source: kind.into(),
        };
        if chunks > MAX_CHUNKS {
            return Err(refused(std::io::ErrorKind::InvalidInput));
        }
        let id = MADE
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |made| {
                (made < MAX_MEMORIES).then(|| made + 1)
            })
            .map_err(|_| refused(std::io::ErrorKind::QuotaExceeded))?;
        let region = Region::new(bytes).map_err(|source| FrameMemoryError { bytes, source })?;
        let table = (0..chunks)
            .map(|_| Chunk {
                state: AtomicU32::new(state::FREE),
                next: AtomicU32::new(NO_CHUNK),
                offset: AtomicU16::new(0),
                len: AtomicU16::new(0),
            })
            .collect();
        Ok(Arc::new(FrameMemory {
            id,
            region,
            chunks: table,
            // The last is taken first: begin with low addresses.
            pool: Mutex::new((0..chunks).rev().collect()),
            retired: Mutex::new(Vec::new()),
            state_errors: AtomicU64::new(0),
        }))
    }

    /// Whether the region is on huge pages.
    #[must_use]
    pub fn on_huge_pages(&self) -> bool {
        self.region.huge()
    }

    /// Chunks in the region.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        u32::try_from(self.chunks.len()).expect("`new` was given a u32")
    }

    /// First segment of a frame: at least its headers (a frame shorter than 3,500 bytes has one segment only).
    #[inline]
    #[must_use]
    pub fn head<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        self.check(frame);
        self.segment(frame.head())
    }

    /// The segments in order; together they are `frame.len()` bytes.
    pub fn segments<'a>(&'a self, frame: &'a Frame) -> impl Iterator<Item = &'a [u8]> {
        self.indexes(frame).map(|index| self.segment(index))
    }

    /// The first segment, to change in place (a VLAN tag, a checksum).
    #[inline]
    #[must_use]
    pub fn head_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        self.check(frame);
        self.segment_mut(frame.head())
    }

    /// Lengthens the frame by `count` bytes in front of its first, out of the headroom; their content is undefined. `false`, and
    /// nothing done, when there is not so much headroom left.
    #[must_use]
    pub fn push_front(&self, frame: &mut Frame, count: u16) -> bool {
        self.check(frame);
        let chunk = self.chunk(frame.head());
        let (offset, len) = (
            chunk.offset.load(Ordering::Relaxed),
            chunk.len.load(Ordering::Relaxed),
        );
        let (Some(offset), Some(len)) = (offset.checked_sub(count), len.checked_add(count)) else {
            return false;
        };
        chunk.offset.store(offset, Ordering::Relaxed);
        chunk.len.store(len, Ordering::Relaxed);
        frame.lengthen(count.into());
        true
    }

    /// Shortens the frame by its first `count` bytes. `false`, and nothing done, when its first segment has not more than that.
    #[must_use]
    pub fn pull_front(&self, frame: &mut Frame, count: u16) -> bool {
        self.check(frame);
        let chunk = self.chunk(frame.head());
        let len = chunk.len.load(Ordering::Relaxed);
        if len <= count {
            return false;
        }
        // Cannot overflow: the segment's bytes end inside its chunk.
        let offset = chunk.offset.load(Ordering::Relaxed) + count;
        chunk.offset.store(offset, Ordering::Relaxed);
        chunk.len.store(len - count, Ordering::Relaxed);
        frame.shorten(count.into());
        true
    }

    /// The segments in order, to be written in place.
    pub fn segments_mut<'a>(&'a self, frame: &'a mut Frame) -> impl Iterator<Item = &'a mut [u8]> {
        // Each index comes once: a chunk is in one frame, once.
        self.indexes(frame).map(|index| self.segment_mut(index))
    }

    /// Copies bytes into a frame that [`ChunkCache::alloc`] gave, from `offset` on. Panics past the end.
    pub fn write(&self, frame: &mut Frame, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(
            end.is_some_and(|end| end <= frame.len()),
            "write past the end of a frame"
        );
        let mut skip = offset;
        let mut rest = bytes;
        for segment in self.segments_mut(frame) {
            if rest.is_empty() {
                return;
            }
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            let room = &mut segment[skip..];
            let (now, later) = rest.split_at(room.len().min(rest.len()));
            room[..now.len()].copy_from_slice(now);
            skip = 0;
            rest = later;
        }
    }

    /// A second frame with the same bytes (a broadcast goes to several), or `None` when chunks ran out.
    pub fn copy_of(&self, chunks: &mut ChunkCache, frame: &Frame) -> Option<Frame> {
        let mut copy = chunks.alloc(frame.len())?;
        let mut offset = 0;
        for segment in self.segments(frame) {
            chunks.memory().write(&mut copy, offset, segment);
            offset += segment.len();
        }
        Some(copy)
    }

    /// Hand-overs refused because a chunk was not in the state it had to be in: its chunk is never used again. Not zero means a
    /// kernel, a driver or this program has a bug.
    #[must_use]
    pub fn state_errors(&self) -> u64 {
        self.state_errors.load(Ordering::Relaxed)
    }

    /// Chunks by state, for statistics and leak tests (approximate while workers run).
    #[must_use]
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for chunk in &self.chunks {
            *match state::decode(chunk.state.load(Ordering::Relaxed)) {
                ChunkState::Free => &mut census.free,
                ChunkState::Held => &mut census.held,
                ChunkState::Fill(_) => &mut census.fill,
                ChunkState::Tx(_) => &mut census.tx,
                ChunkState::Quarantined(_) => &mut census.quarantined,
            } += 1;
        }
        census
    }

    fn check(&self, frame: &Frame) {
        assert_eq!(frame.memory(), self.id, "a frame of another frame memory");
    }

    fn indexes<'a>(&'a self, frame: &'a Frame) -> impl Iterator<Item = u32> + 'a {
        self.check(frame);
        let mut next = frame.head();
        (0..frame.segment_count()).map(move |_| {
            let index = next;
            next = self.chunk(index).next.load(Ordering::Relaxed);
            index
        })
    }

    fn chunk(&self, index: u32) -> &Chunk {
        &self.chunks[index as usize]
    }

    /// The bytes of a segment. Only for a chunk of a frame that the caller has borrowed.
    fn segment(&self, index: u32) -> &[u8] {
        let (start, len) = self.extent(index);
        // SAFETY: `index` comes from a frame of this memory (checked by `check`), whose token the caller has borrowed for as long as
        // the slice lives. Its chunk is `Held`, which only this token's holder can change; so neither a kernel nor another
        // thread writes to it meanwhile.
        unsafe { self.region.bytes(start, len) }
    }

    #[expect(
        clippy::mut_from_ref,
        reason = "the token, not the region, is what is borrowed mutably"
    )]
    fn segment_mut(&self, index: u32) -> &mut [u8] {
        let (start, len) = self.extent(index);
        // SAFETY: as in `segment`; besides, the callers have the token borrowed mutably, and no chunk is twice in a frame,
        // so no other slice of this chunk lives.
        unsafe { self.region.bytes_mut(start, len) }
    }

    /// The bytes of a segment that is on its way out: only for who holds the sending half of the queue that the chunk's state
    /// names, and found it in state Tx.
    fn sending_segment(&self, index: u32) -> &[u8] {
        let (start, len) = self.extent(index);
        // SAFETY: in state Tx a chunk has no writer: the kernel only reads what is on a TX ring, and the chunk can leave that state
        // only by the sending half (a completion), which the caller holds for as long as it uses the slice.
        unsafe { self.region.bytes(start, len) }
    }

    fn extent(&self, index: u32) -> (usize, usize) {
        let chunk = self.chunk(index);
        let offset = usize::from(chunk.offset.load(Ordering::Relaxed));
        let len = usize::from(chunk.len.load(Ordering::Relaxed));
        (index as usize * CHUNK_SIZE + offset, len)
    }

    /// Moves a chunk from one state to another, or counts an error and leaves it.
    ///
    /// A load and a store, not a compare-and-swap: whoever is entitled to leave `from` is one party (see the module's text), so if the
    /// chunk is in `from` nobody else changes it; if it is not, it is left alone.
    fn move_on(&self, index: u32, from: u32, to: u32) -> bool {
        let state = &self.chunk(index).state;
        if state.load(Ordering::Relaxed) == from {
            state.store(to, Ordering::Relaxed);
            true
        } else {
            self.state_errors.fetch_add(1, Ordering::Relaxed);
            false
        }
    }

    fn pool(&self) -> MutexGuard<'_, Vec<u32>> {
        // A panic while it was held cannot have left it half changed.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Number of chunks in each state.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    /// In a pool or a worker's cache.
    pub free: u32,
    /// In frames.
    pub held: u32,
    /// On fill rings.
    pub fill: u32,
    /// On TX rings.
    pub tx: u32,
    /// Quarantined.
    pub quarantined: u32,
}
