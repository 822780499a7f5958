//! A queue that any worker may fill: a try-lock, and a bounded hand-off ring for who does not get it.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, MutexGuard, TryLockError};

use crossbeam_queue::ArrayQueue;

use crate::memory::frames::{ChunkCache, Frame};

/// Something frames are put into, owned by lock and not by thread. The lock is taken once a burst.
pub struct Shared<T> {
    inner: Mutex<T>,
    hand_off: ArrayQueue<Frame>,
}

/// What a thread needs at hand to fill queues: free chunks, and room for one batch of handed-off frames.
pub struct Stock {
    /// The thread's free chunks.
    pub chunks: ChunkCache,
    batch: Vec<Frame>,
}

impl Stock {
    /// Frames taken from a hand-off ring at a time.
    const BATCH: usize = 64;

    /// A stock over `chunks`.
    #[must_use]
    pub fn new(chunks: ChunkCache) -> Stock {
        Stock {
            chunks,
            batch: Vec::with_capacity(Self::BATCH),
        }
    }
}

/// What became of a burst that [`Shared::put`] took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PutOutcome {
    /// Whether another worker held the queue.
    pub contended: bool,
    /// Frames left on the hand-off ring for the holder.
    pub handed_off: u64,
    /// Frames dropped (and freed) because the hand-off ring was full.
    pub dropped: u64,
}

impl<T> Shared<T> {
    /// Wraps `inner`; its hand-off ring takes up to `hand_off` frames.
    pub fn new(inner: T, hand_off: usize) -> Shared<T> {
        Shared {
            inner: Mutex::new(inner),
            hand_off: ArrayQueue::new(hand_off),
        }
    }

    /// The lock, if nobody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.inner.try_lock() {
            Ok(guard) => Some(guard),
            // A worker that panicked ends the process soon; until then the queue's own checks keep it consistent.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits for the lock: for the control thread, after a quiesce, when no worker can hold it any more.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts a burst: `fill` is called with the lock held and a burst to take frames from; what was handed off earlier comes
    /// first, so that order is kept. `fill` must consume all frames that it is given (deliver, send or free them).
    pub fn put(
        &self,
        stock: &mut Stock,
        frames: &mut Vec<Frame>,
        mut fill: impl FnMut(&mut T, &mut ChunkCache, &mut Vec<Frame>),
    ) -> PutOutcome {
        let mut outcome = PutOutcome::default();
        if let Some(mut inner) = self.try_lock() {
            self.take_over(&mut inner, stock, &mut fill);
            fill(&mut inner, &mut stock.chunks, frames);
        } else {
            outcome.contended = true;
            for frame in frames.drain(..) {
                match self.hand_off.push(frame) {
                    Ok(()) => outcome.handed_off += 1,
                    Err(frame) => {
                        stock.chunks.free(frame);
                        outcome.dropped += 1;
                    }
                }
            }
        }
        self.drain(stock, &mut fill);
        outcome
    }

    /// Processes what others handed off, unless somebody else is at it. Every holder calls this after letting go of the
    /// lock, and every producer after pushing: with the fences, either the producer finds the lock free or the holder
    /// finds the frames.
    pub fn drain(&self, stock: &mut Stock, mut fill: impl FnMut(&mut T, &mut ChunkCache, &mut Vec<Frame>)) {
        // At most one full ring a call: a producer that keeps pushing cannot hold us here, and drains it itself.
        for _ in 0..=self.hand_off.capacity() / Stock::BATCH {
            fence(Ordering::SeqCst);
            if self.hand_off.is_empty() {
                return;
            }
            let Some(mut inner) = self.try_lock() else { return };
            self.take_over(&mut inner, stock, &mut fill);
        }
    }

    fn take_over(
        &self,
        inner: &mut T,
        stock: &mut Stock,
        fill: &mut impl FnMut(&mut T, &mut ChunkCache, &mut Vec<Frame>),
    ) {
        while let Some(frame) = self.hand_off.pop() {
            stock.batch.push(frame);
            if stock.batch.len() == Stock::BATCH {
                break;
            }
        }
        if !stock.batch.is_empty() {
            fill(inner, &mut stock.chunks, &mut stock.batch);
            debug_assert!(stock.batch.is_empty(), "fill consumes all frames");
        }
    }

    /// Frees what is left on the hand-off ring: for the control thread, when the queue is gone.
    pub fn clear(&self, chunks: &mut ChunkCache) {
        while let Some(frame) = self.hand_off.pop() {
            chunks.free(frame);
        }
    }
}
