use super::*;
use crate::balancer::{BalancerConfig, Reason};
use crate::nics::NicInfo;
use crate::policy::Algorithm;

fn stations(nics: u8, algorithm: Algorithm) -> Stations {
    let info = |nic| NicInfo {
        id: format!("nic{nic}"),
        weight: None,
    };
    let balancer = Balancer::new(&BalancerConfig {
        nics: (0..nics).map(info).collect(),
        algorithm,
        session_capacity: 16,
        workers: 1,
        hash_key: [7; 16],
        timeouts: Default::default(),
        limits: Default::default(),
    });
    (0..nics).for_each(|nic| {
        balancer.set_alive(nic, true, 0);
    });
    Stations::new(balancer)
}

fn station(number: u8, vlan: u16) -> Station {
    Station {
        mac: Mac([0x52, 0x54, 0, 0, 0, number]),
        vlan,
    }
}

fn counts(stations: &Stations) -> [usize; MAX_NICS] {
    let mut counts = [0; MAX_NICS];
    stations
        .list()
        .iter()
        .for_each(|pin| counts[usize::from(pin.nic)] += 1);
    counts
}

#[test]
fn stations_are_dealt_by_the_algorithm_and_keep_their_nic() {
    let even = stations(4, Algorithm::LeastConn);
    for number in 0..100 {
        let nic = even.assign(station(number, 0), 0);
        assert_eq!(even.view().steer(station(number, 0)), nic);
        assert_eq!(even.assign(station(number, 0), 1), nic, "again");
    }
    assert_eq!(counts(&even)[..4], [25; 4]);
    let hashed = stations(4, Algorithm::Hash);
    for number in 0..100 {
        let before = hashed.view().steer(station(number, 7));
        assert_eq!(
            hashed.assign(station(number, 7), 0),
            before,
            "by its slot before and after"
        );
    }
    assert!(counts(&hashed)[..4].iter().all(|&count| count > 10));
}

#[test]
fn a_mac_in_another_vlan_is_another_station() {
    let stations = stations(2, Algorithm::LeastConn);
    let nics = [1, 2].map(|vlan| stations.assign(station(9, vlan), 0).unwrap());
    assert_ne!(nics[0], nics[1]);
    assert_eq!(stations.forget(&[station(9, 3), station(9, 1)]), 1);
    assert_eq!(stations.forget(&[station(9, 1)]), 0);
    let left: Vec<Station> = stations.list().iter().map(|pin| pin.station).collect();
    assert_eq!(left, [station(9, 2)]);
}

#[test]
fn only_stations_of_a_dead_nic_move_and_they_stay_where_they_went() {
    let stations = stations(4, Algorithm::Hash);
    (0..200).for_each(|number| {
        stations.assign(station(number, 0), 0);
    });
    let before = stations.list();
    let lost = counts(&stations)[2];
    stations.balancer.set_alive(2, false, 10);
    let during: Vec<_> = before
        .iter()
        .map(|pin| stations.view().steer(pin.station))
        .collect();
    let moves = stations.settle(20);
    assert_eq!(moves.len(), lost);
    for (pin, worker) in before.iter().zip(&during) {
        let nic = stations.view().steer(pin.station);
        assert_eq!(nic, *worker, "workers did not wait for it");
        let told = moves.iter().find(|one| one.station == pin.station);
        assert_eq!(told.is_some(), pin.nic == 2);
        assert!(told.is_none_or(|told| told.from == 2 && Some(told.to) == nic));
    }
    assert_eq!(stations.settle(21), [], "they are where they should be");
    stations.balancer.set_alive(2, true, 30);
    assert_eq!(stations.settle(30), []);
    assert_eq!(counts(&stations)[2], 0);
}

#[test]
fn with_no_nic_alive_pins_stay() {
    let stations = stations(2, Algorithm::Hash);
    let nic = stations.assign(station(1, 0), 0).unwrap();
    (0..2).for_each(|nic| {
        stations.balancer.set_alive(nic, false, 1);
    });
    assert_eq!(
        (stations.settle(2), stations.view().steer(station(1, 0))),
        (vec![], None)
    );
    assert_eq!(stations.assign(station(2, 0), 2), None);
    assert_eq!(stations.view().designated(), None);
    stations.balancer.set_alive(nic, true, 3);
    assert_eq!(stations.settle(3), []);
    assert_eq!(stations.view().steer(station(1, 0)), Some(nic));
}

#[test]
fn a_drained_nic_is_evacuated() {
    let stations = stations(2, Algorithm::Hash);
    (0..50).for_each(|number| {
        stations.assign(station(number, 0), 0);
    });
    stations.balancer.drain(0).unwrap();
    let moves = stations.evacuate(0, 5);
    assert!(moves.len() > 10 && moves.iter().all(|one| (one.from, one.to) == (0, 1)));
    assert_eq!(counts(&stations)[..2], [0, 50]);
    assert_eq!(stations.assign(station(77, 0), 6), Some(1));
    stations.balancer.set_alive(1, false, 7);
    assert_eq!(stations.settle(8).len(), 51, "a drained NIC is better than none");
}

#[test]
fn unicast_is_taken_from_its_nic_only_and_from_the_old_one_for_a_while() {
    let stations = stations(3, Algorithm::LeastConn);
    let one = station(1, 5);
    let home = stations.assign(one, 0).unwrap();
    let taken_from = |now| {
        let view = stations.view();
        (0u8..3)
            .filter(|&nic| view.accept(nic, one, now) == Accept::Yes)
            .collect::<Vec<_>>()
    };
    assert_eq!(taken_from(0), [home]);
    stations.balancer.set_alive(home, false, 100);
    let heir = stations.view().steer(one).unwrap();
    let mut both = vec![home, heir];
    both.sort_unstable();
    assert_eq!(
        taken_from(101),
        both,
        "what is still in its ring, and what comes by the other"
    );
    assert_eq!(stations.settle(110).len(), 1);
    assert_eq!(taken_from(110 + GRACE_MS - 1), both);
    assert_eq!(taken_from(110 + GRACE_MS), [heir]);
}

