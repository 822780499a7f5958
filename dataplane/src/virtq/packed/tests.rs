//! What a driver may and may not do to a packed ring.

use super::super::testing::{
    AVAIL_FLAG, Driver, EDGE, INDIRECT, Kind, MEMORY_END, NEXT, SCRATCH, USED_FLAG, WRITE,
};
use super::*;

/// A ring of 8 descriptors that has used `base` of them.
fn driver(base: u16) -> Driver {
    Driver::of(Kind::Packed, 8, base)
}

/// A driver whose first descriptors are these (address, length, flags), all of them available.
fn with(descs: &[(u64, u32, u16)]) -> Driver {
    let driver = driver(0);
    for (at, &(addr, len, flags)) in (0..).zip(descs) {
        driver.desc(at, addr, len, at, flags | AVAIL_FLAG);
    }
    driver
}

/// What gathering the first chain gives.
fn verdict(driver: &Driver, direction: Direction) -> Result<More, RingError> {
    let mut ring = driver.packed();
    let verdict = ring.gather(direction, 8);
    if verdict.is_err() {
        assert_eq!(ring.base(), driver.spec.base, "a broken chain is not taken");
        assert_eq!(ring.gather(direction, 8), verdict, "and the error stays");
        assert!(ring.has_available(), "so that a worker comes and finds it");
    }
    verdict
}

fn refused(descs: &[(u64, u32, u16)]) -> RingError {
    verdict(&with(descs), Direction::Readable).expect_err("a rule is broken")
}

/// Takes all there is and completes it.
fn use_all(ring: &mut PackedRing) -> usize {
    let mut used = 0;
    while let Ok(More::Chains(count)) = ring.gather(Direction::Readable, 64) {
        ring.complete_unwritten();
        ring.publish();
        used += count;
    }
    used
}

fn assert_send<T: Send>() {}

#[test]
fn a_ring_can_move_between_threads() {
    assert_send::<PackedRing>();
}

#[test]
fn sizes_addresses_and_bases_are_checked() {
    let driver = driver(0);
    let refused = |change: fn(&mut RingSpec, u64)| {
        let mut spec = driver.spec.clone();
        let user = spec.desc_addr;
        change(&mut spec, user);
        PackedRing::new(&spec, None).err()
    };
    assert_eq!(
        refused(|spec, _| spec.size = 0),
        Some(RingError::BadPackedSize { size: 0 })
    );
    assert_eq!(
        refused(|spec, _| spec.size = 32769),
        Some(RingError::BadPackedSize { size: 32769 })
    );
    assert_eq!(refused(|spec, _| (spec.size, spec.base) = (5, 0x8000_8000)), None);
    assert_eq!(
        refused(|spec, _| (spec.size, spec.base) = (32768, 0xffff_ffff)),
        None
    );

    let part = |change| match refused(change) {
        Some(RingError::BadAddress { part, .. }) => part,
        other => panic!("{other:?}"),
    };
    // Past the end, across an edge, unaligned.
    assert_eq!(
        part(|spec, user| spec.desc_addr = user + MEMORY_END - 112),
        "descriptor ring"
    );
    assert_eq!(
        part(|spec, user| spec.desc_addr = user + EDGE - 64),
        "descriptor ring"
    );
    assert_eq!(part(|spec, user| spec.desc_addr = user + 8), "descriptor ring");
    assert_eq!(
        part(|spec, user| spec.avail_addr = user + MEMORY_END - 2),
        "driver event suppression area"
    );
    assert_eq!(
        part(|spec, _| spec.used_addr += 2),
        "device event suppression area"
    );

    let bad = |base| Some(RingError::BadBase { base, size: 8 });
    assert_eq!(refused(|spec, _| spec.base = 0x8000_8008), bad(0x8000_8008));
    assert_eq!(refused(|spec, _| spec.base = 0x8008_8000), bad(0x8008_8000));
    // Used ahead of available, and more than a round behind.
    assert_eq!(refused(|spec, _| spec.base = 0x8004_8003), bad(0x8004_8003));
    assert_eq!(refused(|spec, _| spec.base = 0x0003_8004), bad(0x0003_8004));
}

