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
    /// Chains from here on that the driver still waits for, and that cannot be worked on any more: all but the first, or some of them, are
    /// used already.
    pub(super) unseen: Option<Unseen>,
}

/// See [`Left::unseen`].
pub(super) struct Unseen {
    /// The first chain, which is not used yet.
    pub(super) first: Found,
    pub(super) others: Vec<Found>,
    /// Where the last one ends.
    pub(super) end: Position,
}

/// A chain in the ring that is available, or used and not shown to the driver.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) place: Position,
    pub(super) id: u16,
    entries: u16,
    used: bool,
}

/// The position that the noted ones mean, if the ring can be the one that they were noted for.
pub(super) fn left(parts: &PackedParts, noted: Noted) -> Option<Left> {
    let at = shown(parts, noted)?;
    let found = chains(parts, at);
    // A burst of which the driver was not shown the first element.
    let unseen = match found.split_first() {
        Some((&first, rest)) if !first.used => {
            let used = rest.iter().take_while(|chain| chain.used).count();
            gather(parts, first, &rest[..used])
        }
        _ => None,
    };
    fits(parts, at, unseen.as_ref()).then_some(Left { at, unseen })
}

/// The same for a front-end that worked on the ring itself while no back-end was there, from the position that it had been told up to
/// another: QEMU drops what a guest sends then. Since it began at a place that is out of date, that can be ahead of where the
/// ring stands; then all up to where it ended is given back to the driver.
pub(super) fn overtaken(parts: &PackedParts, noted: Noted, from: Position, to: Position) -> Option<Left> {
    let size = parts.size;
    if from.index >= size || to.index >= size || from == to {
        return None;
    }
    from.distance_to(to, size)?;
    let at = shown(parts, noted)?;
    if at == from {
        // The driver has been shown what was dropped, and with it what had been written behind.
        let behind = chains(parts, to);
        let shown = behind.iter().take_while(|chain| chain.used).last();
        let at = shown.map_or(to, |chain| chain.end(size));
        return fits(parts, at, None).then_some(Left { at, unseen: None });
    }
    let found = chains(parts, at);
    let begin = found.iter().position(|chain| chain.place == from)?;
    let end = found.iter().position(|chain| chain.end(size) == to)?;
    let dropped = found.get(begin..=end)?.iter().all(|chain| chain.used);
    let (&first, rest) = found.get(..=end)?.split_first()?;
    // The driver waits for the first one, or the position would be another.
    (dropped && !first.used).then_some(())?;
    Some(Left {
        at,
        unseen: gather(parts, first, rest),
    })
}

/// A position that was noted, as before and after the last burst.
pub(super) type Noted = (u16, u16);

/// Up to where the driver was shown used elements.
fn shown(parts: &PackedParts, (before, after): Noted) -> Option<Position> {
    let (before, after) = (Position::from_bits(before), Position::from_bits(after));
    if before.index >= parts.size || after.index >= parts.size {
        return None;
    }
    before.distance_to(after, parts.size)?;
    // The first used element of a burst is stored last, after the note. If the descriptor there is still available, the driver was
    // not shown the burst. If not, it was, whatever became of the descriptor since: used, available in the next round,
    // even used in that one.
    Some(if before.is_available(parts.load_flags(before.index)) {
        before
    } else {
        after
    })
}

fn gather(parts: &PackedParts, first: Found, others: &[Found]) -> Option<Unseen> {
    let last = others.last()?;
    Some(Unseen {
        first,
        others: others.to_vec(),
        end: last.end(parts.size),
    })
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

impl Found {
    fn end(&self, size: u16) -> Position {
        self.place.ahead(self.entries, size)
    }
}

/// The chains from `at` on that are available or used in this round, at most one round.
fn chains(parts: &PackedParts, at: Position) -> Vec<Found> {
    let size = parts.size;
    let mut found = Vec::new();
    let mut place = at;
    let mut left = size;
    while left > 0 {
        let used = place.is_used(parts.load_flags(place.index));
        let (entries, id) = if used {
            // Its flags are gone, and with them the chain's length. But if the chain goes on behind it, the id in the used element is
            // that of the chain's last descriptor, and no two chains have the same.
            let id = parts.fields(place.index).id;
            let more = chain(parts, place.ahead(1, size), left - 1).filter(|&(_, last)| last == id);
            (1 + more.map_or(0, |(entries, _)| entries), id)
        } else {
            match chain(parts, place, left) {
                Some(chain) => chain,
                None => break,
            }
        };
        found.push(Found {
            place,
            id,
            entries,
            used,
        });
        place = place.ahead(entries, size);
        left -= entries;
    }
    found
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
