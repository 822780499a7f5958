//! Two workers at one ring, publications under traffic, and sleep.

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::lab::{Habits, Lab, SETTINGS, STRANGER, by_source, guest_mac, tag, udp};
use crate::counters::DropReason;
use crate::engine::{Poll, SleepIn};
use crate::fabric::{Nic, NicQueue};
use crate::memory::frames::ChunkCache;
use crate::nic::memory::pair;

/// Frames that a sender has under way at most, so that two senders never find the receiver without buffers.
const WINDOW: u32 = 100;

#[test]
fn every_frame_of_two_workers_arrives_once_and_in_order() {
    const FRAMES: u32 = 5000;
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 0);
        let mut sent = [0; 2];
        let mut expected = [0; 2];
        lab.wait_for("all frames of both senders", |lab| {
            for sender in [0, 1] {
                let source = guest_mac(u8::try_from(sender).expect("small"));
                while sent[sender] < FRAMES
                    && sent[sender] - expected[sender] < WINDOW
                    && lab.guests[sender].send(&udp(guest_mac(2), source, 1, sent[sender]))
                {
                    sent[sender] += 1;
                }
            }
            for (source, tags) in by_source(lab.guests[2].received()) {
                let expected = &mut expected[usize::from(source.0[5]) - 1];
                for tag in tags {
                    assert_eq!(tag, *expected, "from {source}");
                    *expected += 1;
                }
            }
            (expected == [FRAMES; 2]).then_some(())
        });
        let (bursts, frames) = {
            let counters = lab.engine.worker_counters();
            (
                counters.sum(|worker| worker.contended_bursts.get()),
                counters.sum(|worker| worker.handed_off_frames.get()),
            )
        };
        assert!(bursts <= frames, "{bursts} contended bursts, {frames} frames");
        if settings.0 == 1 {
            assert_eq!(bursts, 0, "one worker contends with nobody");
        }
        lab.end();
    }
}

#[test]
fn two_workers_share_one_nic_ring_without_losing_a_frame() {
    const FRAMES: u32 = 3000;
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 2, 1);
        let (mut sent, mut expected) = ([0; 2], [0; 2]);
        lab.wait_for("all frames of both senders", |lab| {
            for sender in [0, 1] {
                let source = guest_mac(u8::try_from(sender).expect("small"));
                // The NIC's ring takes 128.
                while sent[sender] < FRAMES
                    && sent[sender] - expected[sender] < 32
                    && lab.guests[sender].send(&udp(STRANGER, source, 1, sent[sender]))
                {
                    sent[sender] += 1;
                }
            }
            let frames: Vec<_> = std::iter::from_fn(|| lab.peers[0].collect()).collect();
            for (source, tags) in by_source(frames) {
                let expected = &mut expected[usize::from(source.0[5]) - 1];
                for tag in tags {
                    assert_eq!(tag, *expected, "from {source}");
                    *expected += 1;
                }
            }
            (expected == [FRAMES; 2]).then_some(())
        });
        assert_eq!(lab.nic_drops(0, DropReason::NicRingFull), 0);
        lab.end();
    }
}

#[test]
fn once_settled_no_worker_holds_a_stopped_ring() {
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 1);
        for round in 0..200 {
            // Guest 1 is under fire while its rings are taken away.
            for number in 0..20 {
                lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
            }
            let (rx, tx) = lab.guests[1].stop();
            lab.publish();
            // Nobody can reach the rings any more, so nobody can use the memory behind them.
            assert_eq!(
                (Arc::strong_count(&rx), Arc::strong_count(&tx)),
                (1, 1),
                "round {round}"
            );
            rx.engine.clear(&mut ChunkCache::new(Arc::clone(&lab.memory)));
            lab.guests[1].received();
            lab.guests[1].start((rx, tx));
            lab.publish();
            // The others did not notice.
            lab.send(0, &udp(guest_mac(2), guest_mac(0), 1, round));
            assert_eq!(tag(&lab.receive(2)), round);
        }
        // Memory that went away under a ring that nobody uses harms nobody.
        drop(lab.guests[1].stop());
        lab.publish();
        lab.guests[1].rx.shrink();
        lab.guests[1].tx.shrink();
        lab.send(0, &udp(guest_mac(2), guest_mac(0), 1, 999));
        assert_eq!(tag(&lab.receive(2)), 999);
        lab.take_down();
    }
}

