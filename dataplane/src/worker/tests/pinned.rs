//! NICs on independent switch ports: a guest is behind one of them, and gets one of the copies that switches flood.

use std::sync::Arc;

use vnic_lb::mac::Mac;
use vnic_lb::pinned::{GRACE_MS, Station, Stations};

use super::lab::{BROADCAST, Lab, SETTINGS, STRANGER, guest_mac, tag, udp};
use super::redrive::lose;
use crate::counters::DropReason;
use crate::engine::Event;
use crate::memory::frames::ChunkCache;
use crate::neighbour::announce::{Announcement, frame};

fn station(guest: u8, vlan: u16) -> Station {
    let mac = guest_mac(guest);
    Station { mac, vlan }
}

fn stations(lab: &Lab) -> Arc<Stations> {
    Arc::clone(lab.stations.as_ref().expect("topology pinned"))
}

/// As the control thread does for a guest that starts.
fn assign(lab: &Lab, guest: u8) -> usize {
    let nic = stations(lab).assign(station(guest, 0), lab.engine.now());
    nic.expect("a NIC that is alive").into()
}

fn in_vlan(frame: &[u8], vlan: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

#[test]
fn whatever_a_station_sends_leaves_by_its_nic() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 8, 2);
        let homes: Vec<usize> = (0..8).map(|guest| assign(&lab, guest)).collect();
        assert!(homes.contains(&0) && homes.contains(&1), "{homes:?}");
        for (guest, home) in homes.into_iter().enumerate() {
            let mac = guest_mac(guest.try_into().unwrap());
            for session in 0..30 {
                lab.send(guest, &udp(STRANGER, mac, session, session.into()));
            }
            for group in [
                BROADCAST,
                Mac([0x33, 0x33, 0, 0, 0, 1]),
                Mac([1, 0, 0x5e, 0, 0, 9]),
            ] {
                lab.send(guest, &udp(group, mac, 1, 30));
            }
            let mut tags = Vec::new();
            for _ in 0..33 {
                let (nic, frame) = lab.collect_any();
                assert_eq!(nic, home);
                tags.push(tag(&frame));
            }
            tags.sort_unstable();
            assert_eq!(tags, (0..33).map(|number| number.min(30)).collect::<Vec<_>>());
            for other in (0..8).filter(|other| *other != guest) {
                lab.receive_all(other, 3);
            }
        }
        assert_eq!(lab.balancer.stats().created, 0, "sessions decide nothing here");
        lab.end();
    }
}

#[test]
fn an_unknown_station_goes_by_its_slot_and_is_proposed_once() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 1, 4);
        for vlan in [0, 7, 8] {
            let station = station(0, vlan);
            let by_slot = stations(&lab).view().steer(station).map(usize::from);
            for number in 0..5 {
                let mut frame = udp(STRANGER, guest_mac(0), 1, number);
                if vlan != 0 {
                    frame = in_vlan(&frame, vlan);
                }
                lab.send(0, &frame);
                let (nic, sent) = lab.collect_any();
                assert_eq!((Some(nic), sent), (by_slot, frame));
            }
            match lab.event() {
                Event::StationSeen {
                    port: 0,
                    station: seen,
                } => assert_eq!(seen, station),
                other => panic!("{other:?}"),
            }
            assert!(lab.engine.next_event().is_none(), "proposed once");
            // The answer.
            stations(&lab).assign(station, lab.engine.now());
            lab.guests[0].state.settle_station();
        }
        lab.end();
    }
}

#[test]
fn of_flooded_copies_one_is_taken() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 2, 3);
        let home = assign(&lab, 0);
        let unicast = udp(guest_mac(0), STRANGER, 1, 1);
        (0..3).for_each(|nic| lab.inject(nic, &unicast));
        assert_eq!(lab.receive(0), unicast);
        for other in (0..3).filter(|nic| *nic != home) {
            lab.nic_dropped(other, DropReason::OtherNic, 1);
        }
        let dropped = |lab: &Lab| {
            (0..3)
                .map(|nic| lab.nic_drops(nic, DropReason::OtherNic))
                .sum::<u64>()
        };
        assert_eq!(dropped(&lab), 2);

        // Group frames by one NIC, which stays the same while it is alive.
        let _ = stations(&lab).settle(0);
        for (number, flips) in [(2, None), (3, Some((0, false))), (4, Some((0, true)))] {
            if let Some((nic, alive)) = flips {
                lab.balancer.alive().set(nic, alive);
                let _ = stations(&lab).settle(lab.engine.now());
            }
            let before = dropped(&lab);
            let group = udp(BROADCAST, STRANGER, 1, number);
            let designated = if number == 2 { 0 } else { 1 };
            (0..3).for_each(|nic| lab.inject(nic, &group));
            assert_eq!((lab.receive(0), lab.receive(1)), (group.clone(), group));
            lab.wait_for("the copies dropped", |lab| {
                (dropped(lab) == before + 2).then_some(())
            });
            let taken = lab.nic_drops(designated, DropReason::OtherNic);
            lab.inject(designated, &udp(BROADCAST, STRANGER, 1, number + 10));
            (0..2).for_each(|guest| drop(lab.receive(guest)));
            assert_eq!(lab.nic_drops(designated, DropReason::OtherNic), taken);
        }
        assert_eq!(lab.balancer.stats().created, 0);
        lab.end();
    }
}

