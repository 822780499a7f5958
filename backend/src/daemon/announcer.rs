//! When which station is announced, and with which addresses. Frames, NICs and time belong to others.
//!
//! A frame may get lost, and a switch's port may not forward yet, so an announcement is repeated at growing gaps. Thousands of
//! stations may move at once: then it takes longer, and those that have not been announced at all come first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use vnic_dataplane::neighbour::announce::Announcement;
use vnic_dataplane::neighbour::snoop::Snooped;
use vnic_lb::pinned::Station;

/// Time from one announcement of a station to the next.
const GAPS: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_millis(1_000),
    Duration::from_millis(3_000),
];

/// Frames that may be sent in a [`TICK`]: 25,600 a second, a fraction of what a switch's control plane is given by accident.
const FRAMES: usize = 128;
const TICK: Duration = Duration::from_millis(5);

/// Addresses kept of one station; a newer one takes the place of the one that was not heard of for longest.
const ADDRESSES: usize = 16;

/// How long an address counts after it was last heard of: the guest may have given it back, and somebody else have it now.
const KEPT: Duration = Duration::from_secs(20 * 60);

struct Known {
    address: IpAddr,
    router: bool,
    heard: Instant,
}

/// Announcements so far of a station that moved.
struct Round {
    number: usize,
    next: Instant,
}

/// Stations with their addresses, and those that are being announced.
#[derive(Default)]
pub(super) struct Announcer {
    known: BTreeMap<Station, Vec<Known>>,
    rounds: BTreeMap<Station, Round>,
    /// When the budget is there again.
    refilled: Option<Instant>,
}

impl Announcer {
    /// Takes note of addresses that were heard of before; the others are given back, to be examined.
    pub(super) fn hear(&mut self, snooped: impl Iterator<Item = Snooped>, now: Instant) -> Vec<Snooped> {
        let mut news = Vec::new();
        for one in snooped {
            let known = self.known.get_mut(&one.station);
            match known.and_then(|known| known.iter_mut().find(|known| known.address == one.address)) {
                Some(known) => {
                    known.heard = now;
                    known.router |= one.router;
                }
                None => news.push(one),
            }
        }
        news
    }

    /// Keeps an address.
    pub(super) fn learn(&mut self, snooped: Snooped, now: Instant) {
        let Snooped {
            station,
            address,
            router,
        } = snooped;
        let known = self.known.entry(station).or_default();
        known.retain(|known| known.address != address);
        if known.len() >= ADDRESSES
            && let Some(oldest) = (0..known.len()).min_by_key(|at| known[*at].heard)
        {
            known.remove(oldest);
        }
        known.push(Known {
            address,
            router,
            heard: now,
        });
    }

    /// Addresses of a station.
    pub(super) fn addresses(&self, station: Station, now: Instant) -> Vec<(IpAddr, bool)> {
        let known = self.known.get(&station).into_iter().flatten();
        known
            .filter(|known| now.saturating_duration_since(known.heard) < KEPT)
            .map(|known| (known.address, known.router))
            .collect()
    }

    /// Announces a station from now on, from the first round.
    pub(super) fn begin(&mut self, station: Station, now: Instant) {
        self.rounds.insert(station, Round { number: 0, next: now });
    }

    /// Forgets a station.
    pub(super) fn forget(&mut self, station: Station) {
        self.known.remove(&station);
        self.rounds.remove(&station);
    }

