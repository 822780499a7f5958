//! The packed virtqueue (virtio 1.2, 2.8), device side.

mod resume;

use std::sync::atomic::{Ordering, fence};

use super::chain::{Direction, Lone};
use super::cursors::{CursorSlot, Keeping};
use super::engine::{Core, Engine, More};
use super::packed_layout::{Fields, PackedParts, Position, UsedElement, Wish};
use super::walk::{DESC_F_INDIRECT, DESC_F_NEXT, Stop, Walk};
use super::{MAX_INDIRECT_CHAIN, RingError, RingSpec};

/// A packed virtqueue (virtio 1.2, 2.8), device side, with its pointers resolved.
///
/// Available and used descriptors share one ring. Used ones are written in a burst, and of the flags that show them to the
/// driver those of the first are stored last, so the driver sees all or none.
pub struct PackedRing {
    parts: PackedParts,
    core: Core,
    /// The next descriptor to take.
    next_avail: Position,
    /// Where the next used element goes. Never ahead of `next_avail`.
    next_used: Position,
    /// Descriptors taken and not yet published as used.
    outstanding: u16,
    /// The first used element that was not yet published and where it goes; it will publish those after it as well.
    first: Option<(Position, UsedElement)>,
    /// Descriptors of used elements not yet published.
    staged: u16,
    /// Descriptors of used elements published since the last decision to notify.
    undecided: u32,
    /// The next decision is to notify, whatever the driver wishes.
    must_signal: bool,
    /// Whether kicks were asked for.
    armed: bool,
    /// Where the position is noted for a successor of this process.
    cursor: Option<CursorSlot>,
}

// SAFETY: the addresses it holds belong to no thread, and they stay mapped while the batch in it holds the memory map.
unsafe impl Send for PackedRing {}

/// What became of an attempt to take a chain.
enum Taken {
    Chain,
    /// The driver has made none available.
    Nothing,
    /// The batch has no room for it.
    NoRoom,
}

impl PackedRing {
    /// Resolves and checks the ring's addresses and its base. With `keep`, its position is noted there from now on, and if one is noted
    /// that the base's giver cannot know of, the ring goes on from that one.
    pub fn new(spec: &RingSpec, keep: Option<&Keeping>) -> Result<PackedRing, RingError> {
        let parts = PackedParts::new(spec)?;
        let kept = keep.and_then(|keep| go_on(&parts, keep));
        let base = kept.map_or(spec.base, |at| u32::from(at.bits()) | u32::from(at.bits()) << 16);
        let (next_avail, next_used, outstanding) = positions(base, parts.size).ok_or(RingError::BadBase {
            base,
            size: parts.size,
        })?;
        if let Some(keep) = keep {
            keep.slot.begin(keep.session, keep.told, next_used.bits());
        }
        // A predecessor may have asked for kicks.
        parts.set_device_wish(Wish::Never);
        Ok(PackedRing {
            parts,
            core: Core::new(spec),
            next_avail,
            next_used,
            outstanding,
            first: None,
            staged: 0,
            undecided: 0,
            must_signal: true,
            armed: false,
            cursor: keep.map(|keep| keep.slot.clone()),
        })
    }

    /// How far the ring was processed, with wrap counters: the answer to GET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Asks the driver for notifications (kicks), then looks again: `true` means work is there, do not sleep.
    pub fn arm(&mut self) -> bool {
        let wish = if self.core.event_idx {
            Wish::At(self.next_avail)
        } else {
            Wish::Always
        };
        self.parts.set_device_wish(wish);
        self.armed = true;
        // The driver stores its flags and then loads what was stored above; with a full fence on both sides, either it
        // sees the request and kicks, or its descriptor is seen here.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Tells the driver not to kick.
    pub fn disarm(&mut self) {
        if self.armed {
            self.parts.set_device_wish(Wish::Never);
            self.armed = false;
        }
    }

    /// Whether the driver has made buffers available that were not taken yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        let here = self.next_avail;
        self.outstanding < self.parts.size && here.is_available(self.parts.load_flags(here.index))
    }

    /// Notifies the driver of the used buffers published since the last call, if it asked to be told. Returns whether it
    /// wrote the call eventfd. The first call always notifies: a predecessor may have ended between publishing and notifying.
    pub fn notify(&mut self) -> bool {
        if self.must_signal {
            self.must_signal = false;
            self.undecided = 0;
            return self.core.call.signal();
        }
        if self.undecided == 0 {
            return false;
        }
        let moved = std::mem::take(&mut self.undecided);
        // Our flags were stored before, the driver's wish is loaded after: either it sees the used descriptors before it
        // sleeps, or we see its wish (the twin of the fence in `arm`).
        fence(Ordering::SeqCst);
        let wanted = match self.parts.driver_wish() {
            Wish::Never => false,
            Wish::At(event) if self.core.event_idx => self.next_used.passes(event, moved, self.parts.size),
            Wish::At(_) | Wish::Always => true,
        };
        wanted && self.core.call.signal()
    }

