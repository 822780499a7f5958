//! Changes at run time: algorithm, weights, NICs.

use super::tests::{balancer, burst_of, received, sent, steer_all, steer_one};
use super::*;
use crate::nics::NicError;
use crate::parse::tcp_flag;

fn info(id: &str) -> NicInfo {
    NicInfo {
        id: id.to_owned(),
        weight: None,
    }
}

/// NICs of new sessions, by index.
fn place(balancer: &Balancer, now: Millis, sessions: std::ops::Range<u32>) -> [u32; MAX_NICS] {
    let mut counts = [0; MAX_NICS];
    for number in sessions {
        let nic = steer_one(balancer, now, sent(number, tcp_flag::SYN)).unwrap();
        counts[usize::from(nic)] += 1;
    }
    counts
}

#[test]
fn another_algorithm_or_weight_moves_no_session() {
    let balancer = balancer(4, 20_000);
    let before = steer_all(&balancer, 0, 4000);
    for algorithm in Algorithm::ALL {
        balancer.set_policy(algorithm);
        assert_eq!(balancer.algorithm(), algorithm);
        assert_eq!(steer_all(&balancer, 1, 4000), before, "{algorithm}");
    }
    balancer.set_weight(0, Some(100)).unwrap();
    balancer.set_weight(1, Some(0)).unwrap();
    assert_eq!(steer_all(&balancer, 2, 4000), before);
    assert_eq!(balancer.set_policy(Algorithm::Weighted), Algorithm::Adaptive);
    let counts = place(&balancer, 2, 10_000..11_000);
    assert_eq!(counts[1], 0);
    assert!(counts[0] > 950, "{counts:?}");
    assert_eq!(balancer.set_weight(4, None), Err(NicError::Unknown(4)));
}

#[test]
fn reweighting_deals_new_sessions_by_the_new_quotas() {
    let balancer = balancer(4, 100_000);
    for (nic, weight) in (0u8..).zip([10, 25, 40, 100]) {
        balancer.set_weight(nic, Some(weight)).unwrap();
    }
    let counts = place(&balancer, 0, 0..50_000);
    for (count, weight) in counts.into_iter().zip([10, 25, 40, 100]) {
        let expected = f64::from(weight) / 175.0 * 50_000.0;
        // Four standard deviations of the sampling.
        let tolerance = 4.0 * expected.sqrt();
        assert!((f64::from(count) - expected).abs() < tolerance, "{counts:?}");
    }
}

#[test]
fn link_speeds_weigh_unless_an_operator_does() {
    let balancer = balancer(2, 20_000);
    balancer.set_policy(Algorithm::Weighted);
    assert_eq!(balancer.set_link_speed(0, Some(10_000)), Ok(true));
    assert_eq!(balancer.set_link_speed(1, Some(40_000)), Ok(true));
    assert_eq!(balancer.set_link_speed(1, Some(40_000)), Ok(false));
    let counts = place(&balancer, 0, 0..5000);
    assert!((3800..4200).contains(&counts[1]), "{counts:?}");
    balancer.set_weight(0, Some(1)).unwrap();
    let counts = place(&balancer, 0, 5000..10_000);
    assert!((2300..2700).contains(&counts[1]), "{counts:?}");
}

#[test]
fn least_conn_is_even_to_the_session() {
    let balancer = balancer(8, 50_000);
    balancer.set_policy(Algorithm::LeastConn);
    let frames: Vec<_> = (0..8000).map(|number| sent(number, tcp_flag::ACK)).collect();
    let mut out = Vec::new();
    for burst in frames.chunks(50) {
        balancer.steer(0, 0, &mut burst_of(burst), &mut out);
    }
    assert_eq!(balancer.sessions_per_nic(), [1000; 8]);
    // Sessions that end make room where they were.
    balancer.alive().set(5, false);
    steer_all(&balancer, 1, 8000);
    assert_eq!(balancer.sessions_per_nic()[5], 0);
    balancer.set_alive(5, true, 2);
    let counts = place(&balancer, 20_000, 10_000..10_100);
    assert_eq!(counts[5], 100);
}

