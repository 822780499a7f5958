//! Sessions that are all of one bucket, as an attacker would have them who knew the hash's seed.

use super::*;

/// What a bucket can count of entries that are elsewhere.
const ELSEWHERE_MOST: usize = 63;

/// Keys whose first bucket is `bucket`.
fn keys_of(table: &SessionTable, bucket: usize, count: usize) -> Vec<u32> {
    (0..)
        .filter(|&number| table.place(table.hash(&key(number))).first == bucket)
        .take(count)
        .collect()
}

/// Inserts keys, each in a millisecond of its own as only one search in each may be in vain; returns those that are new, and those that
/// found no room.
fn insert_all(table: &SessionTable, numbers: &[u32], timer: Timer, from: Millis) -> (Vec<u32>, Vec<u32>) {
    let mut times = from..;
    numbers.iter().partition(|&&number| {
        match insert(table, number, timer, times.next().expect("time goes on")) {
            Insertion::New(_) => true,
            Insertion::Full => false,
            Insertion::Existing(_) => panic!("{number} was not there"),
        }
    })
}

#[test]
fn one_bucket_gets_as_many_as_it_can_count_and_harms_no_other() {
    let table = SessionTable::new(10_000, 1, &Timeouts::default());
    let crowd = keys_of(&table, 7, 200);
    let (stored, refused) = insert_all(&table, &crowd, Timer::Icmp, 0);
    assert_eq!(stored.len(), LANES + ELSEWHERE_MOST);
    assert_eq!(table.buckets[7].elsewhere(), ELSEWHERE_MOST as u64);
    for pins in [
        batch_pins(&table, &stored),
        stored.iter().map(|&number| pin(&table, number)).collect(),
    ] {
        assert!(
            pins.iter()
                .zip(&stored)
                .all(|(&pin, &number)| pin == Some(nic_of(number)))
        );
    }
    // A lookup in vain reads two buckets, however many are in the first one's chain.
    assert!(batch_pins(&table, &refused).iter().all(Option::is_none));

    // All others have their places.
    let others = (1 << 24)..(1 << 24) + 5000;
    let others: Vec<u32> = others
        .filter(|&number| table.place(table.hash(&key(number))).first != 7)
        .collect();
    for (now, &number) in (1000..).zip(&others) {
        assert!(matches!(
            insert(&table, number, Timer::Other, now),
            Insertion::New(_)
        ));
    }
    assert!(
        stored
            .iter()
            .chain(&others)
            .all(|&number| pin(&table, number) == Some(nic_of(number)))
    );

    // When the crowd is forgotten, the bucket is as new.
    let mut gone = 0;
    table.expire_now(30_300, &mut |_| gone += 1);
    assert_eq!(gone, stored.len());
    assert_eq!(table.buckets[7].elsewhere(), 0);
    let (again, _) = insert_all(&table, &crowd, Timer::Icmp, 40_000);
    assert_eq!(again.len(), LANES + ELSEWHERE_MOST);
}

#[test]
fn keys_with_the_same_two_buckets_fill_these_and_no_more() {
    let table = SessionTable::new(100, 1, &Timeouts::default());
    let pair = |number| {
        let place = table.place(table.hash(&key(number)));
        let mut pair = [place.first, place.second];
        pair.sort_unstable();
        pair
    };
    let crowd: Vec<u32> = (0..).filter(|&number| pair(number) == pair(0)).take(50).collect();
    let (stored, refused) = insert_all(&table, &crowd, Timer::Other, 0);
    assert_eq!(stored, crowd[..2 * LANES]);
    assert!(
        stored
            .iter()
            .all(|&number| pin(&table, number) == Some(nic_of(number)))
    );
    assert!(refused.iter().all(|&number| pin(&table, number).is_none()));
    assert_eq!(table.iter().count(), 2 * LANES);
}