#[test]
fn what_comes_back_is_no_news_from_others() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 2, 2);
        let home = assign(&lab, 0);
        // The other guest's address, as a switch between two of our ports would send it back.
        lab.inject(home, &udp(guest_mac(0), guest_mac(1), 1, 1));
        lab.nic_dropped(home, DropReason::LoopedBack, 1);
        lab.send(0, &udp(BROADCAST, guest_mac(0), 1, 2));
        let sent = lab.collect(home);
        assert_eq!(lab.receive(1), sent);
        // Flooded to our other port.
        lab.inject(1 - home, &sent);
        let reason = if home == 0 {
            DropReason::OtherNic
        } else {
            DropReason::LoopedBack
        };
        lab.nic_dropped(1 - home, reason, 1);
        lab.end();
    }
}

#[test]
fn a_lost_nics_stations_go_on_by_the_next_and_are_heard_by_both_for_a_while() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 1, 3);
        let home = assign(&lab, 0);
        for number in 0..20 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, number.into()));
        }
        lab.send(0, &udp(BROADCAST, guest_mac(0), 1, 20));
        let sent = |lab: &Lab| lab.nics[home].queues[0].tx.lock().tx().counters().frames;
        lab.wait_for("every frame on the ring", |lab| (sent(lab) == 21).then_some(()));
        lose(&lab, home.try_into().unwrap());
        // Nobody has settled it yet; what was on the ring follows.
        let heir = stations(&lab)
            .view()
            .steer(station(0, 0))
            .map(usize::from)
            .unwrap();
        assert_ne!(heir, home);
        let mut tags: Vec<u32> = (0..21).map(|_| tag(&lab.collect(heir))).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..=20).collect::<Vec<_>>());
        lab.send(0, &udp(STRANGER, guest_mac(0), 1, 21));
        assert_eq!(tag(&lab.collect(heir)), 21);

        // Twice, since a worker goes by the time at which its turn began.
        let long_ago = lab.engine.now().wrapping_sub(2 * GRACE_MS);
        let moves = stations(&lab).settle(long_ago);
        assert_eq!(moves.len(), 1);
        lab.inject(heir, &udp(guest_mac(0), STRANGER, 1, 22));
        assert_eq!(tag(&lab.receive(0)), 22);
        lab.inject(home, &udp(guest_mac(0), STRANGER, 1, 23));
        lab.nic_dropped(home, DropReason::OtherNic, 1);
        lab.end();
    }
}

#[test]
fn addresses_are_snooped_from_what_guests_say_and_are_told() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 2, 2);
        let home = assign(&lab, 0);
        let own = |address: &str| {
            let address = address.parse().unwrap();
            frame(
                station(0, 0),
                Announcement::Address {
                    address,
                    router: false,
                },
            )
        };
        let mut unicast = own("10.0.0.8");
        unicast[..6].copy_from_slice(&STRANGER.0);
        for sent in [own("10.0.0.7"), own("fd00::7"), unicast] {
            lab.send(0, &sent);
            assert_eq!(lab.collect(home), sent);
        }
        lab.turn();
        let found: Vec<String> = lab.guests[0]
            .state
            .take_snooped()
            .map(|snooped| snooped.address.to_string())
            .collect();
        assert_eq!(found, ["10.0.0.7", "fd00::7", "10.0.0.8"]);
        lab.receive_all(1, 2);
        assert_eq!(lab.guests[1].state.take_snooped().count(), 0);
        lab.end();
    }
}

#[test]
fn what_another_thread_hands_over_is_sent() {
    for settings in SETTINGS {
        let mut lab = Lab::pinned(settings, 1, 2);
        let mut chunks = ChunkCache::new(Arc::clone(&lab.memory));
        for round in 0..50u16 {
            let sent = frame(station(0, round), Announcement::Presence);
            let nic = usize::from(round % 2);
            assert!(lab.nics[nic].hand_over(&mut chunks, &sent));
            lab.engine.wake();
            assert_eq!(lab.collect(nic), sent);
        }
        drop(chunks);
        lab.end();
    }
}