#[test]
fn a_base_is_kept_and_its_lower_half_is_enough() {
    let mut driver = driver(0);
    for (base, kept) in [
        (0x8000_8000, 0x8000_8000),
        (0x8005_0002, 0x8005_0002),
        (0x8000, 0x8000_8000),
        (0x8003, 0x8003_8003),
        (0, 0),
    ] {
        driver.spec.base = base;
        assert_eq!(driver.packed().base(), kept, "{base:#x}");
    }
    // A whole round was taken and not used: nothing can be available, whatever the flags say.
    driver.spec.base = 0x0004_8004;
    for at in 0..8 {
        driver.desc(at, SCRATCH, 1, 0, AVAIL_FLAG);
    }
    let mut ring = driver.packed();
    assert!(!ring.has_available());
    assert_eq!(ring.gather(Direction::Readable, 8), Ok(More::Empty));
}

#[test]
fn a_stopped_ring_goes_on_where_it_was_in_every_place() {
    for size in [1, 2, 5, 8] {
        for base in 0..4 * size {
            let mut driver = Driver::of(Kind::Packed, size, base);
            for _ in 0..3 * size {
                let id = driver.send(&[b"x"], None);
                let mut ring = driver.packed();
                assert!(ring.has_available());
                assert_eq!(use_all(&mut ring), 1);
                assert_eq!(driver.used(), [(id, 0)]);
                assert_eq!(ring.base(), driver.settled_base());
                driver.spec.base = ring.base();
            }
        }
    }
}

#[test]
fn a_burst_is_seen_as_a_whole() {
    for base in [0, 6, 8, 13] {
        let mut driver = driver(base);
        let ids = [
            driver.send(&[b"a", b"b"], None),
            driver.send(&[b"c", b"d", b"e"], None),
            driver.send(&[b"f", b"g"], Some(0)),
        ];
        let mut ring = driver.packed();
        assert_eq!(ring.gather(Direction::Readable, 8), Ok(More::Chains(3)));
        for index in 0..3 {
            ring.complete(index, [0]);
            assert_eq!(driver.used(), [], "not before publish");
        }
        ring.publish();
        assert_eq!(driver.used(), ids.map(|id| (id, 0)));
        assert_eq!(ring.base(), driver.settled_base());
    }
}

#[test]
fn chains_that_were_returned_are_taken_again() {
    let mut driver = driver(5);
    let ids = [
        driver.send(&[b"a", b"b"], None),
        driver.send(&[b"c", b"d"], None),
        driver.send(&[b"e"], None),
    ];
    let mut ring = driver.packed();
    assert_eq!(ring.gather(Direction::Readable, 8), Ok(More::Chains(3)));
    ring.complete(0, [7]);
    ring.return_from(1);
    ring.publish();
    assert_eq!(driver.used(), [(ids[0], 7)]);
    assert_eq!(ring.base(), driver.settled_base());
    assert_eq!(use_all(&mut ring), 2);
    assert_eq!(driver.used(), [(ids[1], 0), (ids[2], 0)]);
}

#[test]
fn chains_that_do_not_end() {
    let link = (SCRATCH, 1, NEXT);
    assert_eq!(refused(&[link; 8]), RingError::ChainTooLong { head: 0, limit: 8 });
    // The end of the chain is not available, by either flag.
    assert_eq!(refused(&[link; 3]), RingError::NotAvailable { head: 0, at: 3 });
    let driver = with(&[link; 3]);
    driver.desc(3, SCRATCH, 1, 0, AVAIL_FLAG | USED_FLAG);
    assert_eq!(
        verdict(&driver, Direction::Readable),
        Err(RingError::NotAvailable { head: 0, at: 3 })
    );
    // Behind the ring's end the flags are the other way round.
    let link_back = |wrong: u16| {
        let driver = super::tests::driver(6);
        driver.desc(6, SCRATCH, 1, 0, NEXT | AVAIL_FLAG);
        driver.desc(7, SCRATCH, 1, 0, NEXT | AVAIL_FLAG);
        driver.desc(0, SCRATCH, 1, 0, wrong);
        verdict(&driver, Direction::Readable)
    };
    assert_eq!(
        link_back(AVAIL_FLAG),
        Err(RingError::NotAvailable { head: 6, at: 0 })
    );
    assert_eq!(link_back(USED_FLAG), Ok(More::Chains(1)));
    // As long as the ring is fine.
    let mut whole = [link; 8];
    whole[7].2 = 0;
    assert_eq!(verdict(&with(&whole), Direction::Readable), Ok(More::Chains(1)));
}

