mod collisions;

use std::collections::HashMap;
use std::sync::Barrier;

use super::*;
use crate::key::proto;
use crate::parse::{parse, tcp_flag};

pub(super) const GUEST: [u8; 4] = [10, 0, 0, 1];

pub(super) fn balancer(nics: u8, capacity: usize) -> Arc<Balancer> {
    let ids = (0..nics).map(|nic| NicInfo {
        id: format!("nic{nic}"),
        weight: None,
    });
    let config = BalancerConfig {
        nics: ids.collect(),
        algorithm: Algorithm::Hash,
        session_capacity: capacity,
        workers: 2,
        timeouts: Timeouts::default(),
        limits: SessionLimits::default(),
        hash_key: [7; 16],
    };
    let balancer = Balancer::new(&config);
    for nic in 0..nics {
        balancer.alive().set(nic, true);
    }
    balancer
}

pub(super) fn ipv4(
    src: [u8; 4],
    dst: [u8; 4],
    protocol: u8,
    id: u16,
    fragment: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&u16::try_from(20 + payload.len()).unwrap().to_be_bytes());
    packet.extend_from_slice(&id.to_be_bytes());
    packet.extend_from_slice(&fragment.to_be_bytes());
    packet.extend_from_slice(&[64, protocol, 0, 0]);
    packet.extend_from_slice(&[src, dst].concat());
    packet.extend_from_slice(payload);
    packet
}

fn ipv4_frame(packet: &[u8]) -> Vec<u8> {
    [&[2; 6][..], &[4; 6], &[8, 0], packet].concat()
}

pub(super) fn observed(packet: &[u8]) -> Observed {
    let frame = ipv4_frame(packet);
    Observed::new(parse(&frame), u32::try_from(frame.len()).unwrap())
}

pub(super) fn burst_of(frames: &[Observed]) -> Burst {
    let mut burst = Burst::default();
    frames.iter().for_each(|frame| burst.push_parsed(frame));
    burst
}

fn transport(from: u16, to: u16, tcp_flags: u8) -> Vec<u8> {
    let mut header = vec![0u8; 20];
    header[..2].copy_from_slice(&from.to_be_bytes());
    header[2..4].copy_from_slice(&to.to_be_bytes());
    header[13] = tcp_flags;
    header
}

fn peer(number: u32) -> ([u8; 4], u16) {
    let [_, b, c, d] = number.to_be_bytes();
    ([10, 1, b, c], 1000 + u16::from(d))
}

/// A segment of session `number`, from the guest.
pub(super) fn sent(number: u32, tcp_flags: u8) -> Observed {
    let (address, port) = peer(number);
    observed(&ipv4(
        GUEST,
        address,
        proto::TCP,
        0,
        0,
        &transport(port, 80, tcp_flags),
    ))
}

/// A segment of session `number`, to the guest.
pub(super) fn received(number: u32, tcp_flags: u8) -> Observed {
    let (address, port) = peer(number);
    observed(&ipv4(
        address,
        GUEST,
        proto::TCP,
        0,
        0,
        &transport(80, port, tcp_flags),
    ))
}

/// Up to `limit` sessions.
pub(super) fn listed(balancer: &Arc<Balancer>, now: Millis, limit: usize) -> Vec<SessionInfo> {
    balancer.sessions(now, limit).flatten().collect()
}

pub(super) fn steer_one(balancer: &Balancer, now: Millis, frame: Observed) -> Option<NicIndex> {
    let mut out = Vec::new();
    balancer.steer(0, now, &mut burst_of(&[frame]), &mut out);
    assert_eq!(out.len(), 1);
    out[0]
}

fn upkeep_all(balancer: &Balancer, now: Millis) {
    while balancer.upkeep(now) {}
}

pub(super) fn steer_all(balancer: &Balancer, now: Millis, sessions: u32) -> Vec<NicIndex> {
    let frames: Vec<_> = (0..sessions).map(|number| sent(number, tcp_flag::ACK)).collect();
    let mut out = Vec::new();
    balancer.steer(1, now, &mut burst_of(&frames), &mut out);
    out.into_iter().map(|nic| nic.unwrap()).collect()
}

