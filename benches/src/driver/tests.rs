//! What the drivers put into memory, and what they make of devices that break rules. That they agree with a device that keeps them is
//! tested with the project's own, in [`crate::joined`].

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vnic_tests::frontend::{Pages, SharedMemory};

use super::*;

const SIZE: u16 = 8;

fn buffers(count: u32) -> Buffers {
    Buffers {
        first: 0x1_0000,
        stride: 256,
        count,
        lengths: vec![72, 100, 200],
        writable: false,
    }
}

fn memory() -> SharedMemory {
    SharedMemory::new(0x10_0000, Pages::Ordinary).unwrap()
}

/// Address and length of a descriptor.
fn descriptor(memory: &SharedMemory, place: &RingPlace, index: u64) -> (u64, u64) {
    let at = place.descriptors + 16 * index;
    let load = |address| word::<AtomicU64>(memory.region(), address).load(Ordering::Relaxed);
    (load(at), load(at + 8) & 0xffff_ffff)
}

/// A device that returns `count` buffers of a split ring, the last one under another id than its own if `id` says so.
fn return_split(memory: &SharedMemory, place: &RingPlace, from: u16, count: u16, id: Option<u32>) {
    let region = memory.region();
    for index in from..from + count {
        let entry = place.used + 4 + 8 * u64::from(index % SIZE);
        let own = u32::from(index % SIZE);
        let last = index + 1 == from + count;
        let told = id.filter(|_| last).unwrap_or(own);
        word::<AtomicU32>(region, entry).store(told, Ordering::Relaxed);
        word::<AtomicU32>(region, entry + 4).store(60 + own, Ordering::Relaxed);
    }
    word::<AtomicU16>(region, place.used + 2).store(from + count, Ordering::Relaxed);
}

/// The same for a packed ring, within its first lap.
fn return_packed(memory: &SharedMemory, place: &RingPlace, from: u16, count: u16, id: Option<u16>) {
    for index in from..from + count {
        let last = index + 1 == from + count;
        let told = id.filter(|_| last).unwrap_or(index);
        let value = u64::from(60 + index) | u64::from(told) << 32 | 0x8080 << 48;
        word::<AtomicU64>(memory.region(), place.descriptors + 16 * u64::from(index) + 8)
            .store(value, Ordering::Relaxed);
    }
}

#[test]
fn parts_of_a_ring_do_not_overlap() {
    for size in [1, 8, 1024, 32768] {
        let (place, end) = place(100, size);
        let entries = u64::from(size);
        assert!(place.descriptors >= 100 && place.descriptors.is_multiple_of(64));
        assert!(place.avail >= place.descriptors + 16 * entries);
        assert!(place.used >= place.avail + 6 + 2 * entries && place.used.is_multiple_of(64));
        assert!(end >= place.used + 6 + 8 * entries);
    }
}

#[test]
fn buffers_follow_each_other_and_begin_again() {
    let mut cursor = Cursor::new(buffers(4));
    let seen: Vec<_> = (0..6).map(|_| cursor.next()).collect();
    let at = |number: u64| 0x1_0000 + 256 * number;
    assert_eq!(
        seen,
        [
            (at(0), 72),
            (at(1), 100),
            (at(2), 200),
            (at(3), 72),
            (at(0), 72),
            (at(1), 100)
        ]
    );
}

fn descriptors_are_rewritten<'m, R: DriverRing<'m>>(
    memory: &'m SharedMemory,
    give_back: impl Fn(&RingPlace, u16),
) {
    let (place, _) = place(4096, SIZE);
    let mut ring = R::new(memory.region(), &place, buffers(13));
    ring.offer(SIZE);
    for index in 0..u64::from(SIZE) {
        let length = [72, 100, 200][usize::try_from(index).unwrap() % 3];
        assert_eq!(
            descriptor(memory, &place, index),
            (0x1_0000 + 256 * index, length)
        );
    }
    give_back(&place, 6);
    assert_eq!(
        (ring.completed(), ring.outstanding(), ring.position()),
        (Ok(6), 2, 6)
    );
    assert_eq!((ring.written(0), ring.written(5)), (60, 65));
    ring.offer(6);
    // Buffers 8 to 12, and the first one again.
    assert_eq!(descriptor(memory, &place, 0), (0x1_0000 + 256 * 8, 200));
    assert_eq!(descriptor(memory, &place, 4), (0x1_0000 + 256 * 12, 72));
    assert_eq!(descriptor(memory, &place, 5), (0x1_0000, 72));
    assert_eq!(ring.outstanding(), 8);
}

#[test]
fn more_buffers_than_descriptors_take_turns() {
    let memory = memory();
    descriptors_are_rewritten::<SplitRing<'_>>(&memory, |place, count| {
        return_split(&memory, place, 0, count, None);
    });
    let memory = self::memory();
    descriptors_are_rewritten::<PackedRing<'_>>(&memory, |place, count| {
        return_packed(&memory, place, 0, count, None);
    });
}

#[test]
fn a_device_that_reorders_is_found_out() {
    let memory = memory();
    let (place, _) = place(4096, SIZE);
    let mut ring = SplitRing::new(memory.region(), &place, buffers(8));
    ring.offer(4);
    return_split(&memory, &place, 0, 3, Some(0));
    assert_eq!(ring.completed(), Err(Fault::Order { id: 0, expected: 2 }));

    let memory = self::memory();
    let mut ring = PackedRing::new(memory.region(), &place, buffers(8));
    ring.offer(4);
    return_packed(&memory, &place, 0, 3, Some(7));
    assert_eq!(ring.completed(), Err(Fault::Order { id: 7, expected: 2 }));
}

#[test]
fn a_device_cannot_return_more_than_it_has() {
    let memory = memory();
    let (place, _) = place(4096, SIZE);
    let mut ring = SplitRing::new(memory.region(), &place, buffers(8));
    ring.offer(4);
    return_split(&memory, &place, 0, 5, None);
    let fault = Fault::Count {
        count: 5,
        outstanding: 4,
    };
    assert_eq!(ring.completed(), Err(fault));

    let memory = self::memory();
    let mut ring = PackedRing::new(memory.region(), &place, buffers(8));
    ring.offer(4);
    return_packed(&memory, &place, 0, 6, None);
    assert_eq!(ring.completed(), Ok(4), "the rest is not looked at");
}

#[test]
fn the_device_says_whether_it_wants_kicks() {
    let memory = memory();
    let (place, _) = place(4096, SIZE);
    let split = SplitRing::new(memory.region(), &place, buffers(8));
    let flags: &AtomicU16 = word(memory.region(), place.used);
    assert!(split.wants_kick());
    flags.store(1, Ordering::Relaxed);
    assert!(!split.wants_kick());

    let packed = PackedRing::new(memory.region(), &place, buffers(8));
    let flags: &AtomicU16 = word(memory.region(), place.used + 2);
    flags.store(0, Ordering::Relaxed);
    assert!(packed.wants_kick());
    flags.store(1, Ordering::Relaxed);
    assert!(!packed.wants_kick());
}
