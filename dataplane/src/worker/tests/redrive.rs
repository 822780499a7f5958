//! NICs die with frames on their rings, and go.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::lab::{BROADCAST, Lab, SETTINGS, STRANGER, guest_mac, tag, udp};
use crate::counters::DropReason;
use crate::fabric::Nic;
use crate::probe::Injector;

/// As the health code does.
pub(super) fn lose(lab: &Lab, nic: u8) {
    lab.balancer.alive().set(nic, false);
    lab.nics[usize::from(nic)]
        .state
        .lost
        .store(true, Ordering::Release);
    lab.engine.watcher().wake_workers();
}

fn redriven(lab: &Lab, nic: usize) -> u64 {
    lab.nics[nic]
        .state
        .counters
        .sum(|counters| counters.redriven.get())
}

#[test]
fn frames_on_the_rings_of_a_lost_nic_leave_by_the_others_once() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 3);
        for number in 0..60 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, number.into()));
        }
        // Group frames leave by the lowest NIC that is alive.
        lab.send(0, &udp(BROADCAST, guest_mac(0), 1, 60));
        let sent = |lab: &Lab| -> u64 {
            let queues = lab
                .nics
                .iter()
                .map(|nic| nic.queues[0].tx.lock().tx().counters().frames);
            queues.sum()
        };
        lab.wait_for("every frame on a ring", |lab| (sent(lab) == 61).then_some(()));
        let held = lab.nics[0].queues[0].tx.lock().tx().counters().frames;
        assert!(held > 5, "{held}");
        lose(&lab, 0);
        lab.wait_for("the frames of the lost NIC", |lab| {
            (redriven(lab, 0) == held).then_some(())
        });
        let mut tags = HashSet::new();
        for _ in 0..61 {
            let (nic, frame) = lab.collect_any();
            assert_ne!(nic, 0);
            assert!(tags.insert(tag(&frame)), "{} twice", tag(&frame));
        }
        assert_eq!(lab.nic_drops(0, DropReason::NoNicAlive), 0);
        lab.end();
    }
}

/// It would say nothing of the NIC that is lost, and show its address on another link.
#[test]
fn a_lost_nics_own_probe_is_sent_by_no_other() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 2);
        let own = udp(STRANGER, lab.nics[0].mac, 1, 1);
        assert!(Injector::new(&lab.memory).send(&lab.nics[0], &own).sent);
        for number in 0..20 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, 100 + u32::from(number)));
        }
        let sent = |lab: &Lab, nic: usize| lab.nics[nic].queues[0].tx.lock().tx().counters().frames;
        lab.wait_for("every frame on a ring", |lab| {
            (sent(lab, 0) + sent(lab, 1) == 21).then_some(())
        });
        let held = sent(&lab, 0);
        lose(&lab, 0);
        lab.wait_for("the guest's frames of the lost NIC", |lab| {
            (redriven(lab, 0) == held - 1).then_some(())
        });
        let tags: HashSet<u32> = (0..20).map(|_| tag(&lab.collect(1))).collect();
        assert_eq!(tags, (100..120).collect());
        assert_eq!(lab.nic_drops(0, DropReason::NoNicAlive), 0);
        lab.end();
    }
}

#[test]
fn with_no_nic_left_they_are_dropped_and_counted() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 1);
        for number in 0..20 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, number.into()));
        }
        let sent = |lab: &Lab| lab.nics[0].queues[0].tx.lock().tx().counters().frames;
        lab.wait_for("every frame on the ring", |lab| (sent(lab) == 20).then_some(()));
        lose(&lab, 0);
        lab.nic_dropped(0, DropReason::NoNicAlive, 20);
        lab.end();
    }
}

#[test]
fn a_nic_that_goes_takes_nothing_along() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 2);
        for number in 0..40 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, number.into()));
        }
        lose(&lab, 1);
        let mut tags: HashSet<u32> = (0..40).map(|_| tag(&lab.collect(0))).collect();
        assert_eq!(tags.len(), 40);
        // As the control thread does: an absent NIC in its place, and once that has settled the sockets go.
        let (state, mac) = (Arc::clone(&lab.nics[1].state), lab.nics[1].mac);
        let gone = std::mem::replace(&mut lab.nics[1], Arc::new(Nic::absent(state, mac)));
        lab.publish();
        gone.clear(&mut crate::memory::frames::ChunkCache::new(Arc::clone(
            &lab.memory,
        )));
        assert_eq!(Arc::strong_count(&gone), 1, "no worker uses it any more");
        drop((gone, lab.peers.pop()));
        for number in 40..80 {
            lab.send(0, &udp(STRANGER, guest_mac(0), number, number.into()));
            tags.insert(tag(&lab.collect(0)));
        }
        assert_eq!(tags.len(), 80);
        lab.end();
    }
}
