//! Guest to guest: frames from one guest's buffers straight into another's.

use zerocopy::IntoBytes;

use super::header::Header;
use super::look::Look;
use super::rx::{AT_HAND, GuestRxBurst, Room, deliver, find_room};
use super::tx::WIRE_MIN_LEN;
use crate::virtq::{Engine, HEAD, Ring, RingError, either};

/// A frame up to this long is copied before a line comes from memory: it is the one after the next whose lines are asked for.
const SOON_COPIED: usize = 4096;

/// Zeros to pad with.
const PADDING: [u8; WIRE_MIN_LEN] = [0; WIRE_MIN_LEN];

/// Copies the frames of a [`super::look`] at `from` whose positions are in `picks`, short ones padded to 60 bytes, into the receive
/// buffers of `to`, in the order of `picks`, until they or the buffers run out; publishes once. Does not notify.
///
/// Frames after `delivered + too_long` were not delivered. Buffers that are not filled stay available. A
/// receive ring that breaks the rules is an error only when no frame could be dealt with before.
pub fn forward<'a>(
    from: &Ring,
    picks: impl ExactSizeIterator<Item = (usize, &'a Look)> + Clone,
    to: &mut Ring,
) -> Result<GuestRxBurst, RingError> {
    either!(from, source => either!(to, target => between(source, picks, target)))
}

fn between<'a>(
    from: &impl Engine,
    picks: impl ExactSizeIterator<Item = (usize, &'a Look)> + Clone,
    to: &mut impl Engine,
) -> Result<GuestRxBurst, RingError> {
    let header_len = Header::len_on(to);
    let whole = header_len == Header::LEN;
    deliver(to, picks.len(), |to, next, burst| {
        let mut picks = picks;
        loop {
            let passed = if whole {
                pass_run(from, picks.clone(), to, *next)
            } else {
                0
            };
            let mut bytes = 0;
            let written = picks.by_ref().take(passed).map(|(_, look)| {
                bytes += look.len() as u64;
                u32::try_from(Header::LEN + look.len()).unwrap_or(u32::MAX)
            });
            to.complete(*next, written);
            *next += passed;
            burst.delivered += passed;
            burst.bytes += bytes;
            let Some((index, look)) = picks.next() else {
                return Ok(());
            };
            let len = look.len().max(WIRE_MIN_LEN);
            match find_room(to, next, header_len + len)? {
                Room::UpTo(end) => {
                    put(from, index, look, to, *next, end);
                    *next = end;
                    burst.delivered += 1;
                    burst.bytes += len as u64;
                }
                Room::Never => burst.too_long += 1,
                Room::NotYet => return Ok(()),
            }
        }
    })
}

/// Copies frames into the chains from `first` on, one each, up to the first that is not as nearly every one is: in one buffer on both
/// sides, and not to be padded. Returns how many.
#[inline(always)]
fn pass_run<'a>(
    from: &impl Engine,
    picks: impl Iterator<Item = (usize, &'a Look)> + Clone,
    to: &impl Engine,
    first: usize,
) -> usize {
    let mut header = [0; Header::LEN];
    header.copy_from_slice(Header::of_buffers(1).as_bytes());
    let (chains, targets) = (from.chains(), to.chains().get(first..).unwrap_or_default());
    let mut later = picks.clone();
    if let Some((_, look)) = later.next()
        && look.len() <= SOON_COPIED
    {
        later.next();
    }
    let mut passed = 0;
    for ((index, look), target) in picks.zip(targets) {
        // While this frame is copied, lines of a later one come: more at a time than the processor would think of itself.
        let next = later.next().filter(|(_, look)| look.len() > AT_HAND);
        let next = next.map(|(index, look)| from.lines(index, look.skip() + look.len()));
        let rest = look.skip() + HEAD..look.skip() + look.len();
        if look.len() < WIRE_MIN_LEN
            || !chains.get(index).is_some_and(|chain| {
                from.pass_whole(chain, rest, (to, target), (&header, look.padded_head()), next)
            })
        {
            break;
        }
        passed += 1;
    }
    passed
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