#[test]
fn half_open_sessions_are_counted_until_they_open_or_end() {
    let balancer = balancer(1, 100);
    let half_open = || balancer.explain(0, &sent(99, 0).parsed).nics[0].half_open;
    for number in 0..4 {
        steer_one(&balancer, 0, sent(number, tcp_flag::SYN));
    }
    assert_eq!(half_open(), 4);
    balancer.observe(0, 1, &mut burst_of(&[received(0, tcp_flag::SYN | tcp_flag::ACK)]));
    steer_one(&balancer, 2, sent(0, tcp_flag::ACK));
    assert_eq!(half_open(), 3, "one opened");
    balancer.observe(0, 3, &mut burst_of(&[received(1, tcp_flag::RST | tcp_flag::ACK)]));
    assert_eq!(half_open(), 2, "one was refused");
    while balancer.upkeep(40_000) {}
    assert_eq!((half_open(), balancer.stats().sessions), (0, 1), "two timed out");
}

#[test]
fn a_drained_nic_keeps_its_sessions_and_gets_no_others() {
    let balancer = balancer(3, 20_000);
    let before = steer_all(&balancer, 0, 3000);
    let left = balancer.drain(1).unwrap();
    assert_eq!(left, balancer.sessions_per_nic()[1]);
    assert_eq!(steer_all(&balancer, 1, 3000), before);
    assert_eq!(place(&balancer, 1, 5000..6000)[1], 0);
    assert!(balancer.nics()[1].drained);
    balancer.undrain(1).unwrap();
    assert!(place(&balancer, 1, 6000..7000)[1] > 250);
    assert_eq!(balancer.drain(9), Err(NicError::Unknown(9)));
}

#[test]
fn with_every_nic_drained_sessions_stay_and_new_ones_go_on() {
    for algorithm in Algorithm::ALL {
        let balancer = balancer(3, 20_000);
        balancer.set_policy(algorithm);
        let before = steer_all(&balancer, 0, 3000);
        for nic in 0..3 {
            balancer.drain(nic).unwrap();
        }
        assert_eq!(steer_all(&balancer, 1, 3000), before, "{algorithm}");
        let counts = place(&balancer, 1, 5000..6000);
        assert_eq!(counts.iter().sum::<u32>(), 1000, "{algorithm}");
    }
}

#[test]
fn a_nic_is_added_and_takes_new_sessions_only() {
    let balancer = balancer(2, 20_000);
    let before = steer_all(&balancer, 0, 2000);
    assert_eq!(
        balancer.add_nic(&info("nic1")),
        Err(NicError::DuplicateId("nic1".to_owned()))
    );
    assert_eq!(balancer.add_nic(&info("new")), Ok(2));
    assert_eq!(
        place(&balancer, 1, 3000..3100)[2],
        0,
        "nobody says that it is alive"
    );
    assert!(balancer.set_alive(2, true, 5) && balancer.is_warming(2, 5));
    assert_eq!(steer_all(&balancer, 6, 2000), before);
    let counts = place(&balancer, 6, 5000..6000);
    assert!((250..420).contains(&counts[2]), "{counts:?}");
}

#[test]
fn sessions_of_a_removed_nic_go_elsewhere_and_its_id_gets_its_index_back() {
    let balancer = balancer(3, 20_000);
    let before = steer_all(&balancer, 0, 3000);
    let on_one = before.iter().filter(|&&nic| nic == 1).count() as u64;
    assert_eq!(balancer.remove_nic(1), Ok(on_one));
    assert_eq!(balancer.remove_nic(1), Err(NicError::Unknown(1)));
    assert!(!balancer.set_alive(1, true, 1), "it is not there");
    let during = steer_all(&balancer, 1, 3000);
    assert!(
        before
            .iter()
            .zip(&during)
            .all(|(&was, &is)| is != 1 && (was == 1 || was == is))
    );
    assert_eq!(balancer.sessions_per_nic()[1], 0);
    for index in 3..8 {
        assert_eq!(
            balancer.add_nic(&info(&format!("more{index}"))),
            Ok(index),
            "index 1 is spared"
        );
    }
    assert_eq!(balancer.add_nic(&info("nic1")), Ok(1), "its own again");
    assert_eq!(balancer.add_nic(&info("ninth")), Err(NicError::NoRoom));
    balancer.remove_nic(4).unwrap();
    assert_eq!(balancer.add_nic(&info("ninth")), Ok(4), "no other is left");
    assert_eq!(balancer.nics().len(), 8);
}

