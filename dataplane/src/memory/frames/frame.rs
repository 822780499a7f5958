//! The token of a frame: one word, so that bursts of them move in registers.

use std::num::NonZeroU64;

/// Most chunks of one frame memory.
pub(super) const MAX_CHUNKS: u32 = 1 << HEAD_BITS;
/// Most frame memories of one process.
pub(super) const MAX_MEMORIES: u16 = u16::MAX;

/// `memory:16 head:24 length:20 segments:4`; there is at least one segment, so it is never 0.
const SEGMENT_BITS: u32 = 4;
const LEN_BITS: u32 = 20;
const HEAD_BITS: u32 = 24;
const LEN_SHIFT: u32 = SEGMENT_BITS;
const HEAD_SHIFT: u32 = LEN_SHIFT + LEN_BITS;
const MEMORY_SHIFT: u32 = HEAD_SHIFT + HEAD_BITS;

const _: () = assert!(super::MAX_SEGMENTS * super::CHUNK_SIZE < 1 << LEN_BITS);
const _: () = assert!(super::MAX_SEGMENTS < 1 << SEGMENT_BITS);

/// A frame in frame memory: a chain of one or more chunks, owned by whoever holds the token.
///
/// Not `Copy` or `Clone`; there is no `Drop`, since giving chunks back needs a [`super::ChunkCache`].
#[derive(Debug)]
#[must_use = "a frame that is not sent or freed leaks its chunks"]
pub struct Frame(NonZeroU64);

impl Frame {
    /// The token of a chain that begins with the chunk `head` of a memory. There is at least one segment, and none of the
    /// numbers is larger than the bounds above allow.
    #[inline(always)]
    pub(super) fn new(memory: u16, head: u32, len: u32, segments: u32) -> Frame {
        debug_assert!(head < MAX_CHUNKS && len < 1 << LEN_BITS && (1..1 << SEGMENT_BITS).contains(&segments));
        let word = u64::from(memory) << MEMORY_SHIFT
            | u64::from(head) << HEAD_SHIFT
            | u64::from(len) << LEN_SHIFT
            | u64::from(segments);
        // Only a chain of no segment could be 0; it is not one, but nothing may depend on that here.
        Frame(NonZeroU64::new(word).unwrap_or(NonZeroU64::MIN))
    }

    /// Bytes of the whole frame.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.0.get() >> LEN_SHIFT & ((1 << LEN_BITS) - 1)).unwrap_or(0)
    }

    /// Whether the frame has no bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Chunks of the frame: 1 to [`super::MAX_SEGMENTS`].
    #[inline]
    #[must_use]
    pub fn segment_count(&self) -> usize {
        usize::try_from(self.0.get() & ((1 << SEGMENT_BITS) - 1)).unwrap_or(0)
    }

    /// The first chunk.
    #[inline]
    pub(super) fn head(&self) -> u32 {
        u32::try_from(self.0.get() >> HEAD_SHIFT & ((1 << HEAD_BITS) - 1)).unwrap_or(0)
    }

    /// The memory that it belongs to.
    #[inline]
    pub(super) fn memory(&self) -> u16 {
        u16::try_from(self.0.get() >> MEMORY_SHIFT).unwrap_or(0)
    }

    /// The same chain with `len` bytes.
    fn resize(&mut self, len: usize, segments: usize) {
        let narrow = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        *self = Frame::new(self.memory(), self.head(), narrow(len), narrow(segments));
    }

    /// The first segment has become longer.
    pub(super) fn lengthen(&mut self, by: usize) {
        self.resize(self.len() + by, self.segment_count());
    }

    /// The first segment has become shorter.
    pub(super) fn shorten(&mut self, by: usize) {
        self.resize(self.len() - by, self.segment_count());
    }

    /// A segment of `len` bytes was added.
    pub(super) fn append(&mut self, len: usize) {
        self.resize(self.len() + len, self.segment_count() + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        for (memory, head, len, segments) in [
            (0, 0, 0, 1),
            (
                MAX_MEMORIES,
                MAX_CHUNKS - 1,
                (1 << LEN_BITS) - 1,
                (1 << SEGMENT_BITS) - 1,
            ),
            (7, 4711, 1514, 1),
        ] {
            let frame = Frame::new(memory, head, len, segments);
            assert_eq!((frame.memory(), frame.head()), (memory, head));
            assert_eq!(
                (frame.len(), frame.segment_count()),
                (len as usize, segments as usize)
            );
        }
        let mut frame = Frame::new(1, 2, 100, 1);
        frame.lengthen(4);
        frame.append(1000);
        frame.shorten(3);
        assert_eq!((frame.head(), frame.len(), frame.segment_count()), (2, 1101, 2));
        assert_eq!(size_of::<Option<Frame>>(), 8);
    }
}
