//! Where a packed ring goes on whose predecessor ended without telling.
//!
//! Known is what [`CursorSlot`](super::super::cursors::CursorSlot) kept: the positions before and after the last burst of used
//! elements. The rest is read from the ring. Nothing is trusted: the driver writes the ring, too, and at worst it spoils its own.
//!
//! A descriptor's AVAIL and USED bits tell, for a position in a round whose wrap counter is W, what became of it:
//!
//! | AVAIL, USED | meaning |
//! |---|---|
//! | W, !W | available in this round, or the middle of a chain of this round |
//! | W, W | used in this round |
//! | !W, W | available in the next round, so it was used in this one; or the middle of a chain of the round before |
//! | !W, !W | used in the round before, or never written to |

use super::super::packed_layout::{PackedParts, Position};
use super::super::walk::DESC_F_NEXT;

/// What a predecessor left.
pub(super) struct Left {
    /// Everything before this was used and shown to the driver.
    pub(super) at: Position,
    /// A burst that it was writing from here on when it ended.
    pub(super) unseen: Option<Unseen>,
}

/// Used elements that are there, but the first of them not, so that the driver does not see them.
pub(super) struct Unseen {
    /// The id of the first chain, whose used element is missing.
    pub(super) first: u16,
    /// The places and ids of the used elements that are there.
    pub(super) others: Vec<(Position, u16)>,
    /// Where the last one's chain ends.
    pub(super) end: Position,
}

/// The position that the noted ones mean, if the ring can be the one that they were noted for.
pub(super) fn left(parts: &PackedParts, before: u16, after: u16) -> Option<Left> {
    let (before, after) = (Position::from_bits(before), Position::from_bits(after));
    let size = parts.size;
    if before.index >= size || after.index >= size {
        return None;
    }
    before.distance_to(after, size)?;
    // The first used element of a burst is stored last, after the note. If the descriptor there is still available, the driver was
    // not shown the burst. If not, it was, whatever became of the descriptor since: used, available in the next round,
    // even used in that one.
    let at = if before.is_available(parts.load_flags(before.index)) {
        before
    } else {
        after
    };
    let unseen = unseen(parts, at);
    fits(parts, at, unseen.as_ref()).then_some(Left { at, unseen })
}

/// Whether the ring can stand at this position.
///
/// It cannot if it is a new one: the guest restarted meanwhile, perhaps with its ring in the same place.
fn fits(parts: &PackedParts, at: Position, unseen: Option<&Unseen>) -> bool {
    if at != Position::START && looks_new(parts) {
        return false;
    }
    let unseen = unseen.map_or(0, |unseen| at.distance_to(unseen.end, parts.size).unwrap_or(0));
    (0..parts.size).all(|index| {
        let flags = parts.load_flags(index);
        let ahead = match index.checked_sub(at.index) {
            Some(ahead) => ahead,
            None => index + (parts.size - at.index),
        };
        if ahead < unseen {
            true
        } else if index < at.index {
            // It was available in this round, so it is not as the round before left it.
            !at.is_unused_since_last_round(flags)
        } else {
            !at.is_used(flags)
        }
    })
}

/// Whether the ring is as a driver makes it: the first descriptors available, perhaps, and no other ever. Where a ring has moved from
/// its beginning, some descriptor has the USED bit set, or an available one follows one that is not. (The only exception
/// that is not at a beginning: one chain has gone from the very last descriptor round to the first ones, all chains before it
/// had one descriptor, and none came after it. It is taken for a new ring.)
fn looks_new(parts: &PackedParts) -> bool {
    let mut rest = false;
    (0..parts.size).all(|index| {
        let flags = parts.load_flags(index);
        let available = Position::START.is_available(flags);
        let fits = available && !rest || Position::START.is_unused_since_last_round(flags);
        rest |= !available;
        fits
    })
}

/// What was written behind `at` without the used element there.
fn unseen(parts: &PackedParts, at: Position) -> Option<Unseen> {
    let size = parts.size;
    let (mut done, first) = chain(parts, at, size)?;
    let mut end = at.ahead(done, size);
    let mut others = Vec::new();
    while done < size && end.is_used(parts.load_flags(end.index)) {
        // Its flags are gone, and with them the chain's length. But if the chain goes on behind it, the id in the used element is
        // that of the chain's last descriptor, and no two chains have the same.
        let id = parts.fields(end.index).id;
        others.push((end, id));
        let more = chain(parts, end.ahead(1, size), size - done - 1)
            .filter(|&(_, last)| last == id)
            .map_or(0, |(entries, _)| entries);
        end = end.ahead(1 + more, size);
        done += 1 + more;
    }
    (!others.is_empty()).then_some(Unseen { first, others, end })
}

/// The number of descriptors, and the id, of the chain that begins or goes on at an available descriptor here, if it has no more
/// than `limit`.
fn chain(parts: &PackedParts, from: Position, limit: u16) -> Option<(u16, u16)> {
    let mut at = from;
    for entries in 1..=limit {
        let flags = parts.load_flags(at.index);
        if !at.is_available(flags) {
            return None;
        }
        if flags & DESC_F_NEXT == 0 {
            return Some((entries, parts.fields(at.index).id));
        }
        at = at.ahead(1, parts.size);
    }
    None
}

#[cfg(test)]
mod tests;
