//! Topology `pinned`: the NICs are plugged into independent switch ports, so a guest's address belongs to one of them at a
//! time, and what is balanced are (MAC, VLAN)s instead of sessions. The same algorithms, weights, drains and slow start
//! apply, with stations in the place of sessions.
//!
//! Workers look at a [`View`]. The control thread assigns stations as guests' addresses become known, and calls
//! [`Stations::settle`] after each change of the NICs that are alive: what it returns has to be announced from the new NIC
//! (gratuitous ARP, unsolicited NA, RARP), or the switches go on sending to the old one. Until then workers use the same NIC
//! that it will settle on, so that failover does not wait for it.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::balancer::Balancer;
use crate::key::SessionKey;
use crate::mac::Mac;
use crate::nics::{NicIndex, NicSet, has};
use crate::plan::Plan;
use crate::policy::Loads;
use crate::table::elapsed_ms;
use crate::{MAX_NICS, Millis};

/// How long frames for a moved station are still accepted from its old NIC: until the switches have learned.
pub const GRACE_MS: Millis = 1_000;
/// Most stations; others go by their slots and are not announced. A guest on a trunk can make thousands.
pub const MAX_STATIONS: usize = 16_384;

/// A guest's address in a VLAN: what a switch learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Station {
    /// The address.
    pub mac: Mac,
    /// VLAN id as on the wire; 0 without a tag.
    pub vlan: u16,
}

impl Station {
    fn key(self) -> SessionKey {
        SessionKey::of_link(0, self.mac.to_u64(), [self.vlan, 0], 0)
    }
}

/// A station that is another NIC's from now on: to be announced there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Which one.
    pub station: Station,
    /// Where it was.
    pub from: NicIndex,
    /// Where it is.
    pub to: NicIndex,
}

/// A station and its NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The station.
    pub station: Station,
    /// Its NIC, dead or alive.
    pub nic: NicIndex,
    /// Where it was before, and when it moved.
    pub moved: Option<(NicIndex, Millis)>,
}

/// Whether a received frame is for the guests, or a copy that a switch flooded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// It is theirs.
    Yes,
    /// It is the same frame that another NIC gets: drop and count it.
    OtherNic,
}

/// All stations and their NICs. Shared by all workers.
pub struct Stations {
    balancer: Arc<Balancer>,
    /// Ordered by station.
    pins: ArcSwap<Vec<Pin>>,
    /// Held by whoever changes pins; no worker does.
    changes: Mutex<()>,
}

/// The pins during one burst.
pub struct View {
    pins: Guard<Arc<Vec<Pin>>>,
    plan: Guard<Arc<Plan>>,
    alive: NicSet,
}

impl Stations {
    /// Without stations. The balancer's NICs, algorithm and weights are used.
    #[must_use]
    pub fn new(balancer: Arc<Balancer>) -> Stations {
        Stations {
            balancer,
            pins: ArcSwap::default(),
            changes: Mutex::new(()),
        }
    }

    /// What workers look at, once a burst; never waits.
    #[must_use]
    pub fn view(&self) -> View {
        let plan = self.balancer.plan();
        View {
            alive: self.balancer.alive().snapshot() & plan.present,
            pins: self.pins.load(),
            plan,
        }
    }

    /// The stations and their NICs.
    #[must_use]
    pub fn list(&self) -> Vec<Pin> {
        self.pins.load().to_vec()
    }

    /// Gives a station a NIC by the algorithm in force and returns it; one that has a NIC keeps it. `None`: no NIC is
    /// alive, or there are [`MAX_STATIONS`]; then the station goes by its slot.
    pub fn assign(&self, station: Station, now: Millis) -> Option<NicIndex> {
        self.change(|pins, view| {
            let at = match pins.binary_search_by_key(&station, |pin| pin.station) {
                Ok(at) => return pins.get(at).map(|pin| pin.nic),
                Err(at) => at,
            };
            if pins.len() >= MAX_STATIONS {
                return None;
            }
            let slot = view.plan.slots.slot(&station.key());
            let nic = self
                .balancer
                .choose_for(&view.plan, slot, false, (view.alive, now), &loads(pins))?;
            let moved = None;
            pins.insert(at, Pin { station, nic, moved });
            Some(nic)
        })
    }

