//! Guest TX: frames from the guest.

use super::header::Header;
use crate::memory::frames::{ChunkCache, Frame, MAX_SEGMENTS, SEGMENT_SIZE};
use crate::virtq::{Chain, Direction, Engine, More, Ring, RingError, either};

/// Bytes of an Ethernet header.
const MIN_LEN: usize = 14;
/// Least bytes of a frame on a wire, without its check sequence.
const WIRE_MIN_LEN: usize = 60;

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

/// Most bytes that a frame of ours holds.
const MAX_LEN: usize = MAX_SEGMENTS * SEGMENT_SIZE;

/// Why a chain gave no frame.
enum Drop {
    NoChunk,
    TooShort,
    TooLong,
    BadHeader,
}

/// Takes up to `max` frames that the guest sends and appends them to `out`, short ones padded to 60 bytes; completes their
/// descriptors in order and publishes them once. Does not notify.
///
/// A burst may end before `max` chains though more are available (at most 256 chains, 1024 segments and some 4096
/// descriptors are looked at). A chain that breaks the ring's rules is an error only when it comes first.
pub fn take_from_guest(
    ring: &mut Ring,
    chunks: &mut ChunkCache,
    out: &mut Vec<Frame>,
    max: usize,
) -> Result<GuestTxBurst, RingError> {
    either!(ring, engine => take(engine, chunks, out, max))
}

fn take(
    ring: &mut impl Engine,
    chunks: &mut ChunkCache,
    out: &mut Vec<Frame>,
    max: usize,
) -> Result<GuestTxBurst, RingError> {
    let mut burst = GuestTxBurst::default();
    let More::Chains(_) = ring.gather(Direction::Readable, max)? else {
        return Ok(burst);
    };
    for index in 0..ring.gathered() {
        let Some(chain) = ring.chain(index) else { break };
        match take_frame(ring, chunks, &chain) {
            Ok(frame) => {
                burst.bytes += frame.len() as u64;
                out.push(frame);
            }
            Err(Drop::NoChunk) => burst.no_chunk += 1,
            Err(Drop::TooShort) => burst.too_short += 1,
            Err(Drop::TooLong) => burst.too_long += 1,
            Err(Drop::BadHeader) => burst.bad_header += 1,
        }
        ring.complete(&chain, 0);
        burst.chains += 1;
    }
    ring.publish();
    Ok(burst)
}

/// Completes and throws away up to `max` frames that the guest sends: a ring that is started but not enabled.
pub fn discard_from_guest(ring: &mut Ring, max: usize) -> Result<u32, RingError> {
    either!(ring, engine => discard(engine, max))
}

fn discard(ring: &mut impl Engine, max: usize) -> Result<u32, RingError> {
    let mut chains = 0;
    let More::Chains(_) = ring.gather(Direction::Readable, max)? else {
        return Ok(chains);
    };
    for index in 0..ring.gathered() {
        let Some(chain) = ring.chain(index) else { break };
        ring.complete(&chain, 0);
        chains += 1;
    }
    ring.publish();
    Ok(chains)
}

#[inline]
fn take_frame(ring: &impl Engine, chunks: &mut ChunkCache, chain: &Chain) -> Result<Frame, Drop> {
    let header = Header::read(ring, chain).ok_or(Drop::BadHeader)?;
    if !header.asks_for_nothing() {
        return Err(Drop::BadHeader);
    }
    let skip = Header::len_on(ring);
    let len = chain.len() - skip;
    if chain.is_truncated() || len > MAX_LEN {
        return Err(Drop::TooLong);
    }
    if len < MIN_LEN {
        return Err(Drop::TooShort);
    }
    let mut frame = chunks.alloc(len.max(WIRE_MIN_LEN)).ok_or(Drop::NoChunk)?;
    let mut cursor = ring.cursor(chain, skip);
    let mut left = len;
    for segment in chunks.memory().segments_mut(&mut frame) {
        // The cursor does not know where the chain ends; what is longer than the chain is padding.
        let (data, padding) = segment.split_at_mut(left.min(segment.len()));
        left -= ring.read(&mut cursor, data);
        padding.fill(0);
    }
    Ok(frame)
}
