//! How the queues of a share take turns.

use super::lab::{HEADER, Lab, STRANGER, guest_mac, tag, udp};
use crate::engine::Poll;

/// Frames that wait in each sender's ring.
const WAITING: u32 = 250;

/// Turns that one worker takes for so many guests with [`WAITING`] frames each for one more guest each, and a NIC with `received` frames for
/// the first.
fn turns(senders: u8, received: u32) -> u64 {
    let mut lab = Lab::new((1, Poll::Busy), 2 * senders, 1);
    // Everything is to be there when the worker looks.
    lab.turn();
    let rings: Vec<_> = lab.guests.iter_mut().map(|guest| guest.stop()).collect();
    let nics = std::mem::take(&mut lab.nics);
    lab.publish();
    for sender in 0..senders {
        for number in 0..WAITING {
            let frame = udp(guest_mac(senders + sender), guest_mac(sender), 1, number);
            let guest = &mut lab.guests[usize::from(sender)];
            guest.tx.send(&[&[&[0; HEADER], &frame[..]].concat()], None);
        }
    }
    for number in 0..received {
        lab.inject(0, &udp(guest_mac(0), STRANGER, 1, number));
    }
    let busy_turns = |lab: &Lab| lab.engine.worker_counters().sum(|worker| worker.busy_turns.get());
    let before = busy_turns(&lab);
    lab.nics = nics;
    for (guest, rings) in lab.guests.iter_mut().zip(rings) {
        guest.start(rings);
    }
    lab.publish();
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