#[test]
fn a_removed_nic_that_is_said_to_be_alive_gets_no_frames() {
    let balancer = balancer(3, 20_000);
    assert!(steer_all(&balancer, 0, 3000).contains(&1));
    balancer.remove_nic(1).unwrap();
    // As a thread may do that found the carrier just before.
    balancer.alive().set(1, true);
    assert!(!steer_all(&balancer, 1, 3000).contains(&1), "known sessions move");
    assert_eq!(place(&balancer, 1, 5000..6000)[1], 0);
    assert_eq!(balancer.explain(1, &sent(1, 0).parsed).alive.len(), 2);
}

#[test]
fn whoever_watches_the_links_cannot_revive_a_nic_that_is_being_removed() {
    let balancer = balancer(3, 100);
    let (started, over) = (std::sync::Barrier::new(2), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            started.wait();
            while !over.load(Relaxed) {
                balancer.set_alive(1, true, 0);
            }
        });
        started.wait();
        balancer.remove_nic(1).unwrap();
        over.store(true, Relaxed);
    });
    assert!(!balancer.alive().contains(1));
}

#[test]
fn a_returning_nic_is_in_slow_start_and_one_of_the_start_is_not() {
    let balancer = balancer(2, 1000);
    balancer.set_alive(0, true, 0);
    assert!(!balancer.is_warming(0, 0));
    balancer.set_alive(0, false, 10);
    balancer.set_alive(0, true, 20);
    assert!(balancer.is_warming(0, 20 + SLOW_START_MS - 1));
    assert!(!balancer.is_warming(0, 20 + SLOW_START_MS));
    assert!(!balancer.set_alive(0, true, 30), "nothing new");
    assert!(!balancer.is_warming(0, 20 + SLOW_START_MS));
    balancer.tick(100_000);
    // The clock wraps; a NIC must not be in slow start again then.
    assert!(!balancer.is_warming(0, 25));
}

#[test]
fn a_nic_without_a_carrier_at_the_start_is_in_slow_start_when_it_has_one() {
    let balancer = balancer(2, 20_000);
    balancer.alive().set(1, false);
    balancer.set_policy(Algorithm::LeastConn);
    balancer.set_alive(0, true, 0);
    balancer.first_look_over();
    assert!(!balancer.is_warming(0, 0));
    steer_all(&balancer, 1, 3000);
    assert!(balancer.set_alive(1, true, 3_600_000));
    assert!(balancer.is_warming(1, 3_600_000) && !balancer.is_warming(0, 3_600_000));
    let counts = place(&balancer, 3_600_001, 5000..5400);
    assert!(counts[0] > 0, "not all go to the newcomer: {counts:?}");
}

#[test]
fn explain_shows_what_decides() {
    let balancer = balancer(3, 1000);
    balancer.set_policy(Algorithm::LeastConn);
    let frame = sent(1, tcp_flag::SYN);
    let before = balancer.explain(0, &frame.parsed);
    assert_eq!(
        (before.algorithm, before.reason),
        (Algorithm::LeastConn, Reason::Load)
    );
    assert_eq!(steer_one(&balancer, 0, frame), before.choice);
    let home = before.choice.unwrap();
    balancer.set_alive(home, false, 1);
    let lost = balancer.explain(2, &frame.parsed);
    assert_eq!((lost.pinned, lost.reason), (Some(home), Reason::Fallback));
    assert_eq!(lost.choice, lost.order.iter().copied().find(|&nic| nic != home));
    assert_eq!(lost.alive.len(), 2);
    assert_eq!(steer_one(&balancer, 2, frame), lost.choice);
    let moved = balancer.explain(3, &frame.parsed);
    assert!(moved.has_moved && moved.reason == Reason::Pinned && moved.pinned_ms == Some(3));
    (0..3).for_each(|nic| {
        balancer.set_alive(nic, false, 4);
    });
    let none = balancer.explain(5, &frame.parsed);
    assert_eq!(
        (none.choice, none.reason, none.pinned),
        (None, Reason::NoneAlive, lost.choice)
    );
    for reason in [
        Reason::Pinned,
        Reason::Fallback,
        Reason::Slot,
        Reason::Load,
        Reason::Stateless,
    ] {
        assert!(!reason.to_string().is_empty());
    }
}
