//! Two sessions that are one to the table, by the search of a moment: one in 2^33 pairs is in a table of two buckets.

use std::collections::HashMap;

use super::*;

/// What a table of two buckets knows a session by: its first bucket, and its signature.
fn known_by(balancer: &Balancer, number: u32) -> u64 {
    let frame = sent(number, tcp_flag::ACK);
    balancer.table.lookup(frame.parsed.session_key().unwrap()).hash & (1 << 63 | 0xffff_ffff)
}

fn slots_nic(balancer: &Balancer, number: u32) -> Option<NicIndex> {
    let explained = balancer.explain(0, &sent(number, tcp_flag::ACK).parsed);
    assert_eq!(explained.reason, Reason::Slot);
    explained.choice
}

/// A balancer with eight NICs, and two sessions of other slots that its table takes for one.
fn twins() -> (Arc<Balancer>, u32, u32) {
    let balancer = balancer(8, 1);
    assert_eq!(balancer.table.lanes(), 8, "two buckets of four");
    let mut seen = HashMap::new();
    let mut pairs =
        (0..1 << 24).filter_map(|number| Some((seen.insert(known_by(&balancer, number), number)?, number)));
    let (one, other) = pairs
        .find(|&(one, other)| slots_nic(&balancer, one) != slots_nic(&balancer, other))
        .expect("16 million sessions have ten thousand such pairs");
    (balancer, one, other)
}

fn timer_ms(balancer: &Balancer, from: Millis) -> Millis {
    let gone = (from..).step_by(1000).find(|&now| {
        upkeep_all(balancer, now);
        balancer.stats().sessions == 0
    });
    gone.unwrap() - from
}

#[test]
fn two_sessions_with_one_hash_share_a_nic_and_a_timer_and_lose_nothing() {
    let (balancer, one, other) = twins();
    let home = slots_nic(&balancer, one);
    assert_eq!(steer_one(&balancer, 0, sent(one, tcp_flag::ACK)), home);
    balancer.observe(0, 0, &mut burst_of(&[received(one, tcp_flag::ACK)]));

    // The second one has the first one's entry: its NIC, its age, and its name where sessions are listed.
    let explained = balancer.explain(5, &sent(other, tcp_flag::ACK).parsed);
    assert_eq!((explained.reason, explained.pinned), (Reason::Pinned, home));
    assert_eq!(explained.pinned_ms, Some(5));
    assert_eq!(steer_one(&balancer, 5, sent(other, tcp_flag::ACK)), home);
    let both = [one, other, one].map(|number| sent(number, tcp_flag::ACK));
    let mut out = Vec::new();
    balancer.steer(1, 6, &mut burst_of(&both), &mut out);
    assert_eq!(out, [home; 3], "in one burst too");
    let listed: Vec<_> = balancer.sessions(6, 10).flatten().collect();
    assert_eq!((listed.len(), listed[0].frames), (1, 6));
    assert_eq!(listed[0].key, *sent(one, tcp_flag::ACK).parsed.key());
    assert_eq!(
        (balancer.stats().created, balancer.sessions_per_nic().iter().sum()),
        (1, 1)
    );

    // A lost NIC moves both at once, to one other.
    balancer.alive().set(home.unwrap(), false);
    let away = steer_one(&balancer, 7, sent(other, tcp_flag::ACK));
    assert!(away.is_some() && away != home);
    assert_eq!(steer_one(&balancer, 7, sent(one, tcp_flag::ACK)), away);
    assert_eq!(balancer.stats().repinned, 1);
    balancer.alive().set(home.unwrap(), true);

    // One is reset: the other's frames still go the same way, and keep the entry.
    balancer.observe(0, 8, &mut burst_of(&[received(one, tcp_flag::RST)]));
    for now in (8..40_000).step_by(4000) {
        assert_eq!(steer_one(&balancer, now, sent(other, tcp_flag::ACK)), away);
        upkeep_all(&balancer, now);
    }
    // But it is forgotten as soon as a reset session is, not after an hour.
    let timeouts = Timeouts::default();
    let forgotten = timer_ms(&balancer, 40_000);
    assert!(
        forgotten <= timeouts.tcp_reset_ms + 2000,
        "{forgotten} ms after the last frame"
    );
    // Whoever comes first then has the entry.
    let now = 40_000 + forgotten;
    let others = slots_nic(&balancer, other);
    assert_eq!(steer_one(&balancer, now, sent(other, tcp_flag::ACK)), others);
    assert_eq!(steer_one(&balancer, now, sent(one, tcp_flag::ACK)), others);
    assert_eq!(balancer.stats().sessions, 1);
}

#[test]
fn a_new_connection_takes_over_what_its_twin_has_ended() {
    let (balancer, one, other) = twins();
    let (home, others) = (slots_nic(&balancer, one), slots_nic(&balancer, other));
    steer_one(&balancer, 0, sent(one, tcp_flag::ACK));
    balancer.observe(0, 0, &mut burst_of(&[received(one, tcp_flag::ACK)]));
    assert_eq!(
        steer_one(&balancer, 1, sent(other, tcp_flag::SYN)),
        home,
        "one is open"
    );
    balancer.observe(0, 2, &mut burst_of(&[received(one, tcp_flag::RST)]));
    assert_eq!(steer_one(&balancer, 3, sent(other, tcp_flag::SYN)), others);
    // Were the reset a forged one, the first session would go on by the second one's NIC.
    assert_eq!(steer_one(&balancer, 4, sent(one, tcp_flag::ACK)), others);
    let stats = balancer.stats();
    assert_eq!((stats.sessions, stats.created), (1, 2));
}
