//! What strangers' frames cannot do to others' sessions: floods, full tables, caps.

use super::tests::{burst_of, listed};
use super::*;
use crate::key::proto;
use crate::parse::tcp_flag;

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = tcp_flag::ACK;
const FRAGMENT_FIRST: u16 = 0x2000;

fn balancer(capacity: usize, limits: SessionLimits) -> Arc<Balancer> {
    let ids = (0..8).map(|nic| NicInfo {
        id: format!("nic{nic}"),
        weight: None,
    });
    let balancer = Balancer::new(&BalancerConfig {
        nics: ids.collect(),
        algorithm: Algorithm::Hash,
        session_capacity: capacity,
        workers: 1,
        timeouts: Timeouts::default(),
        limits,
        hash_key: [7; 16],
    });
    set_alive(&balancer, 0..8, true);
    balancer
}

fn set_alive(balancer: &Balancer, nics: std::ops::Range<NicIndex>, alive: bool) {
    for nic in nics {
        balancer.alive().set(nic, alive);
    }
}

/// A frame of 60 bytes from 10.0.0.0 + `from` to 192.0.2.1; `fragment` is the IPv4 word with flags and offset.
fn frame(from: u32, protocol: u8, tcp_flags: u8, fragment: u16) -> [u8; 60] {
    let mut frame = [0u8; 60];
    frame[12] = 8;
    (frame[14], frame[17], frame[23]) = (0x45, 46, protocol);
    frame[18..20].copy_from_slice(&from.to_be_bytes()[2..]);
    frame[20..22].copy_from_slice(&fragment.to_be_bytes());
    frame[26..30].copy_from_slice(&(0x0a00_0000 + from).to_be_bytes());
    frame[30..34].copy_from_slice(&[192, 0, 2, 1]);
    frame[34..38].copy_from_slice(&[0x10, 0, 0, 80]);
    (frame[46], frame[47]) = (0x50, tcp_flags);
    frame
}

/// The same the other way.
fn reply(from: u32, protocol: u8, tcp_flags: u8) -> [u8; 60] {
    let mut frame = frame(from, protocol, tcp_flags, 0);
    let (addresses, ports) = (frame[26..34].to_vec(), frame[34..38].to_vec());
    frame[26..30].copy_from_slice(&addresses[4..]);
    frame[30..34].copy_from_slice(&addresses[..4]);
    frame[34..36].copy_from_slice(&ports[2..]);
    frame[36..38].copy_from_slice(&ports[..2]);
    frame
}

fn steer(balancer: &Balancer, now: Millis, frames: impl Iterator<Item = [u8; 60]>) -> Vec<Option<NicIndex>> {
    let (mut burst, mut out) = (Burst::with_capacity(1000), Vec::new());
    for frame in frames {
        balancer.collect(&mut burst, &frame, 60);
    }
    balancer.steer(0, now, &mut burst_of(&burst), &mut out);
    out
}

fn slot_nic(balancer: &Balancer, frame: &[u8]) -> Option<NicIndex> {
    let slots = &balancer.plan.load().slots;
    slots.primary(slots.slot(crate::parse::parse(frame).key()))
}

/// A million SYNs a second from as many addresses, now and then for seventy seconds: longer than half-open sessions live.
#[test]
fn a_syn_flood_costs_no_established_session_its_pin() {
    const SESSIONS: u32 = 20_000;
    const FLOOD: std::ops::Range<u32> = 0x40_0000..0x40_0000 + 1_000_000;
    // Behind these the flood finds no room: the cap is 16 times what is left.
    let balancer = balancer(SESSIONS as usize * 2, SessionLimits::default());
    let talk = |now| {
        (0..SESSIONS / 1000)
            .flat_map(|part| {
                let numbers = part * 1000..part * 1000 + 1000;
                steer(
                    &balancer,
                    now,
                    numbers.map(|number| frame(number, proto::TCP, ACK, 0)),
                )
            })
            .collect::<Vec<_>>()
    };
    // Every other session is on another NIC than a new one of its key would get.
    set_alive(&balancer, 0..4, false);
    let pins = talk(0);
    set_alive(&balancer, 0..4, true);
    let (mut sources, mut half_open) = (FLOOD.cycle(), 0);
    for start in (0..70_000).step_by(5000) {
        for now in start..start + 70 {
            let flood = sources
                .by_ref()
                .take(1000)
                .map(|from| frame(from, proto::TCP, SYN, 0));
            assert!(steer(&balancer, now, flood).iter().all(Option::is_some));
            balancer.upkeep(now);
        }
        half_open = half_open.max(balancer.stats().half_open);
        assert_eq!(talk(start + 70), pins);
        let quiet = start + 4000;
        while balancer.upkeep(quiet) {}
    }
    let stats = balancer.stats();
    let cap = stats.capacity / 4;
    assert_eq!(half_open, cap, "the flood took what it may, and no more");
    assert!(stats.half_open_full > 500_000, "{stats:?}");
    assert!(stats.expired >= cap, "half-open sessions go: {stats:?}");
    assert_eq!(stats.sessions, u64::from(SESSIONS) + stats.half_open);
    assert_eq!((stats.table_full, stats.repinned), (0, 0));
}

