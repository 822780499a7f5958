//! Rings that are disabled, broken, empty or full; queues that are full; chunks that run out; workers that die.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::vec::Drain;

use vnic_lb::parse::parse;
use vnic_lb::policy::Algorithm;

use super::lab::{Habits, Lab, SETTINGS, STRANGER, guest_mac, tag, udp};
use crate::counters::DropReason;
use crate::engine::{Event, Poll};
use crate::fabric::NicQueue;
use crate::memory::frames::{ChunkCache, Frame, FrameMemory};
use crate::nic::{NicRx, NicRxReader, NicTx, NicTxCounters, memory};
use crate::virtq::RingError;
use crate::virtq::testing::{Driver, INDIRECT, Kind, MEMORY_END, NEXT, SCRATCH, WRITE};

#[test]
fn a_disabled_ring_is_emptied_and_its_frames_counted() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        lab.guests[0].tx_enabled = false;
        lab.publish();
        for number in 0..100 {
            lab.send(0, &udp(STRANGER, guest_mac(0), 1, number));
        }
        lab.dropped(0, DropReason::RingDisabled, 100);
        lab.guests[0].tx_enabled = true;
        lab.publish();
        lab.send(0, &udp(STRANGER, guest_mac(0), 1, 100));
        assert_eq!(tag(&lab.collect(0)), 100);
        lab.end();
    }
}

#[test]
fn a_broken_ring_is_reported_once_and_the_others_run() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 1);
        // Guest TX: the driver claims more than a ring's worth.
        let before = lab.guests[0].tx.avail_idx;
        lab.guests[0].tx.set_avail(before.wrapping_add(1000));
        lab.guests[0].kick(before.into());
        match lab.event() {
            Event::RingBroken { port, ring, error } => {
                assert_eq!((port, ring), (0, 1));
                assert!(matches!(error, RingError::AvailTooFarAhead { .. }), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert!(lab.guests[0].tx_ring().is_broken());
        // Guest RX likewise.
        let before = lab.guests[1].rx.avail_idx;
        lab.guests[1].rx.set_avail(before.wrapping_add(1000));
        for count in 1..=5 {
            lab.inject(0, &udp(guest_mac(1), STRANGER, 1, 1));
            lab.dropped(1, DropReason::RingBroken, count);
        }
        assert!(matches!(lab.event(), Event::RingBroken { port: 1, ring: 0, .. }));
        // The other ring of each, and the other guest, work.
        lab.inject(0, &udp(guest_mac(0), STRANGER, 1, 2));
        assert_eq!(tag(&lab.receive(0)), 2);
        lab.send(1, &udp(guest_mac(2), guest_mac(1), 1, 3));
        assert_eq!(tag(&lab.receive(2)), 3);
        lab.turn();
        assert!(lab.engine.next_event().is_none(), "reported once");
        lab.take_down();
    }
}

/// What a hostile driver puts on a ring.
type Attack = fn(&mut Driver);

/// Whatever breaks a ring breaks that ring alone: it is reported once, and other guests' frames pass.
#[test]
fn every_broken_rule_breaks_one_ring_and_nothing_else() {
    let attacks: [(&str, Attack); 9] = [
        ("a chain without an end", |driver| {
            driver.offer_raw(&[(SCRATCH, 1, NEXT)]);
        }),
        ("a buffer behind the memory", |driver| {
            driver.offer_raw(&[(MEMORY_END - 1, 2, 0)]);
        }),
        ("a buffer at the end of the address space", |driver| {
            driver.offer_raw(&[(u64::MAX - 1, 64, 0)]);
        }),
        ("an indirect table of nothing", |driver| {
            driver.offer_raw(&[(SCRATCH, 0, INDIRECT)]);
        }),
        ("an indirect table of an odd length", |driver| {
            driver.offer_raw(&[(SCRATCH, 17, INDIRECT)]);
        }),
        ("an indirect table behind the memory", |driver| {
            driver.offer_raw(&[(MEMORY_END, 16, INDIRECT)]);
        }),
        ("an indirect table in an indirect table", |driver| {
            driver.put_table(SCRATCH, 0, SCRATCH, 16, INDIRECT);
            driver.offer_raw(&[(SCRATCH, 16, INDIRECT)]);
        }),
        ("an indirect descriptor that goes on", |driver| {
            driver.put_table(SCRATCH, 0, SCRATCH, 16, 0);
            driver.offer_raw(&[(SCRATCH, 16, INDIRECT | NEXT), (SCRATCH, 1, 0)]);
        }),
        ("readable after writable", |driver| {
            driver.offer_raw(&[(SCRATCH, 1, WRITE | NEXT), (SCRATCH, 1, 0)]);
        }),
    ];
    for kind in [Kind::Split, Kind::Packed] {
        let habits = Habits {
            kind,
            ..Habits::USUAL
        };
        let mut lab = Lab::with_habits((1, Poll::Adaptive), 12, 0, habits);
        for (attacker, (what, attack)) in (0..).zip(attacks) {
            let guest = &mut lab.guests[attacker];
            let before = guest.tx.offered();
            attack(&mut guest.tx);
            guest.kick(before);
            match lab.event() {
                Event::RingBroken { port, ring, .. } => {
                    assert_eq!((usize::from(port), ring), (attacker, 1), "{kind:?}: {what}");
                }
                other => panic!("{kind:?}: {what}: {other:?}"),
            }
            assert!(lab.guests[attacker].tx_ring().is_broken());
            lab.send(10, &udp(guest_mac(11), guest_mac(10), 1, 7));
            assert_eq!(tag(&lab.receive(11)), 7, "{kind:?}: after {what}");
        }
        // Receive buffers that cannot be written to: the frame for them is dropped and counted.
        lab.guests[9].rx_with_raw(&[(SCRATCH, 64, 0)]);
        lab.publish();
        lab.send(10, &udp(guest_mac(9), guest_mac(10), 1, 8));
        lab.dropped(9, DropReason::RingBroken, 1);
        assert!(matches!(lab.event(), Event::RingBroken { port: 9, ring: 0, .. }));
        lab.turn();
        assert!(lab.engine.next_event().is_none(), "reported once");
        lab.take_down();
    }
}

#[test]
fn a_guest_without_buffers_loses_its_own_frames_only() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        lab.guests[1].without_buffers();
        lab.publish();
        for count in 1..=40 {
            lab.inject(0, &udp(guest_mac(1), STRANGER, 1, 1));
            lab.dropped(1, DropReason::NoGuestBuffer, count);
        }
        lab.inject(0, &udp(guest_mac(0), STRANGER, 1, 2));
        assert_eq!(tag(&lab.receive(0)), 2);
        lab.end();
    }
}