#[test]
fn broadcast_is_taken_from_one_nic() {
    let stations = stations(3, Algorithm::Hash);
    let everyone = Station {
        mac: Mac::BROADCAST,
        vlan: 5,
    };
    let taken_from = || {
        let view = stations.view();
        (0u8..3)
            .filter(|&nic| view.accept(nic, everyone, 0) == Accept::Yes)
            .collect::<Vec<_>>()
    };
    assert_eq!(taken_from(), [0]);
    stations.balancer.set_alive(0, false, 1);
    assert_eq!(taken_from(), [1]);
    let _ = stations.settle(1);
    stations.balancer.set_alive(0, true, 2);
    assert_eq!(
        taken_from(),
        [1],
        "the one that came back waits for its next turn"
    );
    let _ = stations.settle(2);
    assert_eq!(taken_from(), [1]);
    stations.balancer.set_alive(1, false, 3);
    assert_eq!(taken_from(), [0], "without waiting for anybody to settle it");
}

#[test]
fn there_is_an_end_to_stations() {
    let stations = stations(2, Algorithm::Hash);
    let of = |number: u64| Station {
        mac: Mac::from_u64(0x5254_0000_0000 + number),
        vlan: 0,
    };
    let pins = (0..MAX_STATIONS as u64).map(|number| Pin {
        station: of(number),
        nic: 0,
        since: 0,
        from: None,
        is_fresh: false,
    });
    stations.pins.store(Arc::new(pins.collect()));
    let beyond = of(MAX_STATIONS as u64);
    assert_eq!(stations.assign(beyond, 0), None);
    assert!(stations.view().steer(beyond).is_some(), "by its slot");
}

#[test]
fn what_was_sent_by_the_slot_is_answered_there_for_a_while() {
    let stations = stations(2, Algorithm::LeastConn);
    let slot_of = |number| stations.view().steer(station(number, 0));
    // Two stations of one slot's NIC: the second goes to the other NIC.
    let mut same = (0..).filter(|&number| slot_of(number) == Some(0));
    let [first, second] = [same.next().unwrap(), same.next().unwrap()];
    assert_eq!(stations.assign(station(first, 0), 50), Some(0));
    assert_eq!(stations.assign(station(second, 0), 50), Some(1));
    let accept = |now| stations.view().accept(0, station(second, 0), now);
    assert_eq!(accept(50 + GRACE_MS - 1), Accept::Yes);
    assert_eq!(accept(50 + GRACE_MS), Accept::OtherNic);
    assert_eq!(stations.per_nic()[..2], [1, 1]);
    // Nor when the clock has come half round, and the move seems to have happened just now.
    (50..2_000).step_by(100).for_each(|now| stations.tick(now));
    assert_eq!(accept(50 + (1 << 31) + 1), Accept::OtherNic);
    assert_eq!(
        stations.list()[usize::from(second > first)].from,
        Some(0),
        "for people"
    );
}

#[test]
fn explains_where_a_station_goes_and_why() {
    let stations = stations(3, Algorithm::LeastConn);
    let one = station(1, 7);
    let before = stations.explain(one, 5);
    assert_eq!((before.pinned, before.reason), (None, Reason::StationSlot));
    assert_eq!(before.choice, stations.view().steer(one));
    let home = stations.assign(one, 10);
    let after = stations.explain(one, 25);
    assert_eq!((after.pinned, after.pinned_ms), (home, Some(15)));
    assert_eq!((after.choice, after.reason), (home, Reason::StationPinned));
    let counted: u64 = after.nics.iter().map(|nic| nic.sessions).sum();
    assert_eq!(counted, 1, "stations are what is counted");
    let home = home.unwrap();
    stations.balancer.set_alive(home, false, 30);
    let lost = stations.explain(one, 31);
    assert_eq!((lost.pinned, lost.reason), (Some(home), Reason::StationFallback));
    assert_eq!(lost.choice, stations.view().steer(one));
    (0..3).for_each(|nic| {
        stations.balancer.set_alive(nic, false, 32);
    });
    let none = stations.explain(one, 33);
    assert_eq!((none.choice, none.reason), (None, Reason::NoneAlive));
}

#[test]
fn adaptive_counts_stations_that_came_since_it_measured() {
    let stations = stations(2, Algorithm::Adaptive);
    for nic in 0..2 {
        stations.balancer.set_link_speed(nic, Some(1_000)).unwrap();
    }
    (0..8).for_each(|number| {
        stations.assign(station(number, 0), 0);
    });
    let mut bytes = 0;
    for at in (0..=5_000).step_by(100) {
        // NIC 0 at 800 Mb/s, NIC 1 at 80.
        bytes += 1;
        stations.balancer.record_sent(0, 0, 1_000, 10_000_000);
        stations.balancer.record_sent(0, 1, 100, 1_000_000);
        stations.tick(at);
    }
    assert!(bytes > 0);
    let figures = stations.explain(station(0, 0), 5_000).nics;
    assert!(figures[0].figures.utilisation > 0.5, "{figures:?}");
    for number in 100..104 {
        assert_eq!(stations.assign(station(number, 0), 5_000), Some(1));
    }
}
