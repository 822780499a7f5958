//! What a driver may and may not do to a split ring, and either kind under a driver that works at the same time.

use std::collections::VecDeque;
use std::sync::Arc;

use super::testing::{Driver, EDGE, INDIRECT, Kind, MEMORY_END, NEXT, SCRATCH, WRITE};
use super::*;

/// What gathering the chain at descriptor 0 gives.
fn verdict(driver: &mut Driver, direction: Direction) -> Result<More, RingError> {
    driver.offer_head(0);
    let mut ring = driver.split();
    let verdict = ring.gather(direction, 8);
    if verdict.is_err() {
        assert_eq!(ring.base(), driver.spec.base, "a broken chain is not taken");
        assert_eq!(ring.gather(direction, 8), verdict, "and the error stays");
    }
    verdict
}

fn readable(driver: &mut Driver) -> Result<More, RingError> {
    verdict(driver, Direction::Readable)
}

fn assert_send<T: Send>() {}

#[test]
fn a_ring_can_move_between_threads() {
    assert_send::<SplitRing>();
}

#[test]
fn sizes_and_addresses_are_checked() {
    let driver = Driver::new(8, 0);
    for size in [0, 3, 12, 32769, u16::MAX] {
        let spec = RingSpec {
            size,
            ..driver.spec.clone()
        };
        assert_eq!(SplitRing::new(&spec).err(), Some(RingError::BadSize { size }));
    }
    let user = driver.spec.desc_addr;
    let refused = |spec: RingSpec| match SplitRing::new(&spec).err() {
        Some(RingError::BadAddress { part, .. }) => part,
        other => panic!("{other:?}"),
    };
    // Past the end by two bytes, across an edge, unaligned, at the end of the address space.
    for desc_addr in [
        user + MEMORY_END - 126,
        user + EDGE - 64,
        user + 8,
        u64::MAX - 15,
        0,
    ] {
        assert_eq!(
            refused(RingSpec {
                desc_addr,
                ..driver.spec.clone()
            }),
            "descriptor table"
        );
    }
    for avail_addr in [user + MEMORY_END - 20, user + 1] {
        assert_eq!(
            refused(RingSpec {
                avail_addr,
                ..driver.spec.clone()
            }),
            "available ring"
        );
    }
    for used_addr in [user + MEMORY_END - 68, user + 2] {
        assert_eq!(
            refused(RingSpec {
                used_addr,
                ..driver.spec.clone()
            }),
            "used ring"
        );
    }
    // The event words need not be there when they are not used.
    let spec = RingSpec {
        event_idx: false,
        avail_addr: user + MEMORY_END - 20,
        ..driver.spec.clone()
    };
    assert!(SplitRing::new(&spec).is_ok());
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_ring() {
    for base in [0, 65533] {
        let mut driver = Driver::new(8, base);
        for i in 0..8 {
            driver.desc(i, SCRATCH, 64, 0, 0);
            driver.offer_head(i);
        }
        let mut ring = driver.split();
        assert_eq!(
            ring.gather(Direction::Readable, 64),
            Ok(More::Chains(8)),
            "a full ring is fine"
        );
        ring.return_from(0);
        driver.set_avail(base.wrapping_add(9));
        let expected = RingError::AvailTooFarAhead {
            avail: base.wrapping_add(9),
            next: base,
            ahead: 9,
            size: 8,
        };
        assert_eq!(ring.gather(Direction::Readable, 64), Err(expected));
        // Backwards is far ahead, too.
        driver.set_avail(base.wrapping_sub(1));
        assert!(matches!(
            ring.gather(Direction::Readable, 64),
            Err(RingError::AvailTooFarAhead { ahead: 65535, .. })
        ));
        assert!(ring.has_available(), "so that a worker comes and finds the error");
    }
}

#[test]
fn heads_and_nexts_out_of_range() {
    let mut driver = Driver::new(8, 0);
    driver.offer_head(8);
    assert_eq!(
        driver.split().gather(Direction::Readable, 1),
        Err(RingError::HeadOutOfRange {
            entry: 0,
            head: 8,
            size: 8
        })
    );
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 64, NEXT, 8);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::NextOutOfRange {
            head: 0,
            next: 8,
            entries: 8
        })
    );
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 48, INDIRECT, 0);
    driver.put_desc(SCRATCH, 0, SCRATCH, 64, NEXT, 3);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::NextOutOfRange {
            head: 0,
            next: 3,
            entries: 3
        })
    );
}