    /// What is to be sent now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Station, Vec<Announcement>)> {
        if self.refilled.is_some_and(|at| now < at) {
            return Vec::new();
        }
        let due = self.rounds.iter().filter(|(_, round)| round.next <= now);
        let mut due: Vec<(usize, Station)> = due.map(|(station, round)| (round.number, *station)).collect();
        if due.is_empty() {
            return Vec::new();
        }
        self.refilled = Some(now + TICK);
        due.sort_unstable();
        let (mut frames, mut out) = (0, Vec::new());
        for (_, station) in due {
            if frames >= FRAMES {
                break;
            }
            let told = self.addresses(station, now);
            let told = told
                .into_iter()
                .map(|(address, router)| Announcement::Address { address, router });
            let mut told: Vec<Announcement> = told.collect();
            if told.is_empty() {
                told.push(Announcement::Presence);
            }
            frames += told.len();
            out.push((station, told));
            self.advance(station, now);
        }
        out
    }

    fn advance(&mut self, station: Station, now: Instant) {
        let Some(round) = self.rounds.get_mut(&station) else {
            return;
        };
        match GAPS.get(round.number) {
            Some(gap) => {
                round.number += 1;
                round.next = now + *gap;
            }
            None => {
                self.rounds.remove(&station);
            }
        }
    }

    /// When to ask again.
    pub(super) fn next(&self) -> Option<Instant> {
        let next = self.rounds.values().map(|round| round.next).min()?;
        Some(self.refilled.map_or(next, |refilled| next.max(refilled)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use vnic_lb::mac::Mac;

    use super::*;

    fn station(number: u64) -> Station {
        Station {
            mac: Mac::from_u64(0x5254_0000_0000 + number),
            vlan: 0,
        }
    }

    fn seen(number: u64, address: [u8; 4]) -> Snooped {
        Snooped {
            station: station(number),
            address: address.into(),
            router: false,
        }
    }

    /// All that is ever sent, with the time of it.
    fn run(announcer: &mut Announcer, start: Instant) -> Vec<(Duration, Station, Vec<Announcement>)> {
        let mut sent = Vec::new();
        let mut now = start;
        while let Some(next) = announcer.next() {
            now = now.max(next);
            for (station, told) in announcer.due(now) {
                sent.push((now - start, station, told));
            }
        }
        sent
    }

    #[test]
    fn a_station_is_announced_five_times_at_growing_gaps() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        announcer.begin(station(1), start);
        let sent = run(&mut announcer, start);
        let times: Vec<u128> = sent.iter().map(|(at, ..)| at.as_millis()).collect();
        assert_eq!(times, [0, 100, 400, 1_400, 4_400]);
        assert!(sent.iter().all(|(.., told)| *told == [Announcement::Presence]));
    }

    #[test]
    fn each_address_is_announced_and_one_not_heard_of_for_long_is_not() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        announcer.learn(seen(1, [10, 0, 0, 1]), start);
        announcer.learn(seen(1, [10, 0, 0, 2]), start);
        announcer.learn(seen(2, [10, 0, 0, 3]), start);
        let later = start + KEPT;
        let heard = [seen(1, [10, 0, 0, 2]), seen(1, [10, 0, 0, 4])];
        let news = announcer.hear(heard.into_iter(), later);
        assert_eq!(news, [seen(1, [10, 0, 0, 4])], "the other one is known");
        let told = |announcer: &mut Announcer, now| {
            announcer.begin(station(1), now);
            let due = announcer.due(now);
            due.into_iter().map(|(_, told)| told.len()).sum::<usize>()
        };
        assert_eq!(told(&mut announcer, start), 2);
        assert_eq!(announcer.addresses(station(1), later).len(), 1);
        assert_eq!(told(&mut announcer, later), 1);
    }

    #[test]
    fn of_one_station_so_many_addresses_are_kept() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        for number in 0..100 {
            let now = start + Duration::from_millis(number.into());
            announcer.learn(seen(1, [10, 0, 0, number]), now);
        }
        let kept = announcer.addresses(station(1), start);
        assert_eq!(kept.len(), ADDRESSES);
        assert_eq!(kept[0].0, IpAddr::from([10, 0, 0, 84]));
    }

    #[test]
    fn thousands_are_all_announced_once_before_any_is_again_within_the_rate() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        (0..5_000).for_each(|number| announcer.begin(station(number), start));
        let sent = run(&mut announcer, start);
        assert_eq!(sent.len(), 5_000 * 5);
        let first: std::collections::HashSet<_> = sent[..5_000].iter().map(|(_, one, _)| *one).collect();
        assert_eq!(first.len(), 5_000);
        let mut by_tick: HashMap<Duration, usize> = HashMap::new();
        for (at, ..) in &sent {
            *by_tick.entry(*at).or_default() += 1;
        }
        assert!(by_tick.values().all(|frames| *frames <= FRAMES));
        let mut ticks: Vec<Duration> = by_tick.into_keys().collect();
        ticks.sort_unstable();
        assert!(ticks.windows(2).all(|pair| pair[1] - pair[0] >= TICK));
    }

    #[test]
    fn a_forgotten_station_is_not_announced_again() {
        let (mut announcer, start) = (Announcer::default(), Instant::now());
        announcer.learn(seen(1, [10, 0, 0, 1]), start);
        announcer.begin(station(1), start);
        assert_eq!(announcer.due(start).len(), 1);
        announcer.forget(station(1));
        assert_eq!(announcer.next(), None);
        announcer.begin(station(1), start + TICK);
        assert_eq!(
            announcer.due(start + TICK),
            [(station(1), vec![Announcement::Presence])]
        );
    }
}
