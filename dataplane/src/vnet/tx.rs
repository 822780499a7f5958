//! Guest TX: frames from the guest into frame memory.

use super::look::Look;
use crate::memory::frames::{ChunkCache, Frame};
use crate::virtq::{Chain, Direction, Engine, HEAD, More, Ring, RingError, either};

/// Least bytes of a frame on a wire, without its check sequence.
pub const WIRE_MIN_LEN: usize = 60;

/// Copies the frames of a [`super::look`] whose positions are in `picks` into frame memory, short ones padded to 60 bytes, and
/// appends them to `out`, in the order of `picks`. Returns how many were copied: all, unless chunks ran out.
pub fn take<'a>(
    ring: &Ring,
    picks: impl IntoIterator<Item = (usize, &'a Look)>,
    chunks: &mut ChunkCache,
    out: &mut Vec<Frame>,
) -> usize {
    either!(ring, engine => {
        let mut taken = 0;
        for (index, look) in picks {
            let Some(frame) = take_frame(engine, index, look, chunks) else { break };
            out.push(frame);
            taken += 1;
        }
        taken
    })
}

#[inline(always)]
fn take_frame(ring: &impl Engine, index: usize, look: &Look, chunks: &mut ChunkCache) -> Option<Frame> {
    let chain = ring.chain(index)?;
    let mut frame = chunks.alloc(look.len().max(WIRE_MIN_LEN))?;
    // Nearly every frame: in one buffer and one chunk, and not to be padded.
    let whole = chunks.memory().head_mut(&mut frame);
    if whole.len() == look.len()
        && let Some((head, rest)) = whole.split_first_chunk_mut()
        && ring.read_whole(&chain, look.skip() + HEAD, rest)
    {
        *head = *look.padded_head();
        return Some(frame);
    }
    take_pieces(ring, &chain, look, chunks, &mut frame);
    Some(frame)
}

/// Fills a frame piece by piece, whatever the shapes of the chain and the frame.
fn take_pieces(ring: &impl Engine, chain: &Chain, look: &Look, chunks: &ChunkCache, frame: &mut Frame) {
    let mut head = look.head();
    let mut cursor = ring.cursor(chain, look.skip() + head.len());
    let mut left = look.len() - head.len();
    for segment in chunks.memory().segments_mut(frame) {
        let (front, rest) = segment.split_at_mut(head.len().min(segment.len()));
        let (now, later) = head.split_at(front.len());
        front.copy_from_slice(now);
        head = later;
        // The cursor does not know where the chain ends; what is longer than the chain is padding.
        let (data, padding) = rest.split_at_mut(left.min(rest.len()));
        left -= ring.read(&mut cursor, data);
        padding.fill(0);
    }
}

/// Completes and throws away up to `max` frames that the guest sends: a ring that is started but not enabled.
pub fn discard_from_guest(ring: &mut Ring, max: usize) -> Result<usize, RingError> {
    either!(ring, engine => discard(engine, max))
}

fn discard(ring: &mut impl Engine, max: usize) -> Result<usize, RingError> {
    let More::Chains(chains) = ring.gather(Direction::Readable, max)? else {
        return Ok(0);
    };
    ring.complete_unwritten();
    ring.publish();
    Ok(chains)
}
