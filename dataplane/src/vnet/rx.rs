//! Guest RX: frames to the guest.

use zerocopy::IntoBytes;

use super::header::Header;
use crate::memory::frames::{Frame, FrameMemory};
use crate::virtq::{Direction, Engine, More, Ring, RingError, either};

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

/// Buffers for one frame.
enum Room {
    /// The chains from the next one up to this index, which is excluded.
    UpTo(usize),
    /// The guest must offer more first.
    NotYet,
    /// Whatever the guest offers, the frame does not fit.
    Never,
}

/// Writes frames into the guest's receive buffers, from the front of `frames`, until they or the buffers run out; publishes
/// once. Does not notify. Frames after `delivered + too_long` were not looked at.
///
/// Buffers that are not filled stay available. A ring that breaks the rules is an error only when no frame could be
/// dealt with before.
pub fn give_to_guest(
    ring: &mut Ring,
    memory: &FrameMemory,
    frames: &[Frame],
) -> Result<GuestRxBurst, RingError> {
    either!(ring, engine => give(engine, memory, frames))
}

fn give(ring: &mut impl Engine, memory: &FrameMemory, frames: &[Frame]) -> Result<GuestRxBurst, RingError> {
    let mut burst = GuestRxBurst::default();
    if frames.is_empty() {
        return Ok(burst);
    }
    let mut next = 0;
    let mut outcome = ring.gather(Direction::Writable, frames.len()).map(|_| ());
    if outcome.is_ok() {
        for frame in frames {
            match find_room(ring, &mut next, Header::len_on(ring) + frame.len()) {
                Ok(Room::UpTo(end)) => {
                    put_frame(ring, memory, frame, next, end);
                    next = end;
                    burst.delivered += 1;
                    burst.bytes += frame.len() as u64;
                }
                Ok(Room::Never) => burst.too_long += 1,
                Ok(Room::NotYet) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        ring.return_from(next);
        ring.publish();
    }
    match outcome {
        // The next call meets the same error first.
        Err(_) if burst != GuestRxBurst::default() => Ok(burst),
        other => other.map(|()| burst),
    }
}

/// Finds chains from `next` on with room for `need` bytes, gathering more of them as needed.
#[inline]
fn find_room(ring: &mut impl Engine, next: &mut usize, need: usize) -> Result<Room, RingError> {
    let mut end = *next;
    let mut room = 0;
    loop {
        if let Some(chain) = ring.chain(end) {
            room += chain.len();
            end += 1;
            if room >= need {
                return Ok(Room::UpTo(end));
            }
            // Without MRG_RXBUF a frame has one chain; and no more chains than the ring has can ever be offered at once.
            if !ring.mergeable() || end - *next >= usize::from(ring.size()) {
                return Ok(Room::Never);
            }
            continue;
        }
        match ring.gather_more(Direction::Writable, usize::from(ring.size()))? {
            More::Chains(_) => {}
            More::Empty => return Ok(Room::NotYet),
            // Not even an empty batch holds what this frame needs.
            More::Full if *next == 0 => return Ok(Room::Never),
            More::Full => {
                ring.return_from(*next);
                (*next, end, room) = (0, 0, 0);
            }
        }
    }
}

/// Writes the header and a frame into the chains from `first` up to `end`, which have room for both, and completes them.
#[inline]
fn put_frame(ring: &mut impl Engine, memory: &FrameMemory, frame: &Frame, first: usize, end: usize) {
    let Some(chain) = ring.chain(first) else { return };
    // There are at most as many chains as descriptors, of which there are at most 32768.
    let buffers = u16::try_from(end - first).unwrap_or(u16::MAX);
    let header = Header {
        num_buffers: buffers.into(),
        ..Header::default()
    };
    let header = &header.as_bytes()[..Header::len_on(ring)];

    let mut cursor = ring.cursor(&chain, 0);
    let mut left = ring.write(&mut cursor, header);
    for segment in memory.segments(frame) {
        left += ring.write(&mut cursor, segment);
    }
    for index in first..end {
        let Some(chain) = ring.chain(index) else { break };
        let here = left.min(chain.len());
        left -= here;
        ring.complete(&chain, u32::try_from(here).unwrap_or(u32::MAX));
    }
}
