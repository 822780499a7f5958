//! Where frames go, and why some do not.

use std::collections::{HashMap, HashSet};

use vnic_lb::mac::Mac;

use super::lab::{BROADCAST, Lab, SETTINGS, STRANGER, guest_mac, source_port, tag, udp};
use crate::counters::DropReason;
use crate::engine::Event;

#[test]
fn sessions_leave_by_their_nic_and_come_back_by_any() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 2);
        let mut nic_of = HashMap::new();
        for round in 0..3 {
            for session in 0..64 {
                lab.send(0, &udp(STRANGER, guest_mac(0), session, round));
                let (nic, frame) = lab.collect_any();
                assert_eq!(frame, udp(STRANGER, guest_mac(0), session, round));
                assert_eq!(
                    *nic_of.entry(session).or_insert(nic),
                    nic,
                    "session {session} moved"
                );
            }
        }
        assert_eq!(
            nic_of.values().collect::<HashSet<_>>().len(),
            2,
            "both NICs are used"
        );
        for nic in [0, 1] {
            let answer = udp(guest_mac(0), STRANGER, 7, 1);
            lab.inject(nic, &answer);
            assert_eq!(lab.receive(0), answer);
        }
        lab.end();
    }
}

#[test]
fn unicast_between_guests_stays_here() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 1);
        for number in 0..100 {
            let (from, to) = (number % 3, (number + 1) % 3);
            let frame = udp(guest_mac(to), guest_mac(from), 5, number.into());
            lab.send(from.into(), &frame);
            assert_eq!(lab.receive(to.into()), frame);
        }
        lab.end();
    }
}

#[test]
fn a_broadcast_reaches_all_others_and_one_nic() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 2);
        let frame = udp(BROADCAST, guest_mac(1), 1, 1);
        lab.send(1, &frame);
        assert_eq!((lab.receive(0), lab.receive(2)), (frame.clone(), frame.clone()));
        // The lowest that is alive, but for one that is drained.
        assert_eq!(lab.collect(0), frame);
        lab.balancer.drain(0).expect("the first NIC");
        let frame = udp(BROADCAST, guest_mac(1), 1, 9);
        lab.send(1, &frame);
        assert_eq!((lab.receive(0), lab.receive(2)), (frame.clone(), frame.clone()));
        assert_eq!(lab.collect(1), frame);
        lab.balancer.undrain(0).expect("the first NIC");
        lab.balancer.alive().set(0, false);
        let frame = udp(BROADCAST, guest_mac(1), 1, 2);
        lab.send(1, &frame);
        assert_eq!(lab.collect(1), frame);
        assert_eq!((lab.receive(0), lab.receive(2)), (frame.clone(), frame));

        // From a NIC: to every guest, and to no NIC.
        let frame = udp(BROADCAST, STRANGER, 1, 3);
        lab.inject(1, &frame);
        for guest in 0..3 {
            assert_eq!(lab.receive(guest), frame);
        }
        lab.end();
    }
}

#[test]
fn a_lost_nic_moves_its_own_sessions_only() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 3);
        let run = |lab: &mut Lab| -> HashMap<u16, usize> {
            let mut nic_of = HashMap::new();
            for session in 0..96 {
                lab.send(0, &udp(STRANGER, guest_mac(0), session, 0));
                let (nic, frame) = lab.collect_any();
                nic_of.insert(source_port(&frame), nic);
            }
            nic_of
        };
        let before = run(&mut lab);
        lab.balancer.alive().set(1, false);
        let during = run(&mut lab);
        for (session, nic) in &before {
            match nic {
                1 => assert_ne!(during[session], 1, "session {session} stays on a dead NIC"),
                nic => assert_eq!(during[session], *nic, "session {session} moved for nothing"),
            }
        }
        assert!(before.values().any(|nic| *nic == 1));
        // It comes back: nothing that exists moves.
        lab.balancer.alive().set(1, true);
        assert_eq!(run(&mut lab), during);
        lab.end();
    }
}