#[test]
fn what_was_taken_is_not_available_again_before_it_was_used() {
    let driver = with(&[(SCRATCH, 1, 0); 8]);
    let mut ring = driver.packed();
    assert_eq!(ring.gather(Direction::Readable, 64), Ok(More::Chains(8)));
    // The driver pretends to be a round ahead.
    for at in 0..8 {
        driver.desc(at, SCRATCH, 1, at, NEXT | USED_FLAG);
    }
    assert!(!ring.has_available());
    assert_eq!(ring.gather_more(Direction::Readable, 64), Ok(More::Empty));
    for index in 0..8 {
        ring.complete(index, [0]);
        assert_eq!(
            ring.gather_more(Direction::Readable, 64),
            Ok(More::Empty),
            "used, but not published"
        );
    }
    ring.publish();
    assert_eq!(ring.base(), 0);

    // A chain may not run into what was taken either.
    let driver = with(&[(SCRATCH, 1, 0); 6]);
    let mut ring = driver.packed();
    assert_eq!(ring.gather(Direction::Readable, 64), Ok(More::Chains(6)));
    driver.desc(6, SCRATCH, 1, 0, NEXT | AVAIL_FLAG);
    driver.desc(7, SCRATCH, 1, 0, NEXT | AVAIL_FLAG);
    assert_eq!(
        ring.gather_more(Direction::Readable, 64),
        Err(RingError::ChainTooLong { head: 6, limit: 2 })
    );
}

#[test]
fn indirect_tables_of_every_wrong_kind() {
    for len in [0, 1, 15, 17, u32::MAX] {
        assert_eq!(
            refused(&[(SCRATCH, len, INDIRECT)]),
            RingError::IndirectLength { head: 0, len }
        );
    }
    assert_eq!(
        refused(&[(SCRATCH, 16, INDIRECT | NEXT), (SCRATCH, 1, 0)]),
        RingError::IndirectWithNext { head: 0 }
    );
    assert_eq!(
        refused(&[(SCRATCH, 1, NEXT), (SCRATCH, 16, INDIRECT)]),
        RingError::IndirectMixed { head: 0 }
    );
    for table in [MEMORY_END, MEMORY_END - 15, u64::MAX - 8] {
        assert!(matches!(
            refused(&[(table, 16, INDIRECT)]),
            RingError::IndirectOutsideMemory { head: 0, .. }
        ));
    }
    for len in [16 * 1025, 16 * 70000] {
        assert_eq!(
            refused(&[(SCRATCH, len, INDIRECT)]),
            RingError::ChainTooLong { head: 0, limit: 1024 }
        );
    }
    let mut driver = with(&[(SCRATCH, 16, INDIRECT)]);
    driver.put_desc(SCRATCH, 0, SCRATCH, 1, 0, INDIRECT);
    assert_eq!(
        verdict(&driver, Direction::Readable),
        Err(RingError::IndirectNested { head: 0 })
    );
    driver.spec.indirect = false;
    assert_eq!(
        verdict(&driver, Direction::Readable),
        Err(RingError::IndirectNotNegotiated { head: 0 })
    );
}

#[test]
fn an_indirect_table_counts_as_a_whole_and_may_cross_regions() {
    let table = EDGE - 5;
    let driver = with(&[(table, 48, INDIRECT | WRITE)]);
    for (at, flags) in [0, NEXT, WRITE | AVAIL_FLAG].into_iter().enumerate() {
        driver.put_desc(table, u16::try_from(at).unwrap(), SCRATCH, 7, 9, flags);
    }
    for (direction, len) in [(Direction::Readable, 14), (Direction::Writable, 7)] {
        let mut ring = driver.packed();
        assert_eq!(ring.gather(direction, 1), Ok(More::Chains(1)));
        assert_eq!(ring.chain(0).unwrap().len(), len);
    }
}

#[test]
fn buffers_that_cannot_be() {
    for (addr, len) in [(MEMORY_END, 1), (u64::MAX, 1), (EDGE, u32::MAX)] {
        assert_eq!(
            refused(&[(addr, len, 0)]),
            RingError::BufferOutsideMemory { head: 0, addr, len }
        );
    }
    assert_eq!(
        refused(&[(SCRATCH, u32::MAX, NEXT | WRITE), (SCRATCH, 1, WRITE)]),
        RingError::TooManyBytes { head: 0 }
    );
    assert_eq!(
        refused(&[(SCRATCH, 1, NEXT | WRITE), (SCRATCH, 1, 0)]),
        RingError::ReadableAfterWritable { head: 0 }
    );
    assert_eq!(
        verdict(&with(&[(SCRATCH, 1, 0)]), Direction::Writable),
        Err(RingError::NothingWritable { head: 0 })
    );
}

