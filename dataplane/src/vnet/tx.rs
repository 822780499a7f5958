//! Guest TX: frames from the guest into frame memory.

use super::look::Look;
use crate::memory::frames::{ChunkCache, Frame};
use crate::virtq::{Direction, Engine, More, Ring, RingError, either};

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

#[inline]
fn take_frame(ring: &impl Engine, index: usize, look: &Look, chunks: &mut ChunkCache) -> Option<Frame> {
    let chain = ring.chain(index)?;
    let mut frame = chunks.alloc(look.len().max(WIRE_MIN_LEN))?;
    let mut head = look.head();
    let mut cursor = ring.cursor(&chain, look.skip() + head.len());
    let mut left = look.len() - head.len();
    for segment in chunks.memory().segments_mut(&mut frame) {
        let (front, rest) = segment.split_at_mut(head.len().min(segment.len()));
        let (now, later) = head.split_at(front.len());
        front.copy_from_slice(now);
        head = later;
        // The cursor does not know where the chain ends; what is longer than the chain is padding.
        let (data, padding) = rest.split_at_mut(left.min(rest.len()));
        left -= ring.read(&mut cursor, data);
        padding.fill(0);
    }
    Some(frame)
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
