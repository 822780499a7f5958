//! SEND_RARP: a front-end has its guest announced, after the migration of one that does not announce itself.
//!
//! A request costs nothing when it comes: it is noted for its port, and carried out a frame at a time, in turn with those of other
//! ports and within a budget. One that comes while another of its port waits is the same one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vnic_dataplane::fabric::VlanMode;
use vnic_dataplane::neighbour::announce::Announcement;
use vnic_lb::mac::Mac;
use vnic_lb::pinned::Station;

use super::Daemon;

/// Frames that may be sent in a [`TICK`], for all ports together: 3,200 a second.
const FRAMES: usize = 16;
const TICK: Duration = Duration::from_millis(5);

/// A request, with the first VLAN in which it is still to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    mac: Mac,
    from: u16,
}

/// What front-ends have asked for.
#[derive(Debug, Default)]
pub(super) struct Rarps {
    /// By port.
    waiting: BTreeMap<usize, Request>,
    /// The port whose turn it is, or the next one that waits.
    turn: usize,
    /// When the budget is there again.
    refilled: Option<Instant>,
}

impl Rarps {
    /// Notes a request of a port's front-end.
    pub(super) fn ask(&mut self, port: usize, mac: Mac) {
        let same = |request: &Request| request.mac == mac;
        if !self.waiting.get(&port).is_some_and(same) {
            self.waiting.insert(port, Request { mac, from: 0 });
        }
    }

    /// What is to be sent now. `vlan` tells the first VLAN from a number on in which a port's guest is announced.
    fn due(
        &mut self,
        now: Instant,
        mut vlan: impl FnMut(usize, Mac, u16) -> Option<u16>,
    ) -> Vec<(usize, Station)> {
        let mut due = Vec::new();
        if self.waiting.is_empty() || self.refilled.is_some_and(|refilled| now < refilled) {
            return due;
        }
        self.refilled = Some(now + TICK);
        while due.len() < FRAMES {
            let next = self.waiting.range(self.turn..).next();
            let Some((&port, &Request { mac, from })) = next.or_else(|| self.waiting.first_key_value())
            else {
                break;
            };
            self.turn = port + 1;
            let found = vlan(port, mac, from);
            due.extend(found.map(|vlan| (port, Station { mac, vlan })));
            match found.and_then(|found| vlan(port, mac, found + 1)) {
                Some(from) => self.waiting.insert(port, Request { mac, from }),
                None => self.waiting.remove(&port),
            };
        }
        due
    }

    /// When to ask again.
    fn next(&self) -> Option<Instant> {
        self.refilled.filter(|_| !self.waiting.is_empty())
    }
}

impl Daemon {
    /// Carries out what front-ends have asked for; returns when to come back.
    pub(super) fn send_rarps(&mut self) -> Option<Instant> {
        let mut rarps = std::mem::take(&mut self.rarps);
        let due = rarps.due(Instant::now(), |at, mac, from| self.rarp_vlan(at, mac, from));
        self.rarps = rarps;
        for &(at, station) in &due {
            let sent = self.announce_by_nic(station, Announcement::Presence);
            let stats = &mut self.ports[at].rarp_stats;
            match sent {
                Some(true) => stats.sent += 1,
                Some(false) | None => stats.unsent += 1,
            }
        }
        if !due.is_empty() {
            self.engine.wake();
        }
        self.rarps.next()
    }

    /// The first VLAN from `from` on in which the guest of a port is announced; `None` if there is none, or if the address is not the
    /// guest's.
    fn rarp_vlan(&mut self, at: usize, mac: Mac, from: u16) -> Option<u16> {
        if !self.ports[at].is_connected() {
            // The guest may live elsewhere.
            return None;
        }
        if self.ports[at].mac.is_none() {
            // The guest has said nothing since it came here. What may be learned from it may be from its front-end.
            self.learn(at, mac);
        }
        let port = &mut self.ports[at];
        if port.mac.is_none_or(|(own, _)| own != mac) {
            port.refuse_rarp(mac);
            return None;
        }
        match &port.vlan {
            // Those that it was seen in; a guest that has not started yet is announced when it does.
            _ if self.pinned.is_some() => self.station_vlan(at, from),
            VlanMode::Transparent => (from == 0).then_some(0),
            VlanMode::Access(id) => (from <= *id).then_some(*id),
            VlanMode::Trunk(listed) => listed.first_from(from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(port: usize) -> Mac {
        Mac::from_u64(0x5254_0000_0000 + port as u64)
    }

    /// All that is ever sent, by tick, if the guests of ports are announced in these VLANs.
    fn run(rarps: &mut Rarps, start: Instant, vlans: &[&[u16]]) -> Vec<Vec<(usize, Station)>> {
        let mut ticks = Vec::new();
        let mut now = start;
        loop {
            ticks.push(rarps.due(now, |port, asked, from| {
                assert_eq!(asked, mac(port));
                vlans[port].iter().copied().find(|vlan| *vlan >= from)
            }));
            match rarps.next() {
                Some(next) => now = next,
                None => return ticks,
            }
        }
    }

    #[test]
    fn requests_that_come_faster_than_they_are_carried_out_are_one() {
        let (mut rarps, start) = (Rarps::default(), Instant::now());
        assert_eq!(rarps.next(), None);
        for _ in 0..1_000 {
            rarps.ask(0, mac(0));
        }
        let sent = |vlan| (0, Station { mac: mac(0), vlan });
        assert_eq!(run(&mut rarps, start, &[&[7]]), [vec![sent(7)]]);
        for _ in 0..1_000 {
            rarps.ask(0, mac(0));
            assert_eq!(
                rarps.due(start, |_, _, _| Some(0)),
                [],
                "the budget is not there yet"
            );
        }
        assert_eq!(rarps.next(), Some(start + TICK));
        let later = run(&mut rarps, start + TICK, &[&[0, 4094]]);
        assert_eq!(later, [vec![sent(0), sent(4094)]]);
    }

    #[test]
    fn ports_take_turns_within_the_budget() {
        let (mut rarps, start) = (Rarps::default(), Instant::now());
        let many: Vec<u16> = (1..=1_000).collect();
        let vlans: [&[u16]; 3] = [&many, &[], &many[..2]];
        (0..3).for_each(|port| rarps.ask(port, mac(port)));
        let ticks = run(&mut rarps, start, &vlans);
        assert!(ticks.iter().all(|tick| tick.len() <= FRAMES));
        let first: Vec<_> = ticks[0]
            .iter()
            .take(5)
            .map(|(port, one)| (*port, one.vlan))
            .collect();
        assert_eq!(first, [(0, 1), (2, 1), (0, 2), (2, 2), (0, 3)]);
        let all: Vec<u16> = ticks
            .concat()
            .iter()
            .filter(|(port, _)| *port == 0)
            .map(|(_, one)| one.vlan)
            .collect();
        assert_eq!(all, many);
        assert_eq!(ticks.concat().len(), 1_002);
    }
}
