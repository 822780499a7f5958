//! `adaptive`: what it measures, and the sessions that it moves.

use super::tests::{GUEST, balancer, burst_of, ipv4, observed, received, sent, steer_one};
use super::*;
use crate::key::proto;
use crate::parse::tcp_flag;

const SYN: u8 = tcp_flag::SYN;
const SYN_ACK: u8 = tcp_flag::SYN | tcp_flag::ACK;
const ACK: u8 = tcp_flag::ACK;

fn adaptive(nics: u8, capacity: usize) -> Arc<Balancer> {
    let balancer = balancer(nics, capacity);
    balancer.set_policy(Algorithm::Adaptive);
    for nic in 0..nics {
        balancer.set_link_speed(nic, Some(1000)).unwrap();
    }
    balancer.tick(0);
    balancer
}

fn at(micros: u32) -> Clock {
    Clock {
        millis: micros / 1000,
        micros,
    }
}

fn steer_at(balancer: &Balancer, micros: u32, frame: Observed) -> NicIndex {
    let mut out = Vec::new();
    balancer.steer(0, at(micros), &mut burst_of(&[frame]), &mut out);
    out[0].unwrap()
}

fn figures(balancer: &Balancer, nic: NicIndex) -> crate::signals::NicFigures {
    let explanation = balancer.explain(0, &sent(0, 0).parsed);
    explanation.nics[usize::from(nic)].figures
}

/// A segment with TCP options.
fn segment(options: &[u8]) -> Vec<u8> {
    let mut tcp = vec![0u8; 20];
    tcp[12] = u8::try_from((20 + options.len()) / 4).unwrap() << 4;
    tcp[13] = ACK;
    tcp.extend_from_slice(options);
    let mut frame = vec![2u8; 12];
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&ipv4(GUEST, [10, 1, 0, 1], proto::TCP, 0, 0, &tcp));
    frame
}

const TIMESTAMP: [u8; 12] = [1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4];

/// The timestamps that are read of a frame.
fn collected(balancer: &Balancer, frame: &[u8]) -> [u32; 2] {
    let mut burst = Burst::default();
    balancer.collect(&mut burst, frame, 60);
    burst[0].timestamps
}

fn with_timestamps(mut frame: Observed, value: u32, echo: u32) -> Observed {
    frame.timestamps = [value, echo];
    frame
}

/// A session of `balancer`'s that is on `nic`.
fn session_on(balancer: &Balancer, nic: NicIndex) -> u32 {
    (0..1000)
        .find(|&number| steer_at(balancer, 1, sent(number, ACK)) == nic)
        .unwrap()
}

#[test]
fn handshakes_and_timestamps_are_round_trips() {
    let balancer = adaptive(2, 5000);
    let nic = steer_at(&balancer, 5_000, sent(2000, SYN));
    balancer.observe(1, at(5_300), &mut burst_of(&[received(2000, SYN_ACK)]));
    assert_eq!(figures(&balancer, nic).rtt_us, 300.0);
    assert_eq!(figures(&balancer, 1 - nic).rtt_us, 0.0);

    let number = session_on(&balancer, 1 - nic);
    let other = 1 - nic;
    steer_at(&balancer, 6_000, with_timestamps(sent(number, ACK), 77, 5));
    steer_at(&balancer, 6_100, with_timestamps(sent(number, ACK), 77, 5));
    balancer.observe(
        1,
        at(6_150),
        &mut burst_of(&[with_timestamps(received(number, ACK), 6, 76)]),
    );
    assert_eq!(figures(&balancer, other).rtt_us, 0.0, "that echoes an older one");
    balancer.observe(
        1,
        at(6_250),
        &mut burst_of(&[with_timestamps(received(number, ACK), 6, 77)]),
    );
    assert_eq!(
        figures(&balancer, other).rtt_us,
        250.0,
        "from the first with that value"
    );
    steer_at(&balancer, 6_260, with_timestamps(sent(number, ACK), 77, 6));
    balancer.observe(
        1,
        at(6_270),
        &mut burst_of(&[with_timestamps(received(number, ACK), 6, 77)]),
    );
    assert_eq!(
        figures(&balancer, other).rtt_us,
        250.0,
        "that was on its way before"
    );

    // A server in the guest: the client's ACK answers the SYN-ACK.
    let before = figures(&balancer, 0).rtt_us + figures(&balancer, 1).rtt_us;
    balancer.observe(1, at(8_000), &mut burst_of(&[received(3000, SYN)]));
    let nic = steer_at(&balancer, 8_100, sent(3000, SYN_ACK));
    balancer.observe(1, at(9_100), &mut burst_of(&[received(3000, ACK)]));
    let after = figures(&balancer, 0).rtt_us + figures(&balancer, 1).rtt_us;
    assert!(after > before, "{} by {nic}", figures(&balancer, nic).rtt_us);
}