#[test]
fn good_chains_before_a_broken_one_are_kept() {
    let driver = with(&[(SCRATCH, 64, 0), (MEMORY_END, 1, 0)]);
    let mut ring = driver.packed();
    assert_eq!(ring.gather(Direction::Readable, 8), Ok(More::Chains(1)));
    ring.complete(0, [0]);
    ring.publish();
    assert!(matches!(
        ring.gather(Direction::Readable, 8),
        Err(RingError::BufferOutsideMemory { head: 1, .. })
    ));
}

#[test]
fn long_tables_of_nothing_are_not_walked_without_end() {
    let mut driver = Driver::of(Kind::Packed, 64, 0);
    driver.spec.indirect = true;
    for at in 0..64 {
        driver.desc(at, SCRATCH, 16 * 1024, at, INDIRECT | AVAIL_FLAG);
    }
    let mut ring = driver.packed();
    assert_eq!(ring.gather(Direction::Readable, 64), Ok(More::Chains(4)));
    assert_eq!(ring.gather_more(Direction::Readable, 64), Ok(More::Full));
    ring.return_from(1);
    assert_eq!(ring.gather_more(Direction::Readable, 64), Ok(More::Chains(4)));
}

#[test]
fn arming_names_the_next_descriptor_or_asks_for_all() {
    let mut driver = driver(7);
    let mut ring = driver.packed();
    assert_eq!(driver.device_event().1, 1, "kicks are not wanted before arm");
    assert!(!ring.arm());
    assert_eq!(driver.device_event(), (driver.position(7), 2));
    driver.send(&[b"x"], None);
    assert!(ring.has_available() && ring.arm());
    assert_eq!(use_all(&mut ring), 1);
    assert!(!ring.has_available() && !ring.arm());
    assert_eq!(driver.device_event(), (driver.position(8), 2));
    assert_eq!(driver.device_event().0, 0, "the wrap counter has changed");
    ring.disarm();
    assert_eq!(driver.device_event().1, 1);

    driver.spec.event_idx = false;
    driver.spec.base = ring.base();
    let mut ring = driver.packed();
    ring.arm();
    assert_eq!(driver.device_event().1, 0);
    ring.disarm();
    assert_eq!(driver.device_event().1, 1);
}

#[test]
fn the_drivers_wish_decides_once_a_burst() {
    const ALWAYS: u16 = 0;
    const NEVER: u16 = 1;
    const AT: u16 = 2;
    for base in [0u16, 5, 8, 12] {
        let mut driver = driver(base);
        let mut ring = driver.packed();
        let mut total = u32::from(base);
        let mut burst = |driver: &mut Driver, chains: usize| {
            for _ in 0..chains {
                driver.send(&[b"x"], None);
            }
            assert_eq!(use_all(&mut ring), chains);
            assert_eq!(driver.used().len(), chains);
            ring.notify()
        };
        driver.set_driver_event(0, NEVER);
        assert!(burst(&mut driver, 1), "the first time always");
        assert!(!burst(&mut driver, 2));
        total += 3;
        driver.set_driver_event(driver.position(total + 3), AT);
        assert!(
            !burst(&mut driver, 3),
            "the descriptor at {} is the next",
            total + 3
        );
        assert!(burst(&mut driver, 1), "now it was used");
        assert!(!burst(&mut driver, 3), "passed, and asked for no further");
        total += 7;
        driver.set_driver_event(driver.position(total + 2), AT);
        assert!(burst(&mut driver, 5), "in the middle of a burst");
        driver.set_driver_event(0, ALWAYS);
        assert!(burst(&mut driver, 1));
        driver.set_driver_event(0, 3);
        assert!(burst(&mut driver, 1), "the reserved value");
        assert!(!ring.notify(), "nothing new");
        assert_eq!(driver.calls(), 5);
    }
}

#[test]
fn without_event_idx_a_place_means_always() {
    let mut driver = driver(0);
    driver.spec.event_idx = false;
    let mut ring = driver.packed();
    ring.notify();
    for (flags, expected) in [(0, true), (1, false), (2, true)] {
        driver.set_driver_event(0, flags);
        driver.send(&[b"x"], None);
        use_all(&mut ring);
        driver.used();
        assert_eq!(ring.notify(), expected, "flags {flags}");
    }
    driver.spec.base = ring.base();
    let mut ring = driver.packed();
    assert!(ring.notify(), "a ring that begins tells at once");
    driver.spec.call = None;
    assert!(!driver.packed().notify());
}