#[test]
fn a_full_nic_ring_drops_the_excess_and_goes_on() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 1, 1);
        // The ring takes 256 and the peer takes none.
        for number in 0..300 {
            lab.send(0, &udp(STRANGER, guest_mac(0), 1, number));
        }
        lab.nic_dropped(0, DropReason::NicRingFull, 300 - 256);
        // `adaptive` makes the NIC dearer for it.
        let (balancer, mut now) = (Arc::clone(&lab.balancer), 0);
        balancer.set_policy(Algorithm::Adaptive);
        lab.wait_for("a penalty for the full ring", |_| {
            now += 100;
            balancer.tick(now);
            let explanation = balancer.explain(now, &parse(&udp(STRANGER, guest_mac(0), 1, 0)));
            (explanation.nics[0].figures.latency > 1.0).then_some(())
        });
        balancer.set_policy(Algorithm::Hash);
        for number in 0..256 {
            assert_eq!(tag(&lab.collect(0)), number);
        }
        lab.send(0, &udp(STRANGER, guest_mac(0), 1, 300));
        assert_eq!(tag(&lab.collect(0)), 300);
        lab.end();
    }
}

#[test]
fn without_chunks_frames_are_dropped_until_there_are_some() {
    for settings in SETTINGS {
        // The NIC's fill ring takes all that there are.
        let mut lab = Lab::with_chunks(settings, 2, 1, 64);
        lab.turn();
        lab.send(0, &udp(STRANGER, guest_mac(0), 1, 1));
        lab.dropped(0, DropReason::NoChunk, 1);
        // From guest to guest none is needed.
        lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, 3));
        assert_eq!(tag(&lab.receive(1)), 3);
        // A received frame gives one back, at least until the fill ring takes it again.
        lab.inject(0, &udp(guest_mac(1), STRANGER, 1, 2));
        assert_eq!(tag(&lab.receive(1)), 2);
        lab.end();
    }
}