#[test]
fn late_and_foreign_answers_are_no_round_trips() {
    let balancer = adaptive(1, 5000);
    steer_at(&balancer, 1_000, sent(1, SYN));
    balancer.observe(0, at(1_500_000), &mut burst_of(&[received(1, SYN_ACK)]));
    steer_at(&balancer, 2_000_000, sent(2, SYN));
    balancer.observe(
        0,
        at(2_000_100),
        &mut burst_of(&[received(3, SYN_ACK), received(2, ACK)]),
    );
    // The guest's own frame is no answer to it.
    steer_at(&balancer, 2_000_200, sent(2, SYN_ACK));
    assert_eq!(figures(&balancer, 0).rtt_us, 0.0);
}

#[test]
fn under_other_algorithms_nothing_is_measured() {
    let balancer = balancer(1, 100);
    assert_eq!(collected(&balancer, &segment(&TIMESTAMP)), [0; 2]);
    steer_at(&balancer, 1_000, sent(1, SYN));
    balancer.observe(0, at(1_100), &mut burst_of(&[received(1, SYN_ACK)]));
    assert_eq!(figures(&balancer, 0).rtt_us, 0.0);
}

#[test]
fn timestamps_are_read_where_everybody_puts_them() {
    let balancer = adaptive(1, 100);
    assert_eq!(collected(&balancer, &segment(&TIMESTAMP)), [0x102, 0x304]);
    let sack = [1, 1, 5, 10, 0, 0, 1, 2, 0, 0, 3, 4];
    assert_eq!(collected(&balancer, &segment(&sack)), [0, 0]);
    assert_eq!(collected(&balancer, &segment(&[])), [0, 0]);
    let cut = segment(&TIMESTAMP);
    assert_eq!(collected(&balancer, &cut[..cut.len() - 1]), [0, 0]);
    assert_eq!(
        observed(&ipv4(GUEST, GUEST, proto::UDP, 0, 0, &[0; 40])).timestamps,
        [0, 0]
    );
}

#[test]
fn new_sessions_avoid_a_slow_nic_until_it_is_better() {
    let balancer = adaptive(3, 20_000);
    for round in 0..20 {
        for nic in 0..3 {
            let rtt_us = if nic == 1 { 900 } else { 300 };
            balancer.record_probe(nic, round * 50, 1, rtt_us);
        }
        balancer.tick(round * 50);
    }
    assert!(figures(&balancer, 1).latency > 2.5, "{:?}", figures(&balancer, 1));
    let on_slow = |now, first: u32| {
        let numbers = first..first + 300;
        numbers
            .filter(|&number| steer_one(&balancer, now, sent(number, SYN)) == Some(1))
            .count()
    };
    assert_eq!(on_slow(1000, 0), 0);
    // It gets better, and is believed slowly.
    for round in 0..20 {
        (0..3).for_each(|nic| balancer.record_probe(nic, 1000 + round * 100, 1, 300));
        balancer.tick(1000 + round * 100);
    }
    assert!(figures(&balancer, 1).latency > 1.5);
    assert_eq!(on_slow(3000, 1000), 0);
    for round in 0..600 {
        (0..3).for_each(|nic| balancer.record_probe(nic, 3000 + round * 100, 1, 300));
        balancer.tick(3000 + round * 100);
    }
    assert!(on_slow(63_000, 2000) > 60);
}

