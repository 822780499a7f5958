//! Frame memory: one memfd-backed region cut into chunks, registered with every NIC queue, with a state for
//! every chunk.
//!
//! One region for the whole daemon, so that a frame that any worker holds can be sent on any NIC. A [`Frame`] is an owning
//! token: who holds it may read and write its bytes, nobody else can, and it must be given back.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Bytes of one chunk. AF_XDP takes no larger one (a jumbo frame is several chunks).
pub const CHUNK_SIZE: usize = 4096;

/// Most chunks of one frame.
pub const MAX_SEGMENTS: usize = 4;

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

/// A frame in frame memory: a chain of one or more chunks, owned by whoever holds the token.
///
/// Not `Copy` or `Clone`; there is no `Drop`, since giving chunks back needs a [`ChunkCache`].
#[derive(Debug)]
#[must_use = "a frame that is not sent or freed leaks its chunks"]
pub struct Frame {
    _private: (),
}

/// The region, the chunks' states, and the pool that workers' caches draw from.
pub struct FrameMemory {
    _private: (),
}

/// Why frame memory cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of frame memory: {source}")]
pub struct FrameMemoryError {
    bytes: usize,
    source: std::io::Error,
}

impl Frame {
    /// Bytes of the whole frame.
    #[must_use]
    pub fn len(&self) -> usize {
        unimplemented!()
    }
}

impl FrameMemory {
    /// Maps a memfd of `chunks` chunks, on huge pages if there are enough, else on ordinary ones.
    pub fn new(_chunks: u32) -> Result<Arc<FrameMemory>, FrameMemoryError> {
        unimplemented!()
    }

    /// The memfd, for handing to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }

    /// First segment of a frame: at least its headers (a frame shorter than 256 bytes has one segment only).
    #[must_use]
    pub fn head<'a>(&'a self, _frame: &'a Frame) -> &'a [u8] {
        unimplemented!()
    }

    /// The segments in order; together they are `frame.len()` bytes.
    pub fn segments<'a>(&'a self, _frame: &'a Frame) -> impl Iterator<Item = &'a [u8]> {
        std::iter::empty()
    }

    /// Copies bytes into a frame that [`ChunkCache::alloc`] gave, from `offset` on. Panics past the end.
    pub fn write(&self, _frame: &mut Frame, _offset: usize, _bytes: &[u8]) {
        unimplemented!()
    }

    /// Chunks by state, for statistics and leak tests (approximate while workers run).
    #[must_use]
    pub fn census(&self) -> Census {
        unimplemented!()
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

/// A worker's own stock of free chunks; takes from and returns to the shared pool in batches.
pub struct ChunkCache {
    _private: (),
}

impl ChunkCache {
    /// An empty cache over `memory`.
    #[must_use]
    pub fn new(_memory: Arc<FrameMemory>) -> ChunkCache {
        unimplemented!()
    }

    /// The memory behind it.
    #[must_use]
    pub fn memory(&self) -> &Arc<FrameMemory> {
        unimplemented!()
    }

    /// A frame with room for exactly `len` bytes (content undefined), or `None` when chunks ran out or `len` needs
    /// more than [`MAX_SEGMENTS`].
    pub fn alloc(&mut self, _len: usize) -> Option<Frame> {
        unimplemented!()
    }

    /// Gives a frame's chunks back.
    pub fn free(&mut self, _frame: Frame) {
        unimplemented!()
    }
}
