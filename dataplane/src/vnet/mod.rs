//! virtio-net on top of a ring: headers off and on, frames in and out, in bursts.

use crate::memory::frames::{ChunkCache, Frame, FrameMemory};
use crate::virtq::{RingError, SplitRing};

/// What a burst from a guest gave beside its frames; the reasons are drop counters.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct GuestTxBurst {
    /// Chains completed, whether they gave a frame or not.
    pub chains: u32,
    /// Bytes in the frames given.
    pub bytes: u64,
    /// Dropped: no chunk was free.
    pub no_chunk: u32,
    /// Dropped: shorter than an Ethernet header (14 bytes).
    pub too_short: u32,
    /// Dropped: longer than a frame may be.
    pub too_long: u32,
    /// Dropped: a header that asks for an offload that was not negotiated, or is malformed.
    pub bad_header: u32,
}

/// Takes up to `max` frames that the guest sends and appends them to `out`, short ones padded to 60 bytes; completes their
/// descriptors in order and publishes them once. Does not notify.
pub fn take_from_guest(
    _ring: &mut SplitRing,
    _chunks: &mut ChunkCache,
    _out: &mut Vec<Frame>,
    _max: usize,
) -> Result<GuestTxBurst, RingError> {
    unimplemented!()
}

/// Completes and throws away up to `max` frames that the guest sends: a ring that is started but not enabled.
pub fn discard_from_guest(_ring: &mut SplitRing, _max: usize) -> Result<u32, RingError> {
    unimplemented!()
}

/// What a burst to a guest did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct GuestRxBurst {
    /// Frames delivered, counted from the front of the slice.
    pub delivered: usize,
    /// Bytes in them.
    pub bytes: u64,
    /// Frames skipped because no buffer the guest could offer would hold them (no MRG_RXBUF and too small buffers).
    pub too_long: u32,
}

/// Writes frames into the guest's receive buffers, from the front of `frames`, until they or the buffers run out; publishes
/// once. Does not notify. Frames after `delivered + too_long` were not looked at.
pub fn give_to_guest(
    _ring: &mut SplitRing,
    _memory: &FrameMemory,
    _frames: &[Frame],
) -> Result<GuestRxBurst, RingError> {
    unimplemented!()
}