#[test]
fn frames_that_go_nowhere_are_counted_by_reason() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        let own = guest_mac(0);
        let control = Mac([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
        for (frame, reason) in [
            (udp(STRANGER, STRANGER, 1, 1), DropReason::SpoofedSource),
            (udp(STRANGER, guest_mac(1), 1, 1), DropReason::SpoofedSource),
            (udp(control, own, 1, 1), DropReason::LinkLocalControl),
            (udp(own, own, 1, 1), DropReason::ToItself),
            (vec![0; 13], DropReason::TooShort),
            (vec![0; 60_000], DropReason::TooLong),
        ] {
            let before = lab.guests[0].drops(reason);
            lab.send(0, &frame);
            lab.dropped(0, reason, before + 1);
        }
        // NEEDS_CSUM, and a GSO type: nothing of the kind was negotiated.
        for (count, header) in [(1, [1, 0]), (2, [0, 1])] {
            let header = [&header[..], &[0; 10]].concat();
            assert!(lab.guests[0].send_behind(&header, &udp(STRANGER, own, 1, 1)));
            lab.dropped(0, DropReason::BadHeader, count);
        }

        for (frame, reason) in [
            (udp(guest_mac(1), own, 1, 1), DropReason::LoopedBack),
            (udp(STRANGER, Mac([2; 6]), 1, 1), DropReason::UnknownDestination),
            (udp(control, STRANGER, 1, 1), DropReason::LinkLocalControl),
            (vec![0; 11], DropReason::TooShort),
        ] {
            lab.inject(0, &frame);
            lab.nic_dropped(0, reason, 1);
        }

        lab.balancer.alive().set(0, false);
        lab.send(0, &udp(STRANGER, own, 1, 1));
        lab.dropped(0, DropReason::NoNicAlive, 1);
        lab.send(0, &udp(BROADCAST, own, 1, 1));
        lab.dropped(0, DropReason::NoNicAlive, 2);
        lab.receive(1);
        lab.end();
    }
}

#[test]
fn without_nics_an_unknown_destination_is_nowhere() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 0);
        lab.send(0, &udp(STRANGER, guest_mac(0), 1, 1));
        lab.dropped(0, DropReason::UnknownDestination, 1);
        let frame = udp(BROADCAST, guest_mac(0), 1, 2);
        lab.send(0, &frame);
        assert_eq!(lab.receive(1), frame);
        lab.end();
    }
}

#[test]
fn a_source_that_moved_away_is_heard_while_its_port_does_not_run() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        let stopped = lab.guests[1].stop();
        lab.publish();
        let frame = udp(guest_mac(0), guest_mac(1), 1, 1);
        lab.inject(0, &frame);
        assert_eq!(lab.receive(0), frame);
        lab.inject(0, &udp(guest_mac(1), STRANGER, 1, 2));
        lab.dropped(1, DropReason::PortNotReady, 1);
        lab.guests[1].start(stopped);
        lab.publish();
        lab.inject(0, &frame);
        lab.nic_dropped(0, DropReason::LoopedBack, 1);
        lab.end();
    }
}

#[test]
fn a_first_address_is_proposed_once_and_kept_out_until_answered() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        lab.guests[0].mac = None;
        lab.publish();
        let new = Mac([0x52, 0x54, 0, 9, 9, 9]);
        for number in 0..3 {
            // It goes out already.
            lab.send(0, &udp(STRANGER, new, 1, number));
            assert_eq!(tag(&lab.collect(0)), number);
        }
        match lab.event() {
            Event::MacSeen { port: 0, mac } => assert_eq!(mac, new),
            other => panic!("{other:?}"),
        }
        assert!(lab.engine.next_event().is_none(), "proposed once");
        // Another one, a group, none at all, a NIC's own and another guest's are refused.
        let nic = lab.nics[0].mac;
        for (count, mac) in (1..).zip([Mac([2; 6]), BROADCAST, Mac([0; 6]), nic, guest_mac(1)]) {
            lab.send(0, &udp(STRANGER, mac, 1, 9));
            lab.dropped(0, DropReason::MacRefused, count);
        }
        // The answer: no. The next proposal may come.
        lab.guests[0].state.settle_mac();
        lab.send(0, &udp(STRANGER, Mac([2; 6]), 1, 10));
        assert!(matches!(lab.event(), Event::MacSeen { port: 0, mac } if mac == Mac([2; 6])));
        lab.collect(0);
        // The answer: yes.
        lab.guests[0].mac = Some(new);
        lab.publish();
        lab.send(0, &udp(STRANGER, Mac([2; 6]), 1, 11));
        lab.dropped(0, DropReason::SpoofedSource, 1);
        lab.end();
    }
}