#[test]
fn loops_end() {
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 64, NEXT, 1);
    driver.desc(1, SCRATCH, 0, NEXT, 0);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::ChainTooLong { head: 0, limit: 8 })
    );
    // In an indirect table, itself reached through a direct descriptor.
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 1, NEXT, 1);
    driver.desc(1, SCRATCH, 32, INDIRECT, 0);
    driver.put_desc(SCRATCH, 0, SCRATCH, 1, NEXT, 1);
    driver.put_desc(SCRATCH, 1, SCRATCH, 1, NEXT, 0);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::ChainTooLong { head: 0, limit: 4 })
    );
    // A huge table is followed no further than the limit.
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 16 * 60000, INDIRECT, 0);
    for i in 0..2000 {
        driver.put_desc(SCRATCH, i, SCRATCH, 0, NEXT, i + 1);
    }
    assert_eq!(
        readable(&mut driver),
        Err(RingError::ChainTooLong { head: 0, limit: 1025 })
    );
}

#[test]
fn a_table_may_be_longer_than_the_ring_up_to_a_limit() {
    for (entries, expected) in [
        (1024, Ok(More::Chains(1))),
        (1025, Err(RingError::ChainTooLong { head: 0, limit: 1025 })),
    ] {
        let mut driver = Driver::new(8, 0);
        driver.desc(0, SCRATCH, 16 * u32::from(entries), INDIRECT, 0);
        for i in 0..entries {
            driver.put_desc(
                SCRATCH,
                i,
                SCRATCH,
                1,
                if i + 1 < entries { NEXT } else { 0 },
                i + 1,
            );
        }
        assert_eq!(readable(&mut driver), expected);
    }
}

#[test]
fn a_chain_as_long_as_the_ring_is_fine_and_its_last_flag_counts() {
    let mut driver = Driver::new(8, 0);
    for i in 0..8 {
        driver.desc(i, SCRATCH, 1, if i < 7 { NEXT } else { 0 }, 1 + i);
    }
    assert_eq!(readable(&mut driver), Ok(More::Chains(1)));
}

#[test]
fn buffers_outside_memory() {
    for (addr, len) in [
        (MEMORY_END, 1),
        (MEMORY_END - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (EDGE, u32::MAX),
    ] {
        let mut driver = Driver::new(8, 0);
        driver.desc(0, addr, len, 0, 0);
        assert_eq!(
            readable(&mut driver),
            Err(RingError::BufferOutsideMemory { head: 0, addr, len })
        );
    }
    let mut driver = Driver::new(8, 0);
    driver.desc(0, MEMORY_END - 1, 1, 0, 0);
    assert_eq!(
        readable(&mut driver),
        Ok(More::Chains(1)),
        "the last byte is fine"
    );
}

#[test]
fn four_gigabytes_in_pieces_are_refused() {
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, u32::MAX, NEXT | WRITE, 1);
    driver.desc(1, SCRATCH, 1, WRITE, 0);
    // Buffers of the other direction are not resolved, so only the sum is wrong.
    assert_eq!(readable(&mut driver), Err(RingError::TooManyBytes { head: 0 }));
}

#[test]
fn order_of_readable_and_writable() {
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 1, NEXT | WRITE, 1);
    driver.desc(1, SCRATCH, 1, 0, 0);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::ReadableAfterWritable { head: 0 })
    );
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 1, 0, 0);
    assert_eq!(
        verdict(&mut driver, Direction::Writable),
        Err(RingError::NothingWritable { head: 0 })
    );
}