    /// Forgets a station: its guest has gone. Returns whether there was one.
    pub fn forget(&self, station: Station) -> bool {
        self.change(|pins, _| {
            let at = pins.binary_search_by_key(&station, |pin| pin.station);
            at.map(|at| pins.remove(at)).is_ok()
        })
    }

    /// Moves the stations whose NIC is dead or gone to the first NIC of their slot that is alive, and says which. While none
    /// is alive they stay. A NIC that comes back gets none: they have been announced elsewhere.
    #[must_use = "the moves have to be announced"]
    pub fn settle(&self, now: Millis) -> Vec<Move> {
        self.relocate(now, |view, nic| !has(view.alive, nic))
    }

    /// Moves the stations of a NIC that is to be removed. Call it after [`Balancer::drain`], or they would come back.
    #[must_use = "the moves have to be announced"]
    pub fn evacuate(&self, nic: NicIndex, now: Millis) -> Vec<Move> {
        self.relocate(now, |_, pinned| pinned == nic)
    }

    fn relocate(&self, now: Millis, must_go: impl Fn(&View, NicIndex) -> bool) -> Vec<Move> {
        self.change(|pins, view| {
            let mut moves = Vec::new();
            for pin in pins.iter_mut().filter(|pin| must_go(view, pin.nic)) {
                let elsewhere = view.alive & !(1 << pin.nic);
                let Some(to) = view.by_slot(pin.station, elsewhere) else {
                    continue;
                };
                let (station, from) = (pin.station, pin.nic);
                (pin.nic, pin.moved) = (to, Some((from, now)));
                moves.push(Move { station, from, to });
            }
            moves
        })
    }

    /// Changes the pins and publishes them.
    fn change<T>(&self, change: impl FnOnce(&mut Vec<Pin>, &View) -> T) -> T {
        let _held = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let view = self.view();
        let mut pins = view.pins.to_vec();
        let result = change(&mut pins, &view);
        if pins != **view.pins {
            self.pins.store(Arc::new(pins));
        }
        result
    }
}

impl View {
    fn pin(&self, station: Station) -> Option<&Pin> {
        let at = self.pins.binary_search_by_key(&station, |pin| pin.station);
        at.ok().and_then(|at| self.pins.get(at))
    }

    fn by_slot(&self, station: Station, alive: NicSet) -> Option<NicIndex> {
        let slots = &self.plan.slots;
        slots.choose(slots.slot(&station.key()), alive)
    }

    /// The NIC of a station's frames, broadcast and multicast ones too; `None` if no NIC is alive.
    #[must_use]
    pub fn steer(&self, station: Station) -> Option<NicIndex> {
        match self.pin(station) {
            Some(pin) if has(self.alive, pin.nic) => Some(pin.nic),
            _ => self.by_slot(station, self.alive),
        }
    }

    /// The one NIC from which broadcast and multicast frames are accepted: the lowest that is alive.
    #[must_use]
    pub fn designated(&self) -> Option<NicIndex> {
        (0u8..).take(MAX_NICS).find(|&nic| has(self.alive, nic))
    }

    /// Whether a frame that came by a NIC for `dst` is to be taken.
    #[must_use]
    pub fn accept(&self, nic: NicIndex, dst: Station, now: Millis) -> Accept {
        let is_mine = if dst.mac.is_group() {
            self.designated() == Some(nic)
        } else {
            // What is still in the ring of a NIC that died was sent to it alone.
            let pinned = self.pin(dst);
            let moved = pinned.and_then(|pin| pin.moved);
            pinned.is_some_and(|pin| pin.nic == nic)
                || self.steer(dst) == Some(nic)
                || moved.is_some_and(|(from, at)| from == nic && elapsed_ms(now, at) < GRACE_MS)
        };
        if is_mine { Accept::Yes } else { Accept::OtherNic }
    }
}

