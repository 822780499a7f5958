//! How the queues of a share take turns.

use super::lab::{HEADER, Lab, STRANGER, guest_mac, tag, udp};
use crate::engine::Poll;

/// Has a worker find at its first look all that `fill` puts into rings and NICs.
fn at_one_look(lab: &mut Lab, fill: impl FnOnce(&mut Lab)) {
    lab.turn();
    let rings: Vec<_> = lab.guests.iter_mut().map(|guest| guest.stop()).collect();
    let nics = std::mem::take(&mut lab.nics);
    lab.publish();
    fill(lab);
    lab.nics = nics;
    for (guest, rings) in lab.guests.iter_mut().zip(rings) {
        guest.start(rings);
    }
    lab.publish();
}

/// Offers so many frames to a guest's send ring, a buffer each.
fn offer(lab: &mut Lab, from: u8, to: vnic_lb::mac::Mac, count: u32) {
    for number in 0..count {
        let frame = udp(to, guest_mac(from), 1, number);
        let bytes = [&[0; HEADER], &frame[..]].concat();
        lab.guests[usize::from(from)].tx.send(&[&bytes], None);
    }
}

fn busy_turns(lab: &Lab) -> u64 {
    lab.engine.worker_counters().sum(|worker| worker.busy_turns.get())
}

/// Turns that one worker takes for so many guests with 250 frames each for one more guest each, and a NIC with `received` frames for the first.
fn turns(senders: u8, received: u32) -> u64 {
    const WAITING: u32 = 250;
    let mut lab = Lab::new((1, Poll::Busy), 2 * senders, 1);
    let before = busy_turns(&lab);
    at_one_look(&mut lab, |lab| {
        for sender in 0..senders {
            offer(lab, sender, guest_mac(senders + sender), WAITING);
        }
        for number in 0..received {
            lab.inject(0, &udp(guest_mac(0), STRANGER, 1, number));
        }
    });
    for receiver in senders..2 * senders {
        let frames = lab.receive_all(receiver.into(), WAITING as usize);
        assert!(frames.iter().map(|frame| tag(frame)).eq(0..WAITING));
    }
    assert_eq!(lab.receive_all(0, received as usize).len(), received as usize);
    lab.turn();
    let turns = busy_turns(&lab) - before;
    lab.end();
    turns
}

#[test]
fn rings_with_many_frames_share_the_turn() {
    // 64, and then all 186 that are left.
    assert_eq!(turns(1, 0), 2);
    // 64, 96, 90.
    assert_eq!(turns(2, 0), 3);
    // 64 three times, 58.
    assert_eq!(turns(3, 0), 4);
}

#[test]
fn while_a_nic_has_bursts_no_ring_has_long_ones() {
    // 64 of each twice, 64 and nothing, 58.
    assert_eq!(turns(1, 128), 4);
}

/// Kicks of the NIC while so many guests with `count` frames each for it have a turn.
fn kicks(senders: u8, count: u32) -> u64 {
    let mut lab = Lab::new((1, Poll::Busy), senders, 1);
    let kicks = |lab: &Lab| lab.nics[0].queues[0].tx.lock().tx().counters().kicks;
    let before = kicks(&lab);
    at_one_look(&mut lab, |lab| {
        (0..senders).for_each(|sender| offer(lab, sender, STRANGER, count));
    });
    for sender in 0..senders {
        for number in 0..count {
            assert_eq!(lab.collect(0), udp(STRANGER, guest_mac(sender), 1, number));
        }
    }
    let kicks = kicks(&lab) - before;
    lab.end();
    kicks
}

#[test]
fn a_nic_is_kicked_once_for_what_guests_have_for_it_in_a_turn() {
    assert_eq!(kicks(1, 1), 1);
    assert_eq!(kicks(8, 15), 1);
    // Up to 192 frames: after four guests with 50, and then for one more.
    assert_eq!(kicks(5, 50), 2);
}