#[test]
fn indirect_tables_of_every_wrong_kind() {
    let indirect = |len: u32, flags: u16| {
        let mut driver = Driver::new(8, 0);
        driver.desc(0, SCRATCH, len, INDIRECT | flags, 1);
        driver.desc(1, SCRATCH, 1, 0, 0);
        driver.put_desc(SCRATCH, 0, SCRATCH, 1, INDIRECT, 0);
        readable(&mut driver)
    };
    for len in [0, 1, 15, 17, u32::MAX] {
        assert_eq!(indirect(len, 0), Err(RingError::IndirectLength { head: 0, len }));
    }
    assert_eq!(indirect(16, NEXT), Err(RingError::IndirectWithNext { head: 0 }));
    assert_eq!(indirect(16, 0), Err(RingError::IndirectNested { head: 0 }));

    let mut driver = Driver::new(8, 0);
    driver.spec.indirect = false;
    driver.desc(0, SCRATCH, 16, INDIRECT, 0);
    assert_eq!(
        readable(&mut driver),
        Err(RingError::IndirectNotNegotiated { head: 0 })
    );

    for table in [MEMORY_END, MEMORY_END - 15, u64::MAX - 8] {
        let mut driver = Driver::new(8, 0);
        driver.desc(0, table, 16, INDIRECT, 0);
        assert!(matches!(
            readable(&mut driver),
            Err(RingError::IndirectOutsideMemory { head: 0, .. })
        ));
    }
    // A table need not be used in order or in full.
    let mut driver = Driver::new(8, 0);
    driver.desc(0, EDGE, 64, INDIRECT, 0);
    driver.put_desc(EDGE, 0, SCRATCH, 0, NEXT, 3);
    driver.put_desc(EDGE, 3, SCRATCH, 1, 0, 0);
    assert_eq!(readable(&mut driver), Ok(More::Chains(1)));
}

#[test]
fn an_indirect_table_may_cross_regions_in_the_middle_of_a_descriptor() {
    let mut driver = Driver::new(8, 0);
    let table = EDGE - 5;
    driver.desc(0, table, 32, INDIRECT | WRITE, 0);
    driver.put_desc(table, 0, SCRATCH, 7, NEXT, 1);
    driver.put_desc(table, 1, SCRATCH, 8, 0, 0);
    driver.offer_head(0);
    let mut ring = driver.split();
    assert_eq!(ring.gather(Direction::Readable, 1), Ok(More::Chains(1)));
    assert_eq!(ring.chain(0).unwrap().len(), 15);
}

#[test]
fn good_chains_before_a_broken_one_are_kept() {
    let mut driver = Driver::new(8, 0);
    driver.desc(0, SCRATCH, 64, 0, 0);
    driver.offer_head(0);
    driver.offer_head(77);
    let mut ring = driver.split();
    assert_eq!(ring.gather(Direction::Readable, 8), Ok(More::Chains(1)));
    assert!(matches!(
        ring.gather(Direction::Readable, 8),
        Err(RingError::HeadOutOfRange { entry: 1, .. })
    ));
}

#[test]
fn long_chains_of_nothing_are_not_walked_without_end() {
    let mut driver = Driver::new(2048, 0);
    for i in 0..2048 {
        driver.desc(i, SCRATCH, 0, if i < 2047 { NEXT } else { 0 }, i + 1);
    }
    for _ in 0..64 {
        driver.offer_head(0);
    }
    let mut ring = driver.split();
    assert_eq!(ring.gather(Direction::Readable, 64), Ok(More::Chains(2)));
    assert_eq!(ring.gather_more(Direction::Readable, 64), Ok(More::Full));
    ring.return_from(1);
    assert_eq!(ring.gather_more(Direction::Readable, 64), Ok(More::Chains(2)));
}

#[test]
fn event_idx_decides_once_a_burst_around_the_wrap() {
    for base in [0, 65530, 65535] {
        let mut driver = Driver::new(8, base);
        let mut ring = driver.split();
        let mut burst = |driver: &mut Driver, chains: usize| {
            for _ in 0..chains {
                driver.desc(0, SCRATCH, 1, 0, 0);
                driver.offer_head(0);
            }
            assert_eq!(ring.gather(Direction::Readable, chains), Ok(More::Chains(chains)));
            ring.complete(0, vec![0; chains]);
            let before = driver.used_idx();
            ring.publish();
            assert_eq!(
                driver.used_idx(),
                before.wrapping_add(u16::try_from(chains).unwrap())
            );
            ring.notify()
        };
        assert!(burst(&mut driver, 1), "the first time always");
        driver.set_used_event(base.wrapping_add(4));
        assert!(
            !burst(&mut driver, 3),
            "used index {}: entry 4 is not there yet",
            base.wrapping_add(4)
        );
        assert!(burst(&mut driver, 1), "entry 4 was used");
        assert!(!burst(&mut driver, 8), "passed, and asked for no further");
        driver.set_used_event(driver.used_idx().wrapping_add(2));
        assert!(burst(&mut driver, 8), "in the middle of a burst");
        assert_eq!(driver.calls(), 3);
        assert!(!ring.notify(), "nothing new");
    }
}