/// Stations of each NIC, as the algorithms count sessions.
fn loads(pins: &[Pin]) -> Loads {
    let mut loads = Loads::default();
    pins.iter().for_each(|pin| loads.place(pin.nic, false));
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balancer::BalancerConfig;
    use crate::nics::NicInfo;
    use crate::policy::Algorithm;

    fn stations(nics: u8, algorithm: Algorithm) -> Stations {
        let info = |nic| NicInfo {
            id: format!("nic{nic}"),
            weight: None,
        };
        let balancer = Balancer::new(&BalancerConfig {
            nics: (0..nics).map(info).collect(),
            algorithm,
            session_capacity: 16,
            workers: 1,
            hash_key: [7; 16],
        });
        (0..nics).for_each(|nic| {
            balancer.set_alive(nic, true, 0);
        });
        Stations::new(balancer)
    }

    fn station(number: u8, vlan: u16) -> Station {
        Station {
            mac: Mac([0x52, 0x54, 0, 0, 0, number]),
            vlan,
        }
    }

    fn counts(stations: &Stations) -> [usize; MAX_NICS] {
        let mut counts = [0; MAX_NICS];
        stations
            .list()
            .iter()
            .for_each(|pin| counts[usize::from(pin.nic)] += 1);
        counts
    }

    #[test]
    fn stations_are_dealt_by_the_algorithm_and_keep_their_nic() {
        let even = stations(4, Algorithm::LeastConn);
        for number in 0..100 {
            let nic = even.assign(station(number, 0), 0);
            assert_eq!(even.view().steer(station(number, 0)), nic);
            assert_eq!(even.assign(station(number, 0), 1), nic, "again");
        }
        assert_eq!(counts(&even)[..4], [25; 4]);
        let hashed = stations(4, Algorithm::Hash);
        for number in 0..100 {
            let before = hashed.view().steer(station(number, 7));
            assert_eq!(
                hashed.assign(station(number, 7), 0),
                before,
                "by its slot before and after"
            );
        }
        assert!(counts(&hashed)[..4].iter().all(|&count| count > 10));
    }

    #[test]
    fn a_mac_in_another_vlan_is_another_station() {
        let stations = stations(2, Algorithm::LeastConn);
        let nics = [1, 2].map(|vlan| stations.assign(station(9, vlan), 0).unwrap());
        assert_ne!(nics[0], nics[1]);
        assert!(stations.forget(station(9, 1)) && !stations.forget(station(9, 1)));
        assert_eq!(stations.list().len(), 1);
    }

    #[test]
    fn only_stations_of_a_dead_nic_move_and_they_stay_where_they_went() {
        let stations = stations(4, Algorithm::Hash);
        (0..200).for_each(|number| {
            stations.assign(station(number, 0), 0);
        });
        let before = stations.list();
        let lost = counts(&stations)[2];
        stations.balancer.set_alive(2, false, 10);
        let during: Vec<_> = before
            .iter()
            .map(|pin| stations.view().steer(pin.station))
            .collect();
        let moves = stations.settle(20);
        assert_eq!(moves.len(), lost);
        for (pin, worker) in before.iter().zip(&during) {
            let nic = stations.view().steer(pin.station);
            assert_eq!(nic, *worker, "workers did not wait for it");
            let told = moves.iter().find(|one| one.station == pin.station);
            assert_eq!(told.is_some(), pin.nic == 2);
            assert!(told.is_none_or(|told| told.from == 2 && Some(told.to) == nic));
        }
        assert_eq!(stations.settle(21), [], "they are where they should be");
        stations.balancer.set_alive(2, true, 30);
        assert_eq!(stations.settle(30), []);
        assert_eq!(counts(&stations)[2], 0);
    }

    #[test]
    fn with_no_nic_alive_pins_stay() {
        let stations = stations(2, Algorithm::Hash);
        let nic = stations.assign(station(1, 0), 0).unwrap();
        (0..2).for_each(|nic| {
            stations.balancer.set_alive(nic, false, 1);
        });
        assert_eq!(
            (stations.settle(2), stations.view().steer(station(1, 0))),
            (vec![], None)
        );
        assert_eq!(stations.assign(station(2, 0), 2), None);
        assert_eq!(stations.view().designated(), None);
        stations.balancer.set_alive(nic, true, 3);
        assert_eq!(stations.settle(3), []);
        assert_eq!(stations.view().steer(station(1, 0)), Some(nic));
    }

    #[test]
    fn a_drained_nic_is_evacuated() {
        let stations = stations(2, Algorithm::Hash);
        (0..50).for_each(|number| {
            stations.assign(station(number, 0), 0);
        });
        stations.balancer.drain(0).unwrap();
        let moves = stations.evacuate(0, 5);
        assert!(moves.len() > 10 && moves.iter().all(|one| (one.from, one.to) == (0, 1)));
        assert_eq!(counts(&stations)[..2], [0, 50]);
        assert_eq!(stations.assign(station(77, 0), 6), Some(1));
        stations.balancer.set_alive(1, false, 7);
        assert_eq!(stations.settle(8).len(), 51, "a drained NIC is better than none");
    }

    #[test]
    fn unicast_is_taken_from_its_nic_only_and_from_the_old_one_for_a_while() {
        let stations = stations(3, Algorithm::LeastConn);
        let one = station(1, 5);
        let home = stations.assign(one, 0).unwrap();
        let taken_from = |now| {
            let view = stations.view();
            (0u8..3)
                .filter(|&nic| view.accept(nic, one, now) == Accept::Yes)
                .collect::<Vec<_>>()
        };
        assert_eq!(taken_from(0), [home]);
        stations.balancer.set_alive(home, false, 100);
        let heir = stations.view().steer(one).unwrap();
        let mut both = vec![home, heir];
        both.sort_unstable();
        assert_eq!(
            taken_from(101),
            both,
            "what is still in its ring, and what comes by the other"
        );
        assert_eq!(stations.settle(110).len(), 1);
        assert_eq!(taken_from(110 + GRACE_MS - 1), both);
        assert_eq!(taken_from(110 + GRACE_MS), [heir]);
    }

    #[test]
    fn broadcast_is_taken_from_one_nic() {
        let stations = stations(3, Algorithm::Hash);
        let everyone = Station {
            mac: Mac::BROADCAST,
            vlan: 5,
        };
        let taken_from = || {
            let view = stations.view();
            (0u8..3)
                .filter(|&nic| view.accept(nic, everyone, 0) == Accept::Yes)
                .collect::<Vec<_>>()
        };
        assert_eq!(taken_from(), [0]);
        stations.balancer.set_alive(0, false, 1);
        assert_eq!(taken_from(), [1]);
        stations.balancer.set_alive(0, true, 2);
        assert_eq!(taken_from(), [0]);
    }

    #[test]
    fn there_is_an_end_to_stations() {
        let stations = stations(2, Algorithm::Hash);
        let of = |number: u64| Station {
            mac: Mac::from_u64(0x5254_0000_0000 + number),
            vlan: 0,
        };
        let pins = (0..MAX_STATIONS as u64).map(|number| Pin {
            station: of(number),
            nic: 0,
            moved: None,
        });
        stations.pins.store(Arc::new(pins.collect()));
        let beyond = of(MAX_STATIONS as u64);
        assert_eq!(stations.assign(beyond, 0), None);
        assert!(stations.view().steer(beyond).is_some(), "by its slot");
    }
}