#[test]
fn failover_moves_only_the_sessions_of_the_lost_nic_and_return_moves_none() {
    const SESSIONS: u32 = 100_000;
    let balancer = balancer(8, 2 * SESSIONS as usize + 10_000);
    let before = steer_all(&balancer, 0, SESSIONS);
    assert_eq!(balancer.stats().table_full, 0);
    let on_three = before.iter().filter(|&&nic| nic == 3).count() as u64;
    assert!(
        (11_500..13_500).contains(&on_three),
        "an eighth, give or take the sampling: {on_three}"
    );
    assert_eq!(balancer.sessions_per_nic()[3], on_three);

    balancer.alive().set(3, false);
    let during = steer_all(&balancer, 10, SESSIONS);
    assert!(
        before
            .iter()
            .zip(&during)
            .all(|(&was, &is)| is != 3 && (was == 3 || was == is))
    );
    assert_eq!(balancer.stats().repinned, on_three);
    assert_eq!(balancer.sessions_per_nic()[3], 0);

    balancer.alive().set(3, true);
    assert_eq!(
        steer_all(&balancer, 20, SESSIONS),
        during,
        "a returning NIC takes new sessions only"
    );
    let new = (SESSIONS..SESSIONS + 1000)
        .filter(|&number| steer_one(&balancer, 30, sent(number, tcp_flag::SYN)) == Some(3));
    assert!(new.count() > 50);
    let stats = balancer.stats();
    assert_eq!(
        (stats.sessions, stats.created, stats.expired),
        (101_000, 101_000, 0)
    );
    assert_eq!(balancer.sessions_per_nic().iter().sum::<u64>(), 101_000);
}

#[test]
fn with_no_nic_alive_pins_stay() {
    let balancer = balancer(2, 1000);
    let before = steer_all(&balancer, 0, 100);
    balancer.alive().set(0, false);
    balancer.alive().set(1, false);
    assert_eq!(steer_one(&balancer, 1, sent(1, tcp_flag::ACK)), None);
    assert_eq!(steer_one(&balancer, 1, sent(500, tcp_flag::SYN)), None);
    balancer.observe(
        0,
        1,
        &mut burst_of(&[received(2, tcp_flag::ACK), received(501, tcp_flag::SYN)]),
    );
    balancer.alive().set(0, true);
    balancer.alive().set(1, true);
    assert_eq!(steer_all(&balancer, 2, 100), before);
    assert_eq!(balancer.stats().repinned, 0);
    assert_eq!(
        balancer.stats().sessions,
        101,
        "the one that a NIC brought was made with its slot's primary"
    );
}

#[test]
fn both_directions_are_one_session() {
    let balancer = balancer(4, 1000);
    balancer.observe(0, 100, &mut burst_of(&[received(1, tcp_flag::SYN)]));
    let nic = steer_one(&balancer, 200, sent(1, tcp_flag::SYN | tcp_flag::ACK)).unwrap();
    let sessions = listed(&balancer, 250, 10);
    assert_eq!(sessions.len(), 1);
    let session = &sessions[0];
    assert_eq!((session.nic, session.age_ms, session.idle_ms), (nic, 150, 50));
    assert_eq!((session.frames, session.bytes), (2, 2 * 54));
    assert_eq!(session.key.to_string(), "tcp 10.0.0.1:1001 <-> 10.1.0.0:80");
}

#[test]
fn a_burst_of_one_new_session_makes_one_entry_and_counts_each_frame() {
    let balancer = balancer(4, 1000);
    let frames = vec![sent(1, tcp_flag::ACK); 200];
    let mut out = vec![Some(9); 3];
    balancer.steer(0, 0, &mut burst_of(&frames), &mut out);
    assert_eq!(out.len(), 200);
    assert!(out.iter().all(|&nic| nic == out[0]));
    let stats = balancer.stats();
    assert_eq!((stats.sessions, stats.created), (1, 1));
    assert_eq!(listed(&balancer, 0, 10)[0].frames, 200);
}

#[test]
fn a_syn_on_a_closed_session_is_decided_anew() {
    let balancer = balancer(2, 1000);
    let home = steer_one(&balancer, 0, sent(1, tcp_flag::SYN)).unwrap();
    balancer.alive().set(home, false);
    let away = steer_one(&balancer, 1, sent(1, tcp_flag::ACK)).unwrap();
    assert_ne!(home, away);
    balancer.alive().set(home, true);
    assert_eq!(
        steer_one(&balancer, 2, sent(1, tcp_flag::SYN)),
        Some(away),
        "it is still open"
    );
    balancer.observe(0, 3, &mut burst_of(&[received(1, tcp_flag::RST)]));
    assert_eq!(
        steer_one(&balancer, 4, sent(1, tcp_flag::ACK)),
        Some(away),
        "a reset deletes nothing"
    );
    assert_eq!(steer_one(&balancer, 5, sent(1, tcp_flag::SYN)), Some(home));
    let stats = balancer.stats();
    assert_eq!((stats.sessions, stats.created, stats.repinned), (1, 2, 1));
    assert_eq!(
        listed(&balancer, 5, 1)[0].frames,
        1,
        "the old session's frames are not the new one's"
    );
}

