//! A queue that any worker may fill: a try-lock, and a bounded hand-off ring for who does not get it.

use std::sync::{Mutex, MutexGuard, TryLockError};

use crossbeam_queue::ArrayQueue;

use crate::memory::frames::{ChunkCache, Frame};

/// Something frames are put into, owned by lock and not by thread. The lock is taken once a burst.
///
/// Who does not get it pushes its frames onto the hand-off ring, and whoever has the lock next takes them first. No frame is left
/// behind, because who pushed comes back ([`PutOutcome::owing`]) until the ring is empty: it sees its own frames there without a fence,
/// and nobody depends on a holder who may have looked a moment too early.
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
    /// Frames left on the hand-off ring.
    pub handed_off: u64,
    /// Frames dropped (and freed) because the hand-off ring was full.
    pub dropped: u64,
    /// Another thread has the lock, and frames are on the hand-off ring: the caller must put again (an empty burst will do), and not
    /// sleep before, or have somebody do so who does not sleep.
    pub owing: bool,
}

impl PutOutcome {
    /// Whether another thread held the queue when there was something to put.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        self.handed_off + self.dropped > 0
    }
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

    /// Waits for the lock: for the control thread, which may be kept waiting for a burst.
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
            self.catch_up(&mut inner, stock, &mut fill);
            fill(&mut inner, &mut stock.chunks, frames);
        } else {
            for frame in frames.drain(..) {
                match self.hand_off.push(frame) {
                    Ok(()) => outcome.handed_off += 1,
                    Err(frame) => {
                        stock.chunks.free(frame);
                        outcome.dropped += 1;
                    }
                }
            }
            outcome.owing = self.has_handed_off();
        }
        outcome
    }

    /// Has `visit` work on the queue itself, after `fill` has dealt with what was handed off earlier; both share `state`. `false`, and
    /// nothing done, if another worker holds the queue.
    pub fn visit<S>(
        &self,
        stock: &mut Stock,
        state: &mut S,
        fill: impl Fn(&mut S, &mut T, &mut ChunkCache, &mut Vec<Frame>),
        visit: impl FnOnce(&mut S, &mut T),
    ) -> bool {
        let Some(mut inner) = self.try_lock() else {
            return false;
        };
        let mut take_over = |inner: &mut T, chunks: &mut ChunkCache, frames: &mut Vec<Frame>| {
            fill(state, inner, chunks, frames)
        };
        self.catch_up(&mut inner, stock, &mut take_over);
        visit(state, &mut inner);
        true
    }

    /// Processes all that was handed off before the caller came, or its burst would overtake an earlier one of its own. At most one full
    /// ring, so that producers who keep pushing cannot hold us here.
    #[inline]
    fn catch_up(
        &self,
        inner: &mut T,
        stock: &mut Stock,
        fill: &mut impl FnMut(&mut T, &mut ChunkCache, &mut Vec<Frame>),
    ) {
        for _ in 0..self.hand_off.capacity().div_ceil(Stock::BATCH) {
            if !self.has_handed_off() || !self.take_over(inner, stock, fill) {
                break;
            }
        }
    }

    /// Leaves a frame for whoever fills the queue next: for a thread that is no worker, and that wakes the workers afterwards. The
    /// frame comes back if there is no room.
    pub fn hand_over(&self, frame: Frame) -> Result<(), Frame> {
        self.hand_off.push(frame)
    }

    /// Whether frames wait on the hand-off ring, of those whose pushing the caller can know of.
    #[must_use]
    pub fn has_handed_off(&self) -> bool {
        // Nothing but two loads, where taking from an empty ring has a fence.
        !self.hand_off.is_empty()
    }

    /// Processes one batch; returns whether there was any.
    fn take_over(
        &self,
        inner: &mut T,
        stock: &mut Stock,
        fill: &mut impl FnMut(&mut T, &mut ChunkCache, &mut Vec<Frame>),
    ) -> bool {
        while let Some(frame) = self.hand_off.pop() {
            stock.batch.push(frame);
            if stock.batch.len() == Stock::BATCH {
                break;
            }
        }
        if stock.batch.is_empty() {
            return false;
        }
        fill(inner, &mut stock.chunks, &mut stock.batch);
        debug_assert!(stock.batch.is_empty(), "fill consumes all frames");
        true
    }

    /// Frees what is left on the hand-off ring: for the control thread, when the queue is gone.
    pub fn clear(&self, chunks: &mut ChunkCache) {
        while let Some(frame) = self.hand_off.pop() {
            chunks.free(frame);
        }
    }
}

#[cfg(test)]
mod tests;