#[test]
fn a_hand_off_ring_that_is_full_drops_the_excess_and_keeps_the_order() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 0);
        let ring = std::sync::Arc::clone(lab.guests[1].rx_ring());
        // Somebody holds the destination's ring all the time: its hand-off ring takes 512.
        let held = ring.engine.try_lock().expect("nobody uses it yet");
        for number in 0..600 {
            lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
        }
        lab.dropped(1, DropReason::HandOffFull, 600 - 512);
        let counters = lab.engine.worker_counters();
        assert_eq!(counters.sum(|worker| worker.handed_off_frames.get()), 512);
        assert!(
            counters.sum(|worker| worker.contended_bursts.get()) >= 600 / crate::worker::LONG_BURST as u64
        );
        drop(held);
        // The worker comes back for all of them, and the next burst is behind those that came first.
        lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, 600));
        // The guest had 255 buffers, and offers each again that it has emptied: what came while it had none was dropped.
        let frames = lab.receive_until_dropped(1, DropReason::NoGuestBuffer, 512 + 1);
        assert!(frames.len() >= 255);
        let tags: Vec<u32> = frames.iter().map(|frame| tag(frame)).collect();
        assert_eq!(tags[..255], (0..255).collect::<Vec<_>>());
        assert!(tags.is_sorted_by(|one, next| one < next), "{tags:?}");
        lab.end();
    }
}

#[test]
fn a_burst_never_overtakes_what_was_handed_off_before() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 0);
        let ring = std::sync::Arc::clone(lab.guests[1].rx_ring());
        let held = ring.engine.try_lock().expect("nobody uses it yet");
        // More than is taken over in one batch.
        for number in 0..200 {
            lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
        }
        lab.wait_for("the hand-off", |lab| {
            let handed_off = lab
                .engine
                .worker_counters()
                .sum(|worker| worker.handed_off_frames.get());
            (handed_off == 200).then_some(())
        });
        drop(held);
        lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, 200));
        let tags: Vec<u32> = lab.receive_all(1, 201).iter().map(|frame| tag(frame)).collect();
        assert_eq!(tags, (0..=200).collect::<Vec<_>>());
        lab.end();
    }
}

/// A NIC queue whose driver has a bug.
struct Faulty(OwnedFd);

impl NicRx for Faulty {
    fn receive(&mut self, _: &mut ChunkCache, _: &mut Vec<Frame>, _: usize) -> usize {
        panic!("a bug in a driver");
    }
    fn refill(&mut self, _: &mut ChunkCache) {}
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn reader(&self) -> Arc<dyn NicRxReader> {
        let (rx, ..) = memory::pair(0, &FrameMemory::new(1).expect("memory"), 1);
        rx.reader()
    }
}

impl NicTx for Faulty {
    fn send(&mut self, _: &mut Drain<'_, Frame>) {}
    fn flush(&mut self) {}
    fn reap(&mut self, _: &mut ChunkCache) -> usize {
        0
    }
    fn in_flight(&self) -> usize {
        0
    }
    fn copy_in_flight(&mut self, _: &mut ChunkCache, _: &mut Vec<Frame>) {}
    fn counters(&self) -> NicTxCounters {
        NicTxCounters::default()
    }
}

#[test]
fn a_worker_that_panics_is_reported_and_the_engine_still_ends() {
    for poll in [Poll::Busy, Poll::Adaptive] {
        let mut lab = Lab::new((2, poll), 2, 0);
        let faulty = || {
            let flags = nix::sys::eventfd::EfdFlags::EFD_NONBLOCK;
            Box::new(Faulty(
                nix::sys::eventfd::EventFd::from_flags(flags)
                    .expect("an eventfd")
                    .into(),
            ))
        };
        // Polled by worker 0.
        lab.add_nic(0, NicQueue::new(faulty(), faulty()));
        lab.publish_only();
        match lab.event() {
            Event::WorkerFailed { worker, cause } => {
                assert_eq!((worker, cause.as_str()), (0, "a bug in a driver"));
            }
            other => panic!("{other:?}"),
        }
        drop(lab);
    }
}