#[test]
fn a_lone_reset_makes_no_session() {
    let balancer = balancer(2, 1000);
    assert!(steer_one(&balancer, 0, sent(1, tcp_flag::RST)).is_some());
    balancer.observe(0, 0, &mut burst_of(&[received(2, tcp_flag::RST | tcp_flag::ACK)]));
    assert_eq!(balancer.stats().sessions, 0);
}

#[test]
fn fragments_follow_the_first() {
    let balancer = balancer(8, 10_000);
    for number in 0..64u16 {
        let (address, port) = peer(u32::from(number));
        let first = ipv4(
            GUEST,
            address,
            proto::UDP,
            number,
            0x2000,
            &transport(port, 53, 0),
        );
        let later = ipv4(GUEST, address, proto::UDP, number, 5, &[0; 40]);
        let nic = steer_one(&balancer, 0, observed(&first));
        assert_eq!(steer_one(&balancer, 1, observed(&later)), nic);
        assert_eq!(balancer.explain(1, &observed(&later).parsed).choice, nic);
        let whole = ipv4(GUEST, address, proto::UDP, number, 0, &transport(port, 53, 0));
        assert_eq!(
            steer_one(&balancer, 1, observed(&whole)),
            nic,
            "and the session's other datagrams too"
        );
    }
    assert_eq!(
        (balancer.stats().sessions, listed(&balancer, 0, 100).len()),
        (64, 64),
        "sessions, not fragments"
    );
    upkeep_all(&balancer, 31_002);
    assert_eq!(balancer.stats().expired, 64);
    assert_eq!(balancer.stats().sessions, 0);
}

#[test]
fn an_icmp_error_takes_the_way_of_its_session_and_makes_none() {
    let balancer = balancer(8, 10_000);
    for number in 0..64 {
        let (address, port) = peer(number);
        let datagram = ipv4(address, GUEST, proto::UDP, 0, 0, &transport(9, port, 0));
        let error = [vec![3u8, 3, 0, 0, 0, 0, 0, 0], datagram.clone()].concat();
        let error = observed(&ipv4(GUEST, address, proto::ICMP, 0, 0, &error));
        let stateless = steer_one(&balancer, 0, error);
        assert_eq!(balancer.stats().sessions, u64::from(number));
        balancer.observe(0, 0, &mut burst_of(&[observed(&datagram)]));
        let session = listed(&balancer, 0, 100)
            .into_iter()
            .find(|session| session.key == *error.parsed.key());
        assert_eq!(steer_one(&balancer, 0, error), session.map(|session| session.nic));
        assert_eq!(stateless, steer_one(&balancer, 0, error));
    }
    assert!(
        listed(&balancer, 0, 100)
            .iter()
            .all(|session| session.frames == 1)
    );
}

#[test]
fn a_full_table_still_forwards_by_the_same_slots() {
    let (small, large) = (balancer(8, 10), balancer(8, 5000));
    assert_eq!(steer_all(&small, 0, 1000), steer_all(&large, 0, 1000));
    let stats = small.stats();
    let without = stats.table_full + stats.one_way_full;
    assert!(without >= 1000 - stats.capacity && stats.sessions <= stats.capacity);
}

#[test]
fn explain_tells_what_steer_will_do() {
    let balancer = balancer(8, 1000);
    for number in 0..100 {
        let frame = sent(number, tcp_flag::SYN);
        let before = balancer.explain(0, &frame.parsed);
        assert_eq!((before.pinned, before.reason), (None, Reason::Slot));
        assert_eq!(steer_one(&balancer, 0, frame), before.choice);
        let after = balancer.explain(7, &frame.parsed);
        assert_eq!((after.choice, after.reason), (before.choice, Reason::Pinned));
        assert_eq!((after.pinned, after.pinned_ms), (before.choice, Some(7)));
        assert_eq!(after.order.first().copied(), before.choice);
    }
    assert_eq!(balancer.stats().created, 100);
}

#[test]
fn without_nics_nothing_is_made() {
    let balancer = balancer(0, 100);
    assert_eq!(steer_one(&balancer, 0, sent(1, tcp_flag::SYN)), None);
    balancer.observe(0, 0, &mut burst_of(&[received(1, tcp_flag::SYN)]));
    assert_eq!(balancer.stats().sessions, 0);
}

