//! A packed ring in memory (virtio 1.2, 2.8.1 to 2.8.14): where its parts are, each access to them, and what a place in
//! it is.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::chain::Direction;
use super::layout::{DESC_BYTES, RawDescriptor, resolve_part};
use super::walk::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use super::{MAX_RING_SIZE, RingError, RingSpec};

const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;

/// A place in the ring: the index of a descriptor and the wrap counter that goes with it, which changes each time round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Below the ring's size.
    pub(super) index: u16,
    wrap: bool,
}

impl Position {
    /// Where a new ring begins: wrap counters begin at 1 (virtio 1.2, 2.8.1).
    pub(super) const START: Position = Position { index: 0, wrap: true };

    /// From the form that event suppression areas and ring bases have: the wrap counter is bit 15.
    pub(super) fn from_bits(bits: u16) -> Position {
        Position {
            index: bits & 0x7fff,
            wrap: bits & 0x8000 != 0,
        }
    }

    #[inline]
    pub(super) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// The place `by` descriptors on, at most once round a ring of `size`.
    #[inline]
    pub(super) fn ahead(self, by: u16, size: u16) -> Position {
        // Below 2 * 32768: it cannot overflow.
        let index = self.index + by;
        if index >= size {
            Position {
                index: index - size,
                wrap: !self.wrap,
            }
        } else {
            Position { index, ..self }
        }
    }

    /// The place `by` descriptors back, at most once round a ring of `size`.
    #[inline]
    pub(super) fn behind(self, by: u16, size: u16) -> Position {
        match self.index.checked_sub(by) {
            Some(index) => Position { index, ..self },
            None => Position {
                index: self.index + (size - by),
                wrap: !self.wrap,
            },
        }
    }

    /// Descriptors from here up to `later` of a ring of `size`; `None` if that is more than once round.
    pub(super) fn distance_to(self, later: Position, size: u16) -> Option<u16> {
        if self.wrap == later.wrap {
            later.index.checked_sub(self.index)
        } else {
            (later.index <= self.index).then(|| size - (self.index - later.index))
        }
    }

    /// Whether, `moved` descriptors having just been used up to here, the one at `event` was among them (virtio 1.2, 2.8.10 and
    /// 2.7.10). An event that cannot be told from one a round earlier counts as passed.
    #[inline]
    pub(super) fn passes(self, event: Position, moved: u32, size: u16) -> bool {
        if moved >= u32::from(size) {
            return true;
        }
        let round = if self.wrap == event.wrap {
            0
        } else {
            i32::from(size)
        };
        let behind = i32::from(self.index) - i32::from(event.index) + round;
        u32::try_from(behind).is_ok_and(|behind| 0 < behind && behind <= moved)
    }

    /// Whether these flags make the descriptor here available (virtio 1.2, 2.8.1).
    #[inline]
    pub(super) fn is_available(self, flags: u16) -> bool {
        flags & (DESC_F_AVAIL | DESC_F_USED) == self.available_flags()
    }

    /// Whether these flags make the descriptor here available, and all of a chain whose buffer is for that direction.
    #[inline]
    pub(super) fn is_lone(self, flags: u16, direction: Direction) -> bool {
        let expected = self.available_flags() | direction.flag();
        flags & (DESC_F_AVAIL | DESC_F_USED | DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) == expected
    }

    #[inline]
    fn available_flags(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    /// Whether these flags say that the descriptor here is used and not yet made available again.
    pub(super) fn is_used(self, flags: u16) -> bool {
        flags & (DESC_F_AVAIL | DESC_F_USED) == self.used_flags()
    }

    /// Whether these flags say that the descriptor here was not available since it was used in the round before.
    pub(super) fn is_unused_since_last_round(self, flags: u16) -> bool {
        let other = Position {
            wrap: !self.wrap,
            ..self
        };
        other.is_used(flags)
    }

    /// The flags that make the descriptor here used.
    #[inline]
    pub(super) fn used_flags(self) -> u16 {
        if self.wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 }
    }
}

/// The fields of a descriptor but its flags, as they were at the moment of the only read.
pub(super) struct Fields {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) id: u16,
}