#[test]
fn far_places_do_not_count_against_a_nic() {
    let balancer = adaptive(2, 1000);
    for round in 0..50 {
        balancer.record_probe(0, round * 100, 1, 200);
        balancer.record_probe(1, round * 100, 2, 80_000);
        balancer.tick(round * 100);
    }
    assert_eq!(
        (figures(&balancer, 0).latency, figures(&balancer, 1).latency),
        (1.0, 1.0)
    );
}

#[test]
fn a_silent_nic_is_forgiven() {
    let balancer = adaptive(2, 1000);
    balancer.record_probe(0, 0, 1, 200);
    balancer.record_probe(1, 0, 1, 200);
    (0..8).for_each(|_| balancer.record_probe(1, 10, 1, 3000));
    balancer.tick(100);
    assert!(figures(&balancer, 1).latency > 10.0);
    (1..900).for_each(|round| balancer.tick(round * 100));
    assert!(figures(&balancer, 1).latency < 1.1, "{:?}", figures(&balancer, 1));
}

#[test]
fn refusals_make_a_nic_dear() {
    let balancer = adaptive(3, 1000);
    balancer.record_refused(0, 1000);
    balancer.tick(100);
    let costs = [0, 1, 2].map(|nic| figures(&balancer, nic).cost);
    assert!(costs[0] > 10.0 && costs[1] < 1.1 && costs[2] < 1.1, "{costs:?}");
    (2..100).for_each(|round| balancer.tick(round * 100));
    assert!(figures(&balancer, 0).cost < 1.1, "it takes frames again");
}

#[test]
fn a_nic_does_not_pay_for_the_one_that_had_its_index() {
    let balancer = adaptive(3, 1000);
    balancer.record_refused(0, 1000);
    balancer.tick(100);
    assert!(figures(&balancer, 0).cost > 10.0);
    balancer.remove_nic(0).unwrap();
    // What its sockets refused on their way out.
    balancer.record_refused(0, 1000);
    let info = NicInfo {
        id: "nic0".to_owned(),
        weight: None,
    };
    assert_eq!(balancer.add_nic(&info), Ok(0));
    balancer.set_alive(0, true, 200);
    balancer.tick(200);
    assert!(figures(&balancer, 0).cost < 1.1, "{:?}", figures(&balancer, 0));
}

/// Deterministic noise.
struct Noise(u64);

impl Noise {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// Sessions that send in trains with pauses between them, over NICs of different delay.
struct Network {
    balancer: Arc<Balancer>,
    delays_us: [u64; 4],
    /// Of each session: frames a millisecond, milliseconds of a train, and of the pause behind it.
    sessions: Vec<(u32, u32, u32)>,
    /// When each session's last frame arrived.
    arrived_us: Vec<u64>,
    reordered: u64,
    noise: Noise,
    bytes: [u64; MAX_NICS],
}

impl Network {
    fn new(sessions: Vec<(u32, u32, u32)>) -> Network {
        Network {
            balancer: adaptive(4, 5000),
            delays_us: [3_000, 200, 1_000, 100],
            arrived_us: vec![0; sessions.len()],
            sessions,
            reordered: 0,
            noise: Noise(1),
            bytes: [0; MAX_NICS],
        }
    }

    fn run(&mut self, from_ms: u32, to_ms: u32) {
        self.bytes = [0; MAX_NICS];
        let mut out = Vec::new();
        for now in from_ms..to_ms {
            if now % 50 == 0 {
                for nic in 0..4u8 {
                    let rtt = u32::try_from(2 * self.delays_us[usize::from(nic)]).unwrap();
                    self.balancer.record_probe(nic, now, 1, rtt);
                }
                self.balancer.tick(now);
            }
            let mut sends: Vec<(u64, usize)> = Vec::new();
            for (session, &(rate, train, pause)) in self.sessions.iter().enumerate() {
                let phase = (now + u32::try_from(session).unwrap() * 7) % (train + pause);
                if phase < train {
                    let sent = (0..rate).map(|_| (u64::from(now) * 1000 + self.noise.below(1000), session));
                    sends.extend(sent);
                }
            }
            sends.sort_unstable();
            for burst in sends.chunks(32) {
                let frame = |&(_, session): &(u64, usize)| Observed {
                    frame_len: 1500,
                    ..sent(u32::try_from(session).unwrap(), ACK)
                };
                let frames: Vec<_> = burst.iter().map(frame).collect();
                self.balancer.steer(0, now, &mut burst_of(&frames), &mut out);
                for (&(sent_us, session), nic) in burst.iter().zip(&out) {
                    let nic = usize::from(nic.unwrap());
                    let arrives = sent_us + self.delays_us[nic];
                    self.reordered += u64::from(arrives < self.arrived_us[session]);
                    self.arrived_us[session] = arrives.max(self.arrived_us[session]);
                    self.bytes[nic] += 1500;
                }
            }
        }
    }

