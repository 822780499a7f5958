//! A NIC as a worker sees it. Everything that a kernel does is behind these two traits; [`memory`] is the twin that
//! lets the loop be tested and benchmarked without a NIC.

pub mod memory;
mod sink;
mod source;

pub use sink::SinkTx;
pub use source::{SourceRx, Window};

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::vec::Drain;

use crate::memory::frames::{ChunkCache, Frame};

/// Receiving side of one NIC queue; one worker owns it.
pub trait NicRx: Send {
    /// Appends up to `max` whole frames to `out`; returns how many. Never blocks.
    fn receive(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>, max: usize) -> usize;

    /// Offers free chunks to the kernel until its ring is full (or chunks run out), waking the driver if it asks.
    fn refill(&mut self, chunks: &mut ChunkCache);

    /// Readable when frames have arrived; `None` for a twin that cannot be waited on.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Reads its counters from elsewhere, while a worker has it. It keeps the socket open, so it must not outlive the queue.
    fn reader(&self) -> Arc<dyn NicRxReader>;
}

/// Shows what a receiving side has counted to whoever does not hold it.
pub trait NicRxReader: Send + Sync {
    /// Counters since the socket was made.
    fn counters(&self) -> NicRxCounters;
}

/// Sending side of one NIC queue; any worker may hold it for a burst, by try-lock.
pub trait NicTx: Send {
    /// Takes whole frames from the front of `frames` as long as the ring has room. Nothing moves before [`NicTx::flush`].
    fn send(&mut self, frames: &mut Drain<'_, Frame>);

    /// Tells the kernel to send what was queued, if it needs telling. Errors are counted, not returned.
    fn flush(&mut self);

    /// Takes sent chunks back into the cache; returns how many.
    fn reap(&mut self, chunks: &mut ChunkCache) -> usize;

    /// Chunks handed to the kernel and not yet completed.
    fn in_flight(&self) -> usize;

    /// Whether a completion says nothing of the frame's fate. A zero-copy driver completes what its device drops, for want of a link, too:
    /// when that is found out, call [`NicTx::copy_in_flight`] before [`NicTx::reap`].
    fn completes_unsent(&self) -> bool {
        false
    }

    /// Appends copies of the frames that the kernel has refused since the last call (it completes them all the same), oldest first. Call
    /// it before [`NicTx::reap`], which gives their bytes up.
    fn copy_refused(&mut self, _chunks: &mut ChunkCache, _out: &mut Vec<Frame>) {}

    /// Appends copies of the frames that were handed to the kernel, were not taken back by [`NicTx::reap`], and were not copied before,
    /// oldest first: for a NIC that is lost. The frames themselves stay with the kernel, which may still send them.
    fn copy_in_flight(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>);

    /// Counters since the socket was made.
    fn counters(&self) -> NicTxCounters;
}

/// Counters of a NIC queue's receiving side.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct NicRxCounters {
    /// Frames received.
    pub frames: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Frames the kernel dropped because the RX ring was full or no chunk was offered (XDP_STATISTICS).
    pub kernel_dropped: u64,
    /// Frames of more segments than a frame may have.
    pub too_long: u64,
}

/// Counters of a NIC queue's sending side.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct NicTxCounters {
    /// Frames put on the ring.
    pub frames: u64,
    /// Bytes put on the ring.
    pub bytes: u64,
    /// Kicks that the kernel answered with an error other than "try again" (the interface down, a frame dropped).
    pub kick_errors: u64,
    /// Of these, those that say that the interface cannot send at all.
    pub hard_errors: u64,
    /// The last such error number.
    pub hard_errno: i32,
    /// Chunks that the kernel has given back.
    pub completed: u64,
    /// Descriptors the kernel called invalid (XDP_STATISTICS).
    pub kernel_invalid: u64,
    /// Kicks (system calls) made.
    pub kicks: u64,
    /// Frames dropped because they have several segments and the socket can send only one (no multi-buffer).
    pub too_long: u64,
}
