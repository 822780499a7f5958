//! Guest RX: frames to the guest.

use zerocopy::IntoBytes;

use super::header::Header;
use crate::memory::frames::{Frame, FrameMemory};
use crate::virtq::{Direction, Engine, More, Ring, RingError, either};

/// A frame up to this long is in the line that was looked at, or in the next.
pub(super) const AT_HAND: usize = 128;

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
pub(super) enum Room {
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
    let header_len = Header::len_on(ring);
    let whole = header_len == Header::LEN;
    deliver(ring, frames.len(), |ring, next, burst| {
        let mut left = frames;
        loop {
            let written = if whole {
                put_run(ring, memory, left, *next)
            } else {
                0
            };
            let (run, others) = left.split_at(written);
            let mut bytes = 0;
            let lengths = run.iter().map(|frame| {
                bytes += frame.len() as u64;
                u32::try_from(Header::LEN + frame.len()).unwrap_or(u32::MAX)
            });
            ring.complete(*next, lengths);
            *next += written;
            burst.delivered += written;
            burst.bytes += bytes;
            let Some((frame, rest)) = others.split_first() else {
                return Ok(());
            };
            left = rest;
            match find_room(ring, next, header_len + frame.len())? {
                Room::UpTo(end) => {
                    put_frame(ring, memory, frame, *next, end);
                    *next = end;
                    burst.delivered += 1;
                    burst.bytes += frame.len() as u64;
                }
                Room::Never => burst.too_long += 1,
                Room::NotYet => return Ok(()),
            }
        }
    })
}

/// Writes frames into the chains from `first` on, one each, up to the first that is not as nearly every one is: of one segment, into one
/// buffer. Returns how many.
#[inline(always)]
fn put_run(ring: &impl Engine, memory: &FrameMemory, frames: &[Frame], first: usize) -> usize {
    let mut header = [0; Header::LEN];
    header.copy_from_slice(Header::of_buffers(1).as_bytes());
    let targets = ring.chains().get(first..).unwrap_or_default();
    let mut later = frames.iter().skip(1);
    let mut written = 0;
    for (frame, target) in frames.iter().zip(targets) {
        // While this frame is copied, a later one comes, whose first line was looked at.
        let next = later.next().map(|frame| memory.head(frame));
        let next = next.filter(|next| next.len() > AT_HAND);
        if frame.segment_count() != 1 || !ring.write_whole(target, &header, memory.head(frame), next) {
            break;
        }
        written += 1;
    }
    written
}

/// Gathers receive buffers for some `frames`, has `put` fill and complete them, from the one at its second argument on, which it
/// moves along, and publishes them.
#[inline(always)]
pub(super) fn deliver<R: Engine>(
    ring: &mut R,
    frames: usize,
    put: impl FnOnce(&mut R, &mut usize, &mut GuestRxBurst) -> Result<(), RingError>,
) -> Result<GuestRxBurst, RingError> {
    let mut burst = GuestRxBurst::default();
    if frames == 0 {
        return Ok(burst);
    }
    ring.gather(Direction::Writable, frames)?;
    ring.claim();
    let mut next = 0;
    let outcome = put(ring, &mut next, &mut burst);
    ring.return_from(next);
    ring.publish();
    match outcome {
        // The next call meets the same error first.
        Err(_) if burst != GuestRxBurst::default() => Ok(burst),
        other => other.map(|()| burst),
    }
}

/// Finds chains from `next` on with room for `need` bytes, gathering more of them as needed.
#[inline]
pub(super) fn find_room(ring: &mut impl Engine, next: &mut usize, need: usize) -> Result<Room, RingError> {
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
    let header = Header::of_buffers(end - first);
    let header = &header.as_bytes()[..Header::len_on(ring)];

    let mut cursor = ring.cursor(&chain, 0);
    let mut written = ring.write(&mut cursor, header);
    for segment in memory.segments(frame) {
        written += ring.write(&mut cursor, segment);
    }
    ring.complete_chains(first, end, written);
}
