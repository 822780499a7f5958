mod crowded;

use std::collections::HashMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::key::{Selector, proto};
use crate::state::{Progress, Timer};

pub(super) fn key(number: u32) -> SessionKey {
    let [a, b, c, d] = number.to_be_bytes();
    let ports = Selector::Ports(u16::from_be_bytes([c, d]), 80);
    SessionKey::of_packet(
        [0, 0],
        proto::TCP,
        [10, a, b, 1].into(),
        [10, 255, 0, 1].into(),
        ports,
    )
    .0
}

fn meta(nic: u8, timer: Timer) -> Meta {
    Meta::new(
        nic,
        Progress {
            timer,
            spoke: 1,
            closed: 0,
        },
    )
}

/// The NIC that these tests pin a key to, so that a reader can tell whose state it got.
fn nic_of(number: u32) -> u8 {
    u8::try_from(number % 8).unwrap()
}

fn insert(table: &SessionTable, number: u32, timer: Timer, now: Millis) -> Insertion {
    let key = key(number);
    let hash = table.lookup(&key).hash;
    table.insert(&key, hash, meta(nic_of(number), timer), now, &mut |_| {})
}

fn pin(table: &SessionTable, number: u32) -> Option<u8> {
    table.lookup(&key(number)).hit.map(|hit| hit.meta.nic())
}

fn batch_pins(table: &SessionTable, numbers: &[u32]) -> Vec<Option<u8>> {
    let keys: Vec<_> = numbers.iter().map(|&number| key(number)).collect();
    let mut lookups = [Lookup::NONE; BATCH];
    keys.chunks(BATCH)
        .flat_map(|keys| {
            let searches: Vec<_> = keys.iter().map(|key| table.begin(key)).collect();
            table.finish(&searches, |&search| search, &mut lookups);
            lookups[..keys.len()].to_vec()
        })
        .map(|lookup| lookup.hit.map(|hit| hit.meta.nic()))
        .collect()
}

#[test]
fn the_promised_capacity_fits_in_81_bytes_each() {
    const CAPACITY: u32 = 50_000;
    let table = SessionTable::new(CAPACITY as usize, 1, &Timeouts::default());
    let stored: Vec<bool> = (0..CAPACITY)
        // Fifty in a millisecond, as only one search in each may be in vain.
        .map(|number| {
            matches!(
                insert(&table, number, Timer::Other, number / 50),
                Insertion::New(_)
            )
        })
        .collect();
    let full = stored.iter().filter(|stored| !**stored).count();
    assert!(full < 50, "{full} of {CAPACITY} found no room");
    assert!(
        table.memory_bytes() as f64 / f64::from(CAPACITY) <= 81.0,
        "{} bytes",
        table.memory_bytes()
    );
    for (number, stored) in (0u32..).zip(&stored) {
        assert_eq!(pin(&table, number), stored.then(|| nic_of(number)));
    }
    for start in (0..CAPACITY - 64).step_by(64) {
        let numbers: Vec<_> = (start..start + 64).collect();
        let pins: Vec<_> = numbers.iter().map(|&number| pin(&table, number)).collect();
        assert_eq!(batch_pins(&table, &numbers), pins);
    }
    assert_eq!(table.iter().count(), CAPACITY as usize - full);
}

#[test]
fn beyond_its_memory_it_refuses_and_keeps_what_it_has() {
    let table = SessionTable::new(100, 1, &Timeouts::default());
    let lanes = table.lanes();
    let stored: Vec<u32> = (0..1000)
        .filter(|&number| matches!(insert(&table, number, Timer::Other, 0), Insertion::New(_)))
        .collect();
    assert!(
        stored.len() <= lanes && stored.len() > lanes * 9 / 10,
        "{} of {lanes}",
        stored.len()
    );
    assert!(
        stored
            .iter()
            .all(|&number| pin(&table, number) == Some(nic_of(number)))
    );
    assert!(matches!(
        insert(&table, stored[0], Timer::Other, 0),
        Insertion::Existing(_)
    ));
}