    /// Load of the NIC with the most over the mean.
    fn imbalance(&self) -> f64 {
        let most = *self.bytes.iter().max().unwrap() as f64;
        most * 4.0 / self.bytes.iter().sum::<u64>() as f64
    }
}

/// Session i sends 24 / (i + 1) frames a millisecond, at least one.
fn elephants(pause: u32) -> Vec<(u32, u32, u32)> {
    (1..=60).map(|rank| ((24 / rank).max(1), 40, pause)).collect()
}

#[test]
fn elephants_are_moved_at_their_pauses_and_never_reordered() {
    let mut network = Network::new(elephants(20));
    network.run(0, 1_000);
    let before = network.imbalance();
    network.run(1_000, 25_000);
    network.run(25_000, 28_000);
    let stats = network.balancer.stats();
    assert!(stats.moved > 3, "{stats:?}");
    assert_eq!(
        network.reordered, 0,
        "a frame came before one of its session that was sent earlier"
    );
    let after = network.imbalance();
    assert!(after < 1.05 && after < before, "from {before} to {after}");
    let moves = network.balancer.stats().moved;
    network.run(28_000, 40_000);
    let more = network.balancer.stats().moved - moves;
    assert!(more < 10, "it does not stop moving: {more}");
    assert_eq!(network.reordered, 0);
    assert_eq!(network.balancer.sessions_per_nic().iter().sum::<u64>(), 60);
}

#[test]
fn who_never_pauses_is_never_moved() {
    let mut network = Network::new(elephants(0));
    network.run(0, 10_000);
    assert_eq!((network.balancer.stats().moved, network.reordered), (0, 0));
    assert!(network.imbalance() > 1.05, "there was a reason to");
    let asked = |network: &Network| {
        let moves_to = (0..60).map(|number| network.balancer.explain(0, &sent(number, ACK).parsed).moves_to);
        moves_to.flatten().count()
    };
    assert!(asked(&network) > 0);
    network.balancer.set_policy(Algorithm::Hash);
    network.balancer.tick(10_001);
    assert_eq!(asked(&network), 0, "no wish outlives the algorithm");
}

#[test]
fn even_loads_are_left_alone() {
    let mut network = Network::new(vec![(1, 5, 45); 1]);
    network.run(0, 8_000);
    assert_eq!(network.balancer.stats().moved, 0, "one session cannot be split");
}

#[test]
fn a_session_that_is_asked_to_move_leaves_a_dead_nic_like_any_other() {
    let mut network = Network::new(elephants(0));
    network.run(0, 2_500);
    let balancer = &network.balancer;
    let asked = (0..60).find_map(|number| {
        let explanation = balancer.explain(2_500, &sent(number, ACK).parsed);
        explanation.moves_to.map(|_| (number, explanation))
    });
    let (number, before) = asked.unwrap();
    balancer.set_alive(before.pinned.unwrap(), false, 2_500);
    let heir = before
        .order
        .iter()
        .copied()
        .find(|&nic| Some(nic) != before.pinned);
    assert_eq!(steer_one(balancer, 2_500, sent(number, ACK)), heir);
    let after = balancer.explain(2_500, &sent(number, ACK).parsed);
    assert_eq!((after.moves_to, after.pinned), (None, heir));
}
