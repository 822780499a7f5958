//! A NIC queue's receiving half that has frames as long as somebody takes them: for benches. It writes each into a chunk, as a NIC does, and
//! beside that does next to nothing.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{NicRx, NicRxCounters, NicRxReader};
use crate::counters::Counter;
use crate::memory::frames::{ChunkCache, Frame};

/// How many frames may be under way, from all sources to whoever takes them; a burst of another worker more.
#[derive(Debug, Default)]
pub struct Window {
    most: AtomicU64,
    given: AtomicU64,
    taken: AtomicU64,
}

impl Window {
    /// So many from now on; none before.
    pub fn open(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// So many more were taken. For one thread.
    pub fn take(&self, count: u64) {
        // The line is the worker's while nothing changes.
        if count > 0 {
            let total = self.taken.load(Ordering::Relaxed) + count;
            self.taken.store(total, Ordering::Release);
        }
    }

    fn room(&self) -> usize {
        let taken = self.taken.load(Ordering::Acquire);
        let under_way = self.given.load(Ordering::Relaxed).saturating_sub(taken);
        let room = self.most.load(Ordering::Relaxed).saturating_sub(under_way);
        usize::try_from(room).unwrap_or(usize::MAX)
    }
}

/// The half.
pub struct SourceRx {
    /// Frames of one size, one behind the other.
    frames: Box<[u8]>,
    size: usize,
    next: usize,
    window: Arc<Window>,
    counters: Arc<SourceCounters>,
}

#[derive(Default)]
struct SourceCounters {
    frames: Counter,
    bytes: Counter,
}

impl SourceRx {
    /// Gives the frames, each of `size` bytes, in turn and again and again, as the window allows.
    ///
    /// # Panics
    /// If there is no whole frame.
    #[must_use]
    pub fn new(frames: Box<[u8]>, size: usize, window: Arc<Window>) -> SourceRx {
        assert!(size > 0 && frames.len() >= size, "at least one frame");
        SourceRx {
            frames,
            size,
            next: 0,
            window,
            counters: Arc::default(),
        }
    }
}

impl NicRx for SourceRx {
    fn receive(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>, max: usize) -> usize {
        let most = max.min(self.window.room());
        let mut count = 0;
        while count < most
            && let Some(mut frame) = chunks.alloc(self.size)
        {
            let end = self.next + self.size;
            chunks.memory().write(&mut frame, 0, &self.frames[self.next..end]);
            self.next = if end + self.size > self.frames.len() {
                0
            } else {
                end
            };
            out.push(frame);
            count += 1;
        }
        if count > 0 {
            self.window.given.fetch_add(count as u64, Ordering::Relaxed);
            self.counters.frames.add(count as u64);
            self.counters.bytes.add((count * self.size) as u64);
        }
        count
    }

    fn refill(&mut self, _chunks: &mut ChunkCache) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn reader(&self) -> Arc<dyn NicRxReader> {
        Arc::clone(&self.counters) as _
    }
}

impl NicRxReader for SourceCounters {
    fn counters(&self) -> NicRxCounters {
        NicRxCounters {
            frames: self.frames.get(),
            bytes: self.bytes.get(),
            ..NicRxCounters::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::frames::FrameMemory;

    #[test]
    fn frames_come_in_turn_and_no_more_than_are_taken() {
        let memory = FrameMemory::new(8).unwrap();
        let mut chunks = ChunkCache::new(Arc::clone(&memory));
        let window = Arc::new(Window::default());
        let mut rx = SourceRx::new(
            [[1; 60], [2; 60], [3; 60]].concat().into(),
            60,
            Arc::clone(&window),
        );
        let mut out = Vec::new();
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 0);
        window.open(5);
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 4);
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 1);
        window.take(2);
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 2);
        let numbers: Vec<u8> = out.iter().map(|frame| memory.head(frame)[59]).collect();
        assert_eq!(numbers, [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(rx.reader().counters().frames, 7);
        // Without chunks nothing comes, and nothing is counted.
        window.take(5);
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 1);
        assert_eq!(rx.receive(&mut chunks, &mut out, 4), 0);
        assert_eq!(rx.reader().counters().bytes, 8 * 60);
        out.drain(..).for_each(|frame| chunks.free(frame));
    }
}