#[test]
fn idle_entries_go_when_their_timer_ends_and_not_before() {
    let table = SessionTable::new(1000, 1, &Timeouts::default());
    let timers = [
        Timer::TcpSyn,
        Timer::TcpEstablished,
        Timer::UdpTwoWay,
        Timer::TcpReset,
    ];
    for (number, timer) in (0u32..).zip(timers) {
        insert(&table, number, timer, 1000);
    }
    let alive_at = |now| {
        let mut gone = 0;
        table.expire_now(now, &mut |_| gone += 1);
        let alive: Vec<_> = (0..4).filter(|&number| pin(&table, number).is_some()).collect();
        (gone, alive)
    };
    assert_eq!(alive_at(11_000), (0, vec![0, 1, 2, 3]));
    assert_eq!(alive_at(11_001), (1, vec![0, 1, 2]));
    assert_eq!(alive_at(31_001), (1, vec![1, 2]));
    let udp = table.lookup(&key(2)).hit.unwrap();
    table.refresh(&udp, 121_000, 1, 60);
    assert_eq!(alive_at(121_001), (0, vec![1, 2]));
    assert_eq!(alive_at(3_601_001), (2, vec![]));
}

#[test]
fn an_entry_counts_exactly_until_another_session_begins_in_it() {
    for workers in [1, 2] {
        let table = SessionTable::new(100, workers, &Timeouts::default());
        let Insertion::New(hit) = insert(&table, 0, Timer::TcpEstablished, 5) else {
            panic!("there is room");
        };
        let (mut frames, mut bytes) = (0, 0);
        for step in 0..1000u32 {
            let (more_frames, more_bytes) = (step % 65, u64::from(step) * 4000);
            table.refresh(&hit, 10 + step, more_frames, more_bytes);
            frames += u64::from(more_frames);
            bytes += more_bytes;
        }
        let entry = table.read(&hit).unwrap();
        assert_eq!((entry.key, entry.created, entry.last_seen), (key(0), 5, 1009));
        assert_eq!((entry.frames, entry.bytes), (frames, bytes));
        table.restart(&hit, 2000);
        let entry = table.read(&hit).unwrap();
        assert_eq!((entry.created, entry.frames, entry.bytes), (2000, 0, 0));
    }
}

#[test]
fn expired_entries_make_room() {
    let table = SessionTable::new(100, 1, &Timeouts::default());
    let fill = |range: std::ops::Range<u32>, now| {
        range
            .filter(|&number| matches!(insert(&table, number, Timer::Icmp, now), Insertion::New(_)))
            .count()
    };
    let first = fill(0..1000, 0);
    assert_eq!(fill(2000..2010, 30_000), 0, "nothing has expired yet");
    assert!(fill(3000..4000, 30_001) >= first * 9 / 10);
}

#[test]
fn timeouts_are_settings() {
    let timeouts = Timeouts {
        icmp_ms: 5,
        other_ms: Millis::MAX,
        ..Timeouts::default()
    };
    let table = SessionTable::new(100, 1, &timeouts);
    insert(&table, 0, Timer::Icmp, 0);
    insert(&table, 1, Timer::Other, 0);
    table.expire_now(5, &mut |_| panic!("too early"));
    let mut gone = 0;
    table.expire_now(6, &mut |_| gone += 1);
    table.expire_now(Millis::MAX / 2 - 1, &mut |_| gone += 1);
    assert_eq!(gone, 1);
}