/// Workers open the same sessions from both sides while a NIC goes and comes: each session must have one entry, one
/// pin that only moves off a dead NIC, and the gauges must add up to what is in the table.
#[test]
fn workers_agree_on_every_session() {
    const SESSIONS: u32 = 4000;
    const ROUNDS: u32 = 10;
    let balancer = balancer(4, SESSIONS as usize * 2);
    let barrier = Barrier::new(2);
    let mut pins = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            barrier.wait();
            (0..ROUNDS)
                .map(|round| steer_all(&balancer, round, SESSIONS))
                .collect::<Vec<_>>()
        });
        scope.spawn(|| {
            let frames: Vec<_> = (0..SESSIONS)
                .rev()
                .map(|number| received(number, tcp_flag::ACK))
                .collect();
            let mut out = Vec::new();
            barrier.wait();
            for round in 0..ROUNDS {
                balancer.observe(1, round, &mut burst_of(&frames));
                balancer.alive().set(2, round % 2 == 1);
                balancer.steer(1, round, &mut burst_of(&frames), &mut out);
                balancer.upkeep(round);
            }
            balancer.alive().set(2, true);
        });
        guest.join().unwrap()
    });
    pins.push(steer_all(&balancer, ROUNDS, SESSIONS));
    for (before, after) in pins.iter().zip(&pins[1..]) {
        assert!(
            before.iter().zip(after).all(|(&was, &is)| was == is || was == 2),
            "a pin left a live NIC"
        );
    }
    let mut counts = [0u64; 8];
    let sessions = listed(&balancer, ROUNDS, usize::MAX);
    sessions
        .iter()
        .for_each(|session| counts[usize::from(session.nic)] += 1);
    assert_eq!(counts, balancer.sessions_per_nic());
    let unique: HashMap<_, _> = sessions
        .iter()
        .map(|session| (session.key, session.nic))
        .collect();
    assert_eq!(
        (unique.len(), sessions.len()),
        (SESSIONS as usize, SESSIONS as usize)
    );
}

#[test]
fn sessions_are_listed_in_pieces() {
    let balancer = balancer(2, 100_000);
    steer_all(&balancer, 0, 5000);
    let mut list = balancer.sessions(0, usize::MAX);
    let first = list.by_ref().take_while(Option::is_some).count();
    assert!(first > 0 && first < 5000, "{first}");
    steer_all(&balancer, 0, 5001);
    let others = list.filter(Option::is_some).count();
    assert!((5000..=5001).contains(&(first + others)));
    for limit in [0, 1, 4999] {
        assert_eq!(listed(&balancer, 0, limit).len(), limit);
    }
    // The longest piece without a session.
    let empty = self::balancer(2, 100_000);
    assert!(empty.sessions(0, 1).next().is_some_and(|piece| piece.is_none()));
}

#[test]
fn group_frames_keep_off_drained_nics() {
    let balancer = balancer(3, 100);
    assert_eq!(balancer.designated(), Some(0));
    balancer.drain(0).unwrap();
    assert_eq!(balancer.designated(), Some(1));
    balancer.set_weight(1, Some(0)).unwrap();
    assert_eq!(balancer.designated(), Some(2));
    balancer.alive().set(2, false);
    assert_eq!(balancer.designated(), Some(0), "better a drained one than none");
    balancer.alive().set(0, false);
    balancer.alive().set(1, false);
    assert_eq!(balancer.designated(), None);
}

#[test]
fn lookups_belong_to_the_balancer_that_steers() {
    let [one, other] = [balancer(8, 5000), balancer(8, 5000)];
    let frames: Vec<_> = (0..100u8)
        .map(|number| ipv4_frame(&ipv4(GUEST, [10, 1, 0, number], proto::UDP, 0, 0, &[0; 8])))
        .collect();
    let (mut burst, mut first, mut again) = (Burst::default(), Vec::new(), Vec::new());
    for (at, frame) in frames.iter().enumerate() {
        // Some come by other ways.
        if at % 3 == 1 {
            burst.push(frame, 60, false);
        } else {
            one.collect(&mut burst, frame, 60);
        }
    }
    for balancer in [&one, &other] {
        balancer.steer(0, 1, &mut burst, &mut first);
        balancer.steer(0, 2, &mut burst, &mut again);
        assert_eq!(first, again);
        let stats = balancer.stats();
        assert_eq!((stats.sessions, stats.created), (100, 100));
    }
}