#[test]
fn flags_decide_without_event_idx() {
    let mut driver = Driver::new(8, 65535);
    driver.spec.event_idx = false;
    let mut ring = driver.split();
    assert_eq!(driver.used_flags(), 1, "kicks are not wanted before arm");
    let mut burst = |driver: &mut Driver| {
        driver.send(&[b"x"], None);
        ring.gather(Direction::Readable, 1).unwrap();
        ring.complete(0, [0]);
        ring.publish();
        ring.notify()
    };
    assert!(burst(&mut driver));
    driver.set_avail_flags(1);
    assert!(!burst(&mut driver));
    driver.set_avail_flags(0);
    assert!(burst(&mut driver));
    assert!(!ring.arm());
    assert_eq!(driver.used_flags(), 0);
    driver.send(&[b"x"], None);
    assert!(ring.arm(), "work came before the sleep");
    ring.disarm();
    assert_eq!(driver.used_flags(), 1);
}

#[test]
fn arming_with_event_idx_names_the_next_entry() {
    let mut driver = Driver::new(8, 65535);
    let mut ring = driver.split();
    assert_eq!(driver.used_flags(), 0, "with EVENT_IDX the flags are 0");
    assert!(!ring.arm());
    assert_eq!(driver.avail_event(), 65535);
    driver.send(&[b"x"], None);
    assert!(ring.has_available() && ring.arm());
    ring.gather(Direction::Readable, 1).unwrap();
    assert!(!ring.has_available() && !ring.arm());
    assert_eq!(driver.avail_event(), 0);
    assert_eq!(ring.base(), 0);
    ring.disarm();
    assert_eq!(driver.used_flags(), 0);
}

#[test]
fn a_ring_without_or_with_a_broken_call_fd_works() {
    let mut driver = Driver::new(8, 0);
    driver.spec.call = None;
    assert!(!driver.split().notify());

    // SAFETY: the new descriptor is owned by the EventFd alone; it is no eventfd and cannot be written.
    let broken = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        vmm_sys_util::eventfd::EventFd::from_raw_fd(std::fs::File::open("/dev/null").unwrap().into_raw_fd())
    };
    driver.spec.call = Some(Arc::new(broken));
    assert!(!driver.split().notify());
}

/// Has a device that never stops looking take chains while the driver makes them available.
fn chains_arrive_whole(kind: Kind) {
    const CHAINS: u32 = 10_000;
    const SIZE: u16 = 64;
    // Across the wrap of the indexes, and of many an index's lower byte.
    let mut driver = Driver::of(kind, SIZE, 65_500);
    let mut ring = driver.ring();
    std::thread::scope(|scope| {
        let device = scope.spawn(move || {
            let mut taken = 0;
            while taken < CHAINS {
                taken += either!(&mut ring, ring => take_numbered(ring, taken))?;
            }
            Ok::<_, RingError>(())
        });
        let (mut sent, mut under_way) = (0u32, VecDeque::new());
        loop {
            // Asked first: what it used before its end is seen below.
            let ended = device.is_finished();
            for (id, _) in driver.used() {
                assert_eq!(Some(id), under_way.pop_front());
            }
            if ended {
                break;
            }
            if sent < CHAINS && under_way.len() < usize::from(SIZE / 3) {
                let number = sent.to_le_bytes();
                under_way.push_back(driver.send(&[&number[..1], &number[1..3], &number[3..]], None));
                sent += 1;
            } else {
                std::thread::yield_now();
            }
        }
        assert_eq!(device.join().unwrap(), Ok(()), "{driver}");
        assert_eq!(under_way, []);
    });
}

/// Uses up to 8 chains whose bytes are numbers, from `next` on; returns how many there were.
fn take_numbered(ring: &mut impl Engine, next: u32) -> Result<u32, RingError> {
    let More::Chains(count) = ring.gather(Direction::Readable, 8)? else {
        return Ok(0);
    };
    for (index, number) in (0..count).zip(next..) {
        let chain = ring.chain(index).unwrap();
        let mut bytes = [0; 4];
        assert_eq!(ring.read(&mut ring.cursor(&chain, 0), &mut bytes), 4);
        assert_eq!(u32::from_le_bytes(bytes), number);
    }
    ring.complete_unwritten();
    ring.publish();
    Ok(u32::try_from(count).unwrap())
}

#[test]
fn chains_of_a_split_ring_arrive_whole_while_the_device_looks() {
    chains_arrive_whole(Kind::Split);
}

#[test]
fn chains_of_a_packed_ring_arrive_whole_while_the_device_looks() {
    chains_arrive_whole(Kind::Packed);
}