#[test]
fn thousands_of_publications_under_traffic_lose_nothing() {
    const PUBLICATIONS: u64 = 2000;
    for settings in SETTINGS {
        let mut lab = Lab::new(settings, 3, 1);
        let (mut sent, mut expected, mut generation, mut settled) = (0, 0, 0, 0);
        for round in 0..PUBLICATIONS {
            // Another guest's transmit ring comes and goes, and so the other queues' shares.
            lab.guests[2].tx_enabled = round % 2 == 0;
            generation = lab.publish_only();
            let now = lab.engine.settled();
            assert!((settled..=generation).contains(&now), "{settled} -> {now}");
            settled = now;
            while sent - expected < 50
                && sent < (round * 4).try_into().expect("small")
                && lab.guests[0].send(&udp(guest_mac(1), guest_mac(0), 1, sent))
            {
                sent += 1;
            }
            for frame in lab.guests[1].received() {
                assert_eq!(tag(&frame), expected);
                expected += 1;
            }
        }
        lab.settled(generation);
        let missing = usize::try_from(sent - expected).expect("small");
        let last: VecDeque<u32> = (expected..sent).collect();
        let frames = match missing {
            0 => Vec::new(),
            missing => lab.receive_all(1, missing),
        };
        assert_eq!(
            frames.iter().map(|frame| tag(frame)).collect::<VecDeque<_>>(),
            last
        );
        lab.end();
    }
}

/// Unless the workers sleep, no wake-up can be lost.
fn sleeps(lab: &Lab) -> u64 {
    lab.engine.worker_counters().sum(|worker| worker.sleeps.get())
}

#[test]
fn no_kick_is_lost() {
    for habits in Habits::all() {
        for workers in [1, 2] {
            let mut lab = Lab::with_habits((workers, Poll::Adaptive), 2, 0, habits);
            for number in 0..2000 {
                // Sometimes at once, sometimes about when the workers go to sleep, sometimes when they sleep.
                let pause = std::time::Instant::now();
                while pause.elapsed().as_micros() < u128::from(number % 100) {
                    std::hint::spin_loop();
                }
                lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
                assert_eq!(tag(&lab.receive(1)), number, "{habits:?}");
            }
            assert!(sleeps(&lab) > 0);
            lab.end();
        }
    }
}

#[test]
fn no_frame_of_a_nic_is_lost_in_sleep() {
    for (workers, sleep_in) in [
        (1, SleepIn::Auto),
        (2, SleepIn::Auto),
        (1, SleepIn::Epoll),
        (2, SleepIn::Epoll),
    ] {
        let habits = Habits {
            sleep_in,
            ..Habits::USUAL
        };
        let mut lab = Lab::with_habits((workers, Poll::Adaptive), 2, 2, habits);
        for number in 0..2000 {
            let guest = u8::from(number % 3 == 0);
            let nic = usize::from(number % 2 == 0);
            lab.inject(nic, &udp(guest_mac(guest), STRANGER, 1, number));
            assert_eq!(tag(&lab.receive(guest.into())), number);
        }
        assert!(sleeps(&lab) > 0);
        lab.end();
    }
}

#[test]
fn no_hand_off_is_lost_in_sleep() {
    // Both workers send by one NIC queue, a frame or two at a time, and sleep in between: who hands a frame off
    // must come back for it, and not sleep before.
    let mut lab = Lab::new((2, Poll::Adaptive), 2, 1);
    for number in 0..5000 {
        for sender in [0, 1] {
            lab.send(sender.into(), &udp(STRANGER, guest_mac(sender), 1, number));
        }
        let mut tags = [tag(&lab.collect(0)), tag(&lab.collect(0))];
        tags.sort_unstable();
        assert_eq!(tags, [number; 2]);
    }
    assert!(sleeps(&lab) > 0);
    lab.end();
}

#[test]
fn a_worker_that_must_poll_keeps_nothing_open() {
    for sleep_in in [SleepIn::Auto, SleepIn::Epoll] {
        let habits = Habits {
            sleep_in,
            ..Habits::USUAL
        };
        let mut lab = Lab::with_habits((1, Poll::Adaptive), 1, 0, habits);
        // A pipe's reader is told when nobody has the other end open any more.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a descriptor");
        let (rx, tx, peer) = pair(0, &lab.memory, 4);
        let queue = NicQueue {
            wait_fd: Some(writer.as_raw_fd()),
            ..NicQueue::new(Box::new(rx), Box::new(tx))
        };
        lab.add_nic(0, queue);
        lab.publish();
        let slept = sleeps(&lab);
        lab.engine.wake();
        lab.wait_for("a sleep that ended", |lab| (sleeps(lab) > slept).then_some(()));
        lab.guests[0].is_polled = true;
        let state = Arc::clone(&lab.nics[0].state);
        lab.nics[0] = Arc::new(Nic::absent(state, STRANGER));
        lab.publish();
        drop((writer, peer));
        lab.wait_for("the end of the pipe", |_| {
            matches!((&reader).read(&mut [0]), Ok(0)).then_some(())
        });
        lab.end();
    }
}

#[test]
fn a_kick_through_a_replaced_eventfd_is_heard() {
    for workers in [1, 2] {
        let mut lab = Lab::new((workers, Poll::Adaptive), 2, 0);
        for number in 0..500 {
            lab.guests[0].replace_kick();
            // The driver uses the new one before the workers know of it.
            lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
            lab.publish_only();
            assert_eq!(tag(&lab.receive(1)), number);
            lab.send(0, &udp(guest_mac(1), guest_mac(0), 1, number));
            assert_eq!(tag(&lab.receive(1)), number);
        }
        lab.end();
    }
}