/// A used element (virtio 1.2, 2.8.13): length, id and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UsedElement(u64);

impl UsedElement {
    /// Of the chain with this id, whose first descriptor is at `place`.
    #[inline]
    pub(super) fn new(place: Position, id: u16, written: u32) -> UsedElement {
        // WRITE says that the length means something (2.8.4).
        let write = if written > 0 { DESC_F_WRITE } else { 0 };
        let flags = place.used_flags() | write;
        UsedElement(u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48)
    }
}

/// What one side wants of the other's notifications (virtio 1.2, 2.8.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// One for every burst.
    Always,
    /// None.
    Never,
    /// One when the descriptor at this place is used (or made available).
    At(Position),
}

const EVENT_F_ENABLE: u32 = 0;
const EVENT_F_DISABLE: u32 = 1;
const EVENT_F_DESC: u32 = 2;

impl Wish {
    /// From the words of an event suppression area: the descriptor in the lower, the flags in the upper.
    #[inline]
    fn from_words(words: u32) -> Wish {
        let [low, high, ..] = words.to_le_bytes();
        match words >> 16 & 3 {
            EVENT_F_DISABLE => Wish::Never,
            EVENT_F_DESC => Wish::At(Position::from_bits(u16::from_le_bytes([low, high]))),
            // The fourth value is reserved: one notification too many does no harm.
            _ => Wish::Always,
        }
    }

    #[inline]
    fn words(self) -> u32 {
        match self {
            Wish::Always => EVENT_F_ENABLE << 16,
            Wish::Never => EVENT_F_DISABLE << 16,
            Wish::At(position) => EVENT_F_DESC << 16 | u32::from(position.bits()),
        }
    }
}

/// The three parts of a ring in our memory. Whoever makes it keeps the memory map for as long.
pub(super) struct PackedParts {
    pub(super) size: u16,
    desc: NonNull<u8>,
    driver_event: NonNull<u8>,
    device_event: NonNull<u8>,
}

impl PackedParts {
    pub(super) fn new(spec: &RingSpec) -> Result<PackedParts, RingError> {
        let size = spec.size;
        if size == 0 || size > MAX_RING_SIZE {
            return Err(RingError::BadPackedSize { size });
        }
        let part = |part, addr, align, bytes| resolve_part(spec, part, addr, align, bytes);
        Ok(PackedParts {
            size,
            desc: part(
                "descriptor ring",
                spec.desc_addr,
                16,
                DESC_BYTES * usize::from(size),
            )?,
            driver_event: part("driver event suppression area", spec.avail_addr, 4, 4)?,
            device_event: part("device event suppression area", spec.used_addr, 4, 4)?,
        })
    }

    /// `index` is that of a position, hence below `size`.
    #[inline]
    fn at(&self, index: u16) -> NonNull<u8> {
        debug_assert!(index < self.size);
        // SAFETY: index is below size, and `new` checked that the ring of size descriptors is mapped.
        unsafe { self.desc.add(usize::from(index) * DESC_BYTES) }
    }