/// Bare ACKs from strangers, seventy seconds long: sessions whose ends both speak, before it and in it, keep their NIC, and what the flood has
/// made is gone soon after.
#[test]
fn a_flood_of_bare_acks_costs_no_established_session_its_pin() {
    const SESSIONS: u32 = 5_000;
    let balancer = balancer(40_000, SessionLimits::default());
    let both_ways = |now, numbers: std::ops::Range<u32>| {
        let pins = steer(
            &balancer,
            now,
            numbers.clone().map(|number| frame(number, proto::TCP, ACK, 0)),
        );
        let mut burst = Burst::default();
        for number in numbers {
            balancer.collect(&mut burst, &reply(number, proto::TCP, ACK), 60);
        }
        balancer.observe(0, now, &mut burst_of(&burst));
        pins
    };
    set_alive(&balancer, 0..4, false);
    let pins = both_ways(0, 0..SESSIONS);
    set_alive(&balancer, 0..4, true);
    let mut sources = 0x40_0000u32..;
    for now in (0..70_000).step_by(100) {
        let flood = sources.by_ref().take(1000);
        steer(&balancer, now, flood.map(|from| frame(from, proto::TCP, ACK, 0)));
        while balancer.upkeep(now) {}
        assert!(balancer.stats().sessions <= balancer.stats().capacity / 2 + 2 * u64::from(SESSIONS));
    }
    // Sessions that begin meanwhile find room.
    let syn = |from| frame(from, proto::TCP, SYN, 0);
    steer(&balancer, 70_000, (0x20_0000..0x20_0000 + SESSIONS).map(syn));
    let stats = balancer.stats();
    assert_eq!((stats.table_full, stats.repinned), (0, 0));
    assert_eq!(stats.half_open, u64::from(SESSIONS));
    assert!(stats.one_way_full > 100_000, "{stats:?}");
    assert_eq!(both_ways(70_000, 0..SESSIONS), pins);
    while balancer.upkeep(102_000) {}
    assert_eq!(balancer.stats().sessions, u64::from(SESSIONS));
}

/// Where the other direction takes another way, a session that goes on sending keeps its NIC.
#[test]
fn a_session_of_which_one_end_is_heard_lives_while_it_speaks() {
    let balancer = balancer(1000, SessionLimits::default());
    set_alive(&balancer, 0..4, false);
    let speak = |now| {
        steer(
            &balancer,
            now,
            (0..100).map(|number| frame(number, proto::TCP, ACK, 0)),
        )
    };
    let pins = speak(0);
    set_alive(&balancer, 0..4, true);
    for now in (25_000..200_000).step_by(25_000) {
        while balancer.upkeep(now) {}
        assert_eq!(speak(now), pins);
    }
    assert_eq!(balancer.stats().created, 100);
    while balancer.upkeep(240_000) {}
    assert_eq!(balancer.stats().sessions, 0);
}

#[test]
fn a_full_table_leaves_the_sessions_that_it_has_alone() {
    let balancer = balancer(2000, SessionLimits::default());
    set_alive(&balancer, 0..4, false);
    let known = || (0..500).map(|number| frame(number, proto::TCP, ACK, 0));
    let pins = steer(&balancer, 0, known());
    set_alive(&balancer, 0..4, true);
    for now in 1..50u32 {
        let flood = (0..1000).map(|step| frame(0x40_0000 + now * 1000 + step, proto::UDP, 0, 0));
        let flood: Vec<_> = flood.collect();
        let chosen = steer(&balancer, now, flood.iter().copied());
        assert!(
            chosen
                .iter()
                .zip(&flood)
                .all(|(nic, frame)| *nic == slot_nic(&balancer, frame))
        );
    }
    assert!(balancer.stats().table_full > 40_000);
    assert_eq!(steer(&balancer, 60, known()), pins);
}

