//! Guest to guest: frames from one guest's buffers straight into another's.

use zerocopy::IntoBytes;

use super::header::Header;
use super::look::Look;
use super::rx::{GuestRxBurst, Room, deliver, find_room};
use super::tx::WIRE_MIN_LEN;
use crate::virtq::{Engine, FRONT, Ring, RingError, either};

/// Zeros to pad with.
const PADDING: [u8; WIRE_MIN_LEN] = [0; WIRE_MIN_LEN];

/// Copies the frames of a [`super::look`] at `from` whose positions are in `picks`, short ones padded to 60 bytes, into the receive
/// buffers of `to`, in the order of `picks`, until they or the buffers run out; publishes once. Does not notify.
///
/// Frames after `delivered + too_long` were not delivered. Buffers that are not filled stay available. A
/// receive ring that breaks the rules is an error only when no frame could be dealt with before.
pub fn forward<'a>(
    from: &Ring,
    picks: impl ExactSizeIterator<Item = (usize, &'a Look)>,
    to: &mut Ring,
) -> Result<GuestRxBurst, RingError> {
    either!(from, source => either!(to, target => between(source, picks, target)))
}

fn between<'a>(
    from: &impl Engine,
    mut picks: impl ExactSizeIterator<Item = (usize, &'a Look)>,
    to: &mut impl Engine,
) -> Result<GuestRxBurst, RingError> {
    let header_len = Header::len_on(to);
    // With headers of one length on both sides, a frame's bytes are as far from the beginning of either chain.
    let alike = header_len == Header::LEN && Header::len_on(from) == header_len;
    let header = Header::of_buffers(1);
    deliver(to, picks.len(), |to, next, burst| {
        for (index, look) in picks.by_ref() {
            let len = look.len().max(WIRE_MIN_LEN);
            if alike
                && look.len() >= WIRE_MIN_LEN
                && let (Some(chain), Some(target)) = (from.chain(index), to.chain(*next))
            {
                let mut front = *look.front();
                front[..Header::LEN].copy_from_slice(header.as_bytes());
                let rest = look.len() + Header::LEN - FRONT;
                if from.pass_whole(&chain, FRONT, rest, to, &target, &front) {
                    to.complete(&target, u32::try_from(FRONT + rest).unwrap_or(u32::MAX));
                    *next += 1;
                    burst.delivered += 1;
                    burst.bytes += len as u64;
                    continue;
                }
            }
            match find_room(to, next, header_len + len)? {
                Room::UpTo(end) => {
                    put(from, index, look, to, *next, end);
                    *next = end;
                    burst.delivered += 1;
                    burst.bytes += len as u64;
                }
                Room::Never => burst.too_long += 1,
                Room::NotYet => break,
            }
        }
        Ok(())
    })
}

/// Writes the header and a frame into the chains from `first` up to `end`, which have room for both, and completes them.
fn put(from: &impl Engine, index: usize, look: &Look, to: &mut impl Engine, first: usize, end: usize) {
    let (Some(chain), Some(target)) = (from.chain(index), to.chain(first)) else {
        return;
    };
    let header = Header::of_buffers(end - first);
    let header = &header.as_bytes()[..Header::len_on(to)];
    let head = look.head();
    let mut at = to.cursor(&target, 0);
    let mut written = to.write(&mut at, header) + to.write(&mut at, head);
    let mut cursor = from.cursor(&chain, look.skip() + head.len());
    written += from.transfer(&mut cursor, to, &mut at, look.len() - head.len());
    written += to.write(&mut at, &PADDING[look.len().min(WIRE_MIN_LEN)..]);
    to.complete_chains(first, end, written);
}