    #[inline]
    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: the flags are the last two bytes of a descriptor, which is mapped and 16-aligned.
        unsafe { AtomicU16::from_ptr(self.at(index).add(14).as_ptr().cast()) }
    }

    /// The flags of a descriptor.
    #[inline]
    pub(super) fn load_flags(&self, index: u16) -> u16 {
        // Acquire: the other fields, those of the descriptors that the chain goes on with, and the buffers' bytes are read
        // after the flags that make them available.
        u16::from_le(self.flags(index).load(Ordering::Acquire))
    }

    /// The fields of a descriptor but its flags, which were loaded before.
    #[inline]
    pub(super) fn fields(&self, index: u16) -> Fields {
        // SAFETY: a descriptor is mapped and has 16 bytes.
        let raw = unsafe { RawDescriptor::read(self.at(index)) };
        Fields {
            addr: raw.addr,
            len: raw.len,
            id: raw.third,
        }
    }

    /// Makes a descriptor a used element that the driver will not look at before another one is released.
    #[inline]
    pub(super) fn store_used(&self, index: u16, element: UsedElement) {
        self.second_half(index)
            .store(element.0.to_le(), Ordering::Relaxed);
    }

    /// Makes a descriptor a used element after everything that was stored before.
    #[inline]
    pub(super) fn release_used(&self, index: u16, element: UsedElement) {
        self.second_half(index)
            .store(element.0.to_le(), Ordering::Release);
    }

    /// All of a used element but the address, which means nothing in it. Written as one, so that it is there or not, whenever this
    /// process ends.
    #[inline]
    fn second_half(&self, index: u16) -> &AtomicU64 {
        // SAFETY: the last 8 bytes of a mapped descriptor, which is 16-aligned. Our other accesses to them are of the same thread.
        unsafe { AtomicU64::from_ptr(self.at(index).add(8).as_ptr().cast()) }
    }

    /// What the driver wants of our notifications. Both words in one load: the driver may be writing them.
    #[inline]
    pub(super) fn driver_wish(&self) -> Wish {
        // SAFETY: `new` checked that the area's 4 bytes are mapped and 4-aligned; every access of ours to it is atomic.
        let words = unsafe { AtomicU32::from_ptr(self.driver_event.as_ptr().cast()) };
        Wish::from_words(u32::from_le(words.load(Ordering::Relaxed)))
    }

    /// Says what we want of the driver's notifications.
    #[inline]
    pub(super) fn set_device_wish(&self, wish: Wish) {
        // SAFETY: as in `driver_wish`.
        let words = unsafe { AtomicU32::from_ptr(self.device_event.as_ptr().cast()) };
        words.store(wish.words().to_le(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The place after `steps` descriptors from the start of a new ring.
    fn after(steps: u32, size: u16) -> Position {
        let size_u32 = u32::from(size);
        Position {
            index: u16::try_from(steps % size_u32).unwrap(),
            wrap: (steps / size_u32).is_multiple_of(2),
        }
    }

    #[test]
    fn positions_match_a_counter_that_never_wraps() {
        for size in [1u16, 2, 3, 7, 8] {
            let round = u32::from(size);
            for steps in 0..5 * round {
                let here = after(steps, size);
                assert_eq!(Position::from_bits(here.bits()), here);
                for by in 0..=size {
                    let there = here.ahead(by, size);
                    assert_eq!(
                        there,
                        after(steps + u32::from(by), size),
                        "{here:?} + {by} of {size}"
                    );
                    assert_eq!(there.behind(by, size), here, "{there:?} - {by} of {size}");
                    assert_eq!(here.distance_to(there, size), Some(by));
                }
            }
        }
        let (first, second) = (Position::from_bits(3), Position::from_bits(4));
        assert_eq!(second.distance_to(first, 8), None);
        assert_eq!(first.distance_to(Position::from_bits(4 | 0x8000), 8), None);
    }

    #[test]
    fn an_event_is_passed_when_its_descriptor_was_used() {
        for size in [1u16, 2, 5, 8] {
            let round = u32::from(size);
            for old in 2 * round..4 * round {
                for moved in 0..2 * round {
                    let new = after(old + moved, size);
                    // From the event that was just missed to one a whole round ahead.
                    for event in old.saturating_sub(1)..old + moved + round {
                        let oracle = (old..old + moved).contains(&event) || moved >= round;
                        let passes = new.passes(after(event, size), moved, size);
                        assert_eq!(passes, oracle, "size {size}: {event} within {old} + {moved}");
                    }
                }
            }
        }
        // Nonsense is no panic.
        assert!(!Position::from_bits(0).passes(Position::from_bits(0x7fff), 1, 2));
    }

    #[test]
    fn wishes_survive_the_way_through_memory() {
        for wish in [
            Wish::Always,
            Wish::Never,
            Wish::At(Position::from_bits(0x8005)),
            Wish::At(Position::from_bits(0)),
        ] {
            assert_eq!(Wish::from_words(wish.words()), wish);
        }
        assert_eq!(Wish::from_words(3 << 16 | 7), Wish::Always);
        assert_eq!(Wish::At(Position::from_bits(0x8005)).words(), 0x0002_8005);
    }
}