#[test]
fn a_handshake_ends_being_half_open() {
    let balancer = balancer(
        1000,
        SessionLimits {
            half_open: 2,
            ..SessionLimits::default()
        },
    );
    let half_open = || {
        let stats = balancer.stats();
        (stats.half_open, stats.half_open_full, stats.sessions)
    };
    steer(
        &balancer,
        0,
        (0..3).map(|number| frame(number, proto::TCP, SYN, 0)),
    );
    assert_eq!(half_open(), (2, 1, 2));
    // Another frame of a session that is there is none of a new one.
    steer(&balancer, 1, [frame(0, proto::TCP, SYN, 0)].into_iter());
    assert_eq!(half_open(), (2, 1, 2));
    let mut burst = Burst::default();
    balancer.collect(&mut burst, &reply(0, proto::TCP, SYN | ACK), 60);
    balancer.observe(0, 2, &mut burst_of(&burst));
    assert_eq!(half_open(), (2, 1, 2));
    steer(&balancer, 3, [frame(0, proto::TCP, ACK, 0)].into_iter());
    assert_eq!(half_open(), (1, 1, 2));
    // The one that found no room is taken in as soon as it is more than a SYN.
    steer(&balancer, 4, [frame(2, proto::TCP, ACK, 0)].into_iter());
    assert_eq!(half_open(), (1, 1, 3));
    // It has not heard an answer.
    while balancer.upkeep(40_000) {}
    assert_eq!(half_open(), (0, 1, 1));
    // A closed session that is opened again is half-open again.
    for flags in [ACK | tcp_flag::RST, SYN] {
        steer(&balancer, 40_001, [frame(0, proto::TCP, flags, 0)].into_iter());
    }
    assert_eq!(half_open(), (1, 1, 1));
}

#[test]
fn beyond_the_cap_of_a_second_frames_go_by_their_slots() {
    let limits = SessionLimits {
        new_per_second: 100,
        ..SessionLimits::default()
    };
    let balancer = balancer(10_000, limits);
    let frames: Vec<_> = (0..250).map(|number| frame(number, proto::UDP, 0, 0)).collect();
    let slots: Vec<_> = frames.iter().map(|frame| slot_nic(&balancer, frame)).collect();
    let counts = || (balancer.stats().created, balancer.stats().new_capped);
    assert_eq!(steer(&balancer, 10, frames.iter().copied()), slots);
    assert_eq!(counts(), (100, 150));
    // Those that exist are no new ones.
    assert_eq!(
        steer(&balancer, 900, frames.iter().take(100).copied()),
        slots[..100]
    );
    assert_eq!(counts(), (100, 150));
    assert_eq!(steer(&balancer, 1010, frames.iter().copied()), slots);
    assert_eq!(counts(), (200, 200));
}

#[test]
fn a_session_of_the_same_burst_is_found_though_the_cap_is_reached() {
    let limits = SessionLimits {
        new_per_second: 1,
        ..SessionLimits::default()
    };
    let balancer = balancer(1000, limits);
    steer(&balancer, 0, [frame(1, proto::UDP, 0, 0); 5].into_iter());
    let stats = balancer.stats();
    assert_eq!((stats.created, stats.new_capped), (1, 0));
    assert_eq!(listed(&balancer, 0, 9)[0].frames, 5);
}

#[test]
fn fragments_beyond_their_cap_go_by_their_slots() {
    let limits = SessionLimits {
        fragments: 10,
        ..SessionLimits::default()
    };
    let balancer = balancer(1000, limits);
    let first = (0..30).map(|number| frame(number, proto::UDP, 0, FRAGMENT_FIRST));
    let of_sessions = steer(&balancer, 0, first);
    let later: Vec<_> = (0..30).map(|number| frame(number, proto::UDP, 0, 5)).collect();
    let followed = steer(&balancer, 1, later.iter().copied());
    assert_eq!(followed[..10], of_sessions[..10]);
    let by_tuple: Vec<_> = later[10..]
        .iter()
        .map(|frame| slot_nic(&balancer, frame))
        .collect();
    assert_eq!(followed[10..], by_tuple);
    let stats = balancer.stats();
    assert_eq!(
        (stats.fragments, stats.fragments_full, stats.sessions),
        (10, 20, 30)
    );
    while balancer.upkeep(40_000) {}
    assert_eq!(balancer.stats().fragments, 0);
}

#[test]
fn fragments_without_a_first_make_no_session() {
    let balancer = balancer(1000, SessionLimits::default());
    for frame in (0..50).map(|number| frame(number, proto::UDP, 0, 5)) {
        assert_eq!(
            steer(&balancer, 0, [frame].into_iter()),
            [slot_nic(&balancer, &frame)]
        );
    }
    let stats = balancer.stats();
    assert_eq!((stats.sessions, stats.created, stats.fragments), (0, 0, 0));
}