    /// Takes chains of one buffer, as most are, up to the first other one, the end of the ring or `max`; returns how many.
    #[inline(always)]
    fn take_lone(&mut self, direction: Direction, max: usize) -> u16 {
        let (here, parts) = (self.next_avail, &self.parts);
        let most = usize::from((parts.size - self.outstanding).min(parts.size - here.index)).min(max);
        let taken = self.core.batch.push_lone(most, direction, |by| {
            let index = here.index + by;
            here.is_lone(parts.load_flags(index), direction).then(|| {
                let Fields { id, addr, len } = parts.fields(index);
                Lone { id, addr, len }
            })
        });
        self.next_avail = here.ahead(taken, self.parts.size);
        self.outstanding += taken;
        taken
    }

    /// Takes the next chain, if there is one.
    #[inline]
    fn take(&mut self, direction: Direction) -> Result<Taken, RingError> {
        let here = self.next_avail;
        if self.outstanding == self.parts.size {
            return Ok(Taken::Nothing);
        }
        let flags = self.parts.load_flags(here.index);
        if !here.is_available(flags) {
            return Ok(Taken::Nothing);
        }
        if self.core.batch.is_full() {
            return Ok(Taken::NoRoom);
        }
        self.follow(flags, direction)
    }

    /// Takes the next chain, which is available, and whose first descriptor has these flags.
    // Seldom called, and the loop of `take_lone` beside it needs the registers.
    #[inline(never)]
    fn follow(&mut self, flags: u16, direction: Direction) -> Result<Taken, RingError> {
        let here = self.next_avail;
        let walk = if flags & DESC_F_INDIRECT == 0 {
            self.walk_direct(flags, direction)
        } else {
            self.walk_table(flags, direction)
        };
        match walk {
            Ok(End {
                id,
                entries,
                truncated,
            }) => {
                self.core.batch.close(id, entries, truncated);
                self.next_avail = here.ahead(entries, self.parts.size);
                self.outstanding += entries;
                Ok(Taken::Chain)
            }
            Err(stop) => {
                self.core.batch.abort();
                match stop {
                    Stop::Full => Ok(Taken::NoRoom),
                    Stop::Broken(error) => Err(error),
                }
            }
        }
    }

    /// Follows a chain of descriptors in the ring, whose first has these flags.
    fn walk_direct(&mut self, mut flags: u16, direction: Direction) -> Result<End, Stop> {
        let size = self.parts.size;
        let head = self.next_avail.index;
        let mut walk = Walk::new(head, direction);
        let mut at = self.next_avail;
        // What was taken and not given back cannot be available again.
        let limit = size - self.outstanding;
        let mut entries = 0;
        loop {
            entries += 1;
            self.core.batch.walk(1);
            if flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::IndirectMixed { head }.into());
            }
            let fields = self.parts.fields(at.index);
            walk.buffer(&mut self.core.batch, fields.addr, fields.len, flags)?;
            if flags & DESC_F_NEXT == 0 {
                // The id is in the last descriptor; what it means is the driver's business (2.8.2).
                return Ok(End {
                    id: fields.id,
                    entries,
                    truncated: walk.end()?,
                });
            }
            if entries == limit {
                let limit = limit.into();
                return Err(RingError::ChainTooLong { head, limit }.into());
            }
            at = at.ahead(1, size);
            flags = self.parts.load_flags(at.index);
            if !at.is_available(flags) {
                return Err(RingError::NotAvailable { head, at: at.index }.into());
            }
        }
    }

    /// Goes through the indirect table that the next descriptor, with these flags, refers to. All of its descriptors count, in
    /// their order; only their WRITE flags mean anything (2.8.7).
    fn walk_table(&mut self, flags: u16, direction: Direction) -> Result<End, Stop> {
        let Core { batch, tables, .. } = &mut self.core;
        let head = self.next_avail.index;
        let table = self.parts.fields(head);
        let entries = tables.check(head, table.len, flags, false)?;
        let limit = self.parts.size.max(MAX_INDIRECT_CHAIN);
        let entries = u16::try_from(entries)
            .ok()
            .filter(|&entries| entries <= limit)
            .ok_or(RingError::ChainTooLong {
                head,
                limit: limit.into(),
            })?;
        let mut walk = Walk::new(head, direction);
        batch.walk(1 + u32::from(entries));
        for index in 0..entries {
            let desc = tables.read(batch.memory(), head, table.addr, index)?;
            let flags = desc.fourth;
            if flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::IndirectNested { head }.into());
            }
            walk.buffer(batch, desc.addr, desc.len, flags)?;
        }
        Ok(End {
            id: table.id,
            entries: 1,
            truncated: walk.end()?,
        })
    }
}