#[test]
fn what_expires_at_once_goes_in_bounded_calls() {
    const ENTRIES: usize = 20_000;
    let table = SessionTable::new(ENTRIES + 2000, 1, &Timeouts::default());
    let made = (0..20_000).filter(|&number| {
        matches!(
            insert(&table, number, Timer::Icmp, number / 50),
            Insertion::New(_)
        )
    });
    let made = made.count();
    let (mut gone, mut calls) = (0, 0);
    loop {
        let before = gone;
        let more = table.expire(60_000, &mut |_| gone += 1);
        assert!(gone - before <= expire::REMOVALS_BOUND);
        calls += 1;
        assert!(calls < ENTRIES, "each call gets on");
        if !more {
            break;
        }
    }
    assert!(made > ENTRIES - 100 && gone == made, "{gone} of {made}");
    assert!(
        table
            .buckets
            .iter()
            .all(|bucket| bucket.elsewhere() == 0 && (1..128).all(|one| !bucket.find(one << 9).1))
    );
}

#[test]
fn a_sweep_takes_a_round_and_repeats_nothing_within_a_millisecond() {
    let table = SessionTable::new(50_000, 1, &Timeouts::default());
    table.expire_now(0, &mut |_| {});
    for number in 0..10_000 {
        insert(&table, number, Timer::Icmp, 0);
    }
    let mut gone = 0;
    // As often as a worker that sleeps looks in.
    for now in (10..30_000).step_by(10) {
        while table.expire(now, &mut |_| panic!("before its time")) {}
    }
    for now in 30_000..=30_001 + ROUND_MS {
        while table.expire(now, &mut |_| gone += 1) {}
        assert!(!table.expire(now, &mut |_| panic!("it said that nothing was left")));
    }
    assert_eq!(gone, 10_000);
}

#[test]
fn a_full_table_is_searched_in_vain_once_a_millisecond() {
    let table = SessionTable::new(1000, 1, &Timeouts::default());
    let is_full = |now, number| matches!(insert(&table, number, Timer::Other, now), Insertion::Full);
    let filled = (0..1000).filter(|&number| !is_full(number, number)).count();
    assert!(filled > 990, "{filled}");
    // A search in vain in millisecond 5000 ends all others of it; those of the next find room again.
    table.crowded.store(insert::crowded_mark(5000), Ordering::Relaxed);
    let refused: Vec<u32> = (2000..2060).filter(|&number| is_full(5000, number)).collect();
    let later = (5001..)
        .zip(&refused)
        .filter(|&(now, &number)| !is_full(now, number));
    assert!(later.count() > 0, "there was room for some of {}", refused.len());
    assert!((3000..9000).any(|number| is_full(6000, number)));
    assert_eq!(table.crowded.load(Ordering::Relaxed), insert::crowded_mark(6000));
}

#[test]
fn overflow_is_counted_exactly() {
    let table = SessionTable::new(5000, 1, &Timeouts::default());
    for number in 0..5400 {
        insert(&table, number, Timer::Icmp, 0);
    }
    let elsewhere: u64 = table.buckets.iter().map(Bucket::elsewhere).sum();
    let expected = table.iter().filter(|entry| {
        let lookup = table.lookup(&entry.key);
        lookup
            .hit
            .is_some_and(|hit| hit.bucket as usize != table.place(lookup.hash).first)
    });
    assert_eq!(elsewhere, expected.count() as u64);
}

#[test]
fn racing_inserts_make_one_entry() {
    const KEYS: u32 = 20_000;
    const THREADS: usize = 3;
    let table = SessionTable::new(KEYS as usize + 2000, 1, &Timeouts::default());
    let (made, barrier) = (AtomicU64::new(0), Barrier::new(THREADS));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                barrier.wait();
                for number in 0..KEYS {
                    // Full means here that another thread was preempted while it held the bucket.
                    loop {
                        match insert(&table, number, Timer::TcpEstablished, 0) {
                            Insertion::New(_) => drop(made.fetch_add(1, Ordering::Relaxed)),
                            Insertion::Existing(hit) => assert_eq!(hit.meta.nic(), nic_of(number)),
                            Insertion::Full => {
                                std::thread::yield_now();
                                continue;
                            }
                        }
                        break;
                    }
                }
            });
        }
    });
    assert_eq!(made.into_inner(), u64::from(KEYS));
    let mut seen = HashMap::new();
    table
        .iter()
        .for_each(|entry| *seen.entry(entry.key).or_insert(0) += 1);
    assert_eq!(seen.len(), KEYS as usize);
    assert!(seen.values().all(|&times| times == 1));
}

