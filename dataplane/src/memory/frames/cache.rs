//! A worker's own stock of free chunks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{
    CHUNK_SIZE, Frame, FrameMemory, HEADROOM, MAX_SEGMENTS, NO_CHUNK, QueueOwner, SEGMENT_SIZE, state,
};

/// Chunks moved between a cache and the pool at a time: the pool's lock is taken once for that many.
const BATCH: usize = 256;

/// Frames up to this long begin at one of [`COLOURS`] offsets.
const SHORT: usize = 1792;
const COLOURS: usize = 32;
const CACHE_LINE: usize = 64;
const _: () = assert!(SHORT + COLOURS * CACHE_LINE <= SEGMENT_SIZE);

/// A worker's own stock of free chunks; takes from and returns to the shared pool in batches.
///
/// Gives what it holds back when dropped.
pub struct ChunkCache {
    memory: Arc<FrameMemory>,
    /// Never grows past its capacity, two batches.
    free: Vec<u32>,
}

impl ChunkCache {
    /// An empty cache over `memory`.
    #[must_use]
    pub fn new(memory: Arc<FrameMemory>) -> ChunkCache {
        ChunkCache {
            memory,
            free: Vec::with_capacity(2 * BATCH),
        }
    }

    /// The memory behind it.
    #[must_use]
    pub fn memory(&self) -> &Arc<FrameMemory> {
        &self.memory
    }

    /// A frame with room for exactly `len` bytes (content undefined), or `None` when chunks ran out or `len` needs
    /// more than [`MAX_SEGMENTS`].
    #[inline(always)]
    pub fn alloc(&mut self, len: usize) -> Option<Frame> {
        if len <= SHORT {
            let index = self.take(state::HELD)?;
            // Chunks are 4096 bytes apart, so frames that all began at one offset would share the same few lines of the
            // L1 cache and push each other out of it within a burst.
            let offset = HEADROOM + index as usize % COLOURS * CACHE_LINE;
            self.describe(index, offset, len, NO_CHUNK);
            return Some(self.frame(index, len, 1));
        }
        self.alloc_long(len)
    }

    fn alloc_long(&mut self, len: usize) -> Option<Frame> {
        if len > MAX_SEGMENTS * SEGMENT_SIZE {
            return None;
        }
        let count = len.div_ceil(SEGMENT_SIZE);
        // From the last segment to the first, so that each knows the next.
        let mut next = NO_CHUNK;
        for segment in (0..count).rev() {
            let Some(index) = self.take(state::HELD) else {
                self.free_chain(next, count - 1 - segment);
                return None;
            };
            let bytes = (len - segment * SEGMENT_SIZE).min(SEGMENT_SIZE);
            self.describe(index, HEADROOM, bytes, next);
            next = index;
        }
        Some(self.frame(next, len, count))
    }

    /// Gives a frame's chunks back.
    #[inline]
    pub fn free(&mut self, frame: Frame) {
        self.memory.check(&frame);
        self.free_chain(frame.head(), frame.segment_count());
    }

    /// Gives every chunk in the cache back to the shared pool, as a worker does when it ends.
    pub fn flush(&mut self) {
        self.memory.pool().append(&mut self.free);
    }

    /// Free -> Fill: an address to offer to the kernel for receiving.
    pub(crate) fn take_for_fill(&mut self, owner: QueueOwner) -> Option<u64> {
        let index = self.take(state::fill(owner))?;
        Some(u64::from(index) * CHUNK_SIZE as u64)
    }

    /// Takes a batch from the pool, or what it has; says whether there is anything now.
    #[cold]
    fn restock(&mut self) -> bool {
        let mut pool = self.memory.pool();
        let left = pool.len().saturating_sub(BATCH);
        self.free.extend(pool.drain(left..));
        !self.free.is_empty()
    }

    #[inline(always)]
    fn take(&mut self, to: u32) -> Option<u32> {
        loop {
            if self.free.is_empty() && !self.restock() {
                return None;
            }
            let index = self.free.pop()?;
            // A chunk that is not free after all is counted and left out; there are only so many in the cache.
            if self.memory.move_on(index, state::FREE, to) {
                return Some(index);
            }
        }
    }

    /// Keeps a chunk whose state is Free already.
    #[inline]
    pub(super) fn put(&mut self, index: u32) {
        if self.free.len() == 2 * BATCH {
            self.memory.pool().extend(self.free.drain(BATCH..));
        }
        self.free.push(index);
    }

    fn free_chain(&mut self, head: u32, count: usize) {
        let mut next = head;
        for _ in 0..count {
            let index = next;
            next = self.memory.chunk(index).next.load(Ordering::Relaxed);
            if self.memory.move_on(index, state::HELD, state::FREE) {
                self.put(index);
            }
        }
    }

    #[inline(always)]
    fn describe(&self, index: u32, offset: usize, len: usize, next: u32) {
        let chunk = self.memory.chunk(index);
        // Both lie within a chunk.
        let narrow = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        chunk.offset.store(narrow(offset), Ordering::Relaxed);
        chunk.len.store(narrow(len), Ordering::Relaxed);
        chunk.next.store(next, Ordering::Relaxed);
    }

    #[inline(always)]
    fn frame(&self, head: u32, len: usize, segments: usize) -> Frame {
        // Both are within what `MAX_SEGMENTS` chunks hold.
        let narrow = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        Frame::new(self.memory.id, head, narrow(len), narrow(segments))
    }
}

impl Drop for ChunkCache {
    fn drop(&mut self) {
        self.flush();
    }
}