/// How a chain ended.
struct End {
    id: u16,
    /// Descriptors in the ring.
    entries: u16,
    /// Only a part of it was kept.
    truncated: bool,
}

/// Where the ring stands by what a predecessor noted, if that is good for it. What cannot be worked on any more is given back: the
/// frames of the predecessor's last moment are lost, their buffers are not.
fn go_on(parts: &PackedParts, keep: &Keeping) -> Option<Position> {
    let kept = keep.slot.kept(keep.session)?;
    let resume::Left { at, unseen } = if kept.told == keep.told {
        resume::left(parts, kept.moved)?
    } else {
        // A front-end that has worked on the ring has used all that it took.
        let settled = |base| positions(base, parts.size).filter(|(.., outstanding)| *outstanding == 0);
        let ((from, ..), (to, ..)) = (settled(kept.told)?, settled(keep.told)?);
        resume::overtaken(parts, kept.moved, from, to)?
    };
    let Some(unseen) = unseen else { return Some(at) };
    // What was written to the first is not known. A frame may have many buffers, so none of the others may be left with content either:
    // drivers drop what is shorter than a header.
    let element = |chain: &resume::Found| UsedElement::new(chain.place, chain.id, 0);
    for chain in &unseen.others {
        parts.store_used(chain.place.index, element(chain));
    }
    keep.slot.note(at.bits(), unseen.end.bits());
    parts.release_used(at.index, element(&unseen.first));
    Some(unseen.end)
}

/// The next descriptor to take, the next to use, and how many were taken and not used, from a ring base.
fn positions(base: u32, size: u16) -> Option<(Position, Position, u16)> {
    let [avail_low, avail_high, used_low, used_high] = base.to_le_bytes();
    let avail = u16::from_le_bytes([avail_low, avail_high]);
    let used = match u16::from_le_bytes([used_low, used_high]) {
        // DPDK's virtio-user sets only the lower half, as DPDK's own back-end takes only that one. A ring that stands
        // still has used all that it took, so the upper half is the same.
        0 => avail,
        used => used,
    };
    let (avail, used) = (Position::from_bits(avail), Position::from_bits(used));
    if avail.index >= size || used.index >= size {
        return None;
    }
    Some((avail, used, used.distance_to(avail, size)?))
}

impl Engine for PackedRing {
    #[inline]
    fn core(&self) -> &Core {
        &self.core
    }

    #[inline]
    fn size(&self) -> u16 {
        self.parts.size
    }

    fn gather(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        self.core.batch.clear();
        self.gather_more(direction, max)
    }

    fn gather_more(&mut self, direction: Direction, max: usize) -> Result<More, RingError> {
        let mut taken = 0;
        let mut otherwise = More::Empty;
        loop {
            let lone = self.take_lone(direction, max - taken);
            taken += usize::from(lone);
            if taken == max {
                break;
            }
            match self.take(direction) {
                Ok(Taken::Chain) => taken += 1,
                Ok(Taken::Nothing) => break,
                Ok(Taken::NoRoom) => {
                    otherwise = More::Full;
                    break;
                }
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(if taken == 0 {
            otherwise
        } else {
            More::Chains(taken)
        })
    }

    fn return_from(&mut self, index: usize) {
        let left = self.core.batch.entries_from(index);
        self.next_avail = self.next_avail.behind(left, self.parts.size);
        self.outstanding -= left;
        self.core.batch.clear();
    }

    #[inline(always)]
    fn complete(&mut self, from: usize, written: impl IntoIterator<Item = u32>) {
        let chains = self.core.batch.chains().get(from..).unwrap_or_default();
        let mut here = self.next_used;
        for (chain, written) in chains.iter().zip(written) {
            let element = UsedElement::new(here, chain.id, written);
            if self.first.is_none() {
                self.first = Some((here, element));
            } else {
                self.parts.store_used(here.index, element);
            }
            here = here.ahead(chain.entries, self.parts.size);
            self.staged += chain.entries;
        }
        self.next_used = here;
    }

    #[inline]
    fn forget(&mut self) {
        self.core.batch.clear();
    }

    #[inline]
    fn publish(&mut self) {
        if let Some((first, element)) = self.first.take() {
            if let Some(cursor) = &self.cursor {
                cursor.note(first.bits(), self.next_used.bits());
            }
            // The driver looks at used descriptors in their order, so it comes to the others only after this one, and
            // with this one it sees what was written before: the others, and the buffers' bytes.
            self.parts.release_used(first.index, element);
            self.undecided = self.undecided.saturating_add(self.staged.into());
            self.outstanding -= self.staged;
            self.staged = 0;
        }
    }
}

#[cfg(test)]
mod tests;