/// One thread makes entries and another lets them expire in a table so tight that entries move all the time, while a
/// third looks: it must never see a NIC that belongs to another key, and never lose an entry that does not expire.
#[test]
fn readers_see_whole_entries_while_others_write() {
    const LASTING: u32 = 400;
    let table = SessionTable::new(1000, 1, &Timeouts::default());
    for number in 0..LASTING {
        assert!(matches!(
            insert(&table, number, Timer::TcpEstablished, 0),
            Insertion::New(_)
        ));
    }
    let done = AtomicBool::new(false);
    let clock = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1000..60_000u32 {
                let now = clock.load(Ordering::Relaxed);
                insert(&table, number, Timer::TcpReset, u32::try_from(now).unwrap());
                if number % 16 == 0 {
                    clock.store(now + 400, Ordering::Relaxed);
                }
            }
            done.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let now = u32::try_from(clock.load(Ordering::Relaxed)).unwrap();
                (0..LASTING).for_each(|number| {
                    if let Some(hit) = table.lookup(&key(number)).hit {
                        table.refresh(&hit, now, 1, 64);
                    }
                });
                table.expire(now, &mut |_| {});
            }
        });
        let mut round = 0u32;
        while !done.load(Ordering::Acquire) {
            round = round.wrapping_add(1);
            for number in 0..LASTING {
                // A miss may be false while the entry moves: an insertion is sure, as in the balancer.
                let found =
                    pin(&table, number).or_else(|| match insert(&table, number, Timer::TcpEstablished, 0) {
                        Insertion::Existing(hit) => Some(hit.meta.nic()),
                        Insertion::New(_) => None,
                        Insertion::Full => Some(nic_of(number)),
                    });
                assert_eq!(found, Some(nic_of(number)), "entry {number}");
            }
            let passing: Vec<_> = (0..64).map(|step| 1000 + (round * 64 + step) % 59_000).collect();
            for (number, found) in passing.iter().zip(batch_pins(&table, &passing)) {
                assert!(found.is_none_or(|nic| nic == nic_of(*number)));
            }
            for entry in table.iter() {
                let (_, port) = if entry.key.a().1 == 80 {
                    entry.key.b()
                } else {
                    entry.key.a()
                };
                assert_eq!(
                    entry.meta.nic(),
                    nic_of(u32::from(port)),
                    "torn entry {}",
                    entry.key
                );
            }
        }
    });
    assert!((0..LASTING).all(|number| pin(&table, number) == Some(nic_of(number))));
}

proptest::proptest! {
    /// Against a map: with room for all, the table answers as the map does.
    #[test]
    fn it_answers_like_a_map(steps in proptest::collection::vec((0u32..300, 0u8..8, proptest::bool::ANY), 0..600)) {
        let table = SessionTable::new(2000, 1, &Timeouts::default());
        let mut model = HashMap::new();
        for (number, nic, change) in steps {
            let key = key(number);
            let lookup = table.lookup(&key);
            proptest::prop_assert_eq!(lookup.hit.map(|hit| hit.meta.nic()), model.get(&number).copied());
            match lookup.hit {
                Some(hit) if change => {
                    table.replace(&hit, hit.meta.with_nic(nic)).unwrap();
                    model.insert(number, nic);
                }
                Some(_) => {}
                None => {
                    let insertion = table.insert(&key, lookup.hash, meta(nic, Timer::Other), 0, &mut |_| {});
                    proptest::prop_assert!(matches!(insertion, Insertion::New(_)));
                    model.insert(number, nic);
                }
            }
        }
    }
}
