//! Topology `pinned`: the NICs are plugged into independent switch ports, so a guest's address belongs to one of them at a
//! time, and what is balanced are (MAC, VLAN)s instead of sessions. The same algorithms, weights, drains and slow start
//! apply, with stations in the place of sessions.
//!
//! Workers look at a [`View`]. The control thread assigns stations as guests' addresses become known, and calls
//! [`Stations::settle`] after each change of the NICs that are alive: what it returns has to be announced from the new NIC
//! (gratuitous ARP, unsolicited NA, RARP), or the switches go on sending to the old one. Until then workers use the same NIC
//! that it will settle on, so that failover does not wait for it. In the same way a station that nobody has assigned yet goes
//! by its slot.

#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::balancer::{Balancer, Explanation};
use crate::key::SessionKey;
use crate::mac::Mac;
use crate::nics::{NicIndex, NicSet, has, members};
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
    /// Since when.
    pub since: Millis,
    /// The NIC that its frames left by before, if that was another one.
    pub from: Option<NicIndex>,
    /// Whether [`GRACE_MS`] may not be over yet. `since` alone does not tell: its clock wraps.
    pub is_fresh: bool,
}

impl Pin {
    /// Milliseconds since the station is its NIC's.
    #[must_use]
    pub fn age_ms(&self, now: Millis) -> Millis {
        elapsed_ms(now, self.since)
    }
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
    /// The NIC that group frames were last accepted from, or [`NOBODY`].
    designated: AtomicU8,
    /// Held by whoever changes pins; no worker does.
    changes: Mutex<()>,
}

/// No NIC, in [`Stations::designated`].
const NOBODY: u8 = u8::MAX;

/// The pins during one burst.
pub struct View {
    pins: Guard<Arc<Vec<Pin>>>,
    plan: Guard<Arc<Plan>>,
    alive: NicSet,
    designated: Option<NicIndex>,
}

impl Stations {
    /// Without stations. The balancer's NICs, algorithm and weights are used.
    #[must_use]
    pub fn new(balancer: Arc<Balancer>) -> Stations {
        Stations {
            balancer,
            pins: ArcSwap::default(),
            designated: AtomicU8::new(NOBODY),
            changes: Mutex::new(()),
        }
    }

    /// What workers look at, once a burst; never waits.
    #[must_use]
    pub fn view(&self) -> View {
        let plan = self.balancer.plan();
        let alive = self.balancer.usable() & plan.present;
        let last = self.designated.load(Relaxed);
        let keeps = last != NOBODY && has(alive, last);
        View {
            alive,
            designated: if keeps { Some(last) } else { members(alive).next() },
            pins: self.pins.load(),
            plan,
        }
    }

    /// The balancer whose NICs, algorithm and weights are used.
    #[must_use]
    pub fn balancer(&self) -> &Arc<Balancer> {
        &self.balancer
    }

    /// Stations of each NIC.
    #[must_use]
    pub fn per_nic(&self) -> [u64; MAX_NICS] {
        loads(&self.pins.load()).sessions
    }

    /// In the place of [`Balancer::tick`], for stations are what `adaptive` is to even out.
    pub fn tick(&self, now: Millis) {
        let is_over = |pin: &Pin| pin.is_fresh && pin.age_ms(now) >= GRACE_MS;
        if self.pins.load().iter().any(is_over) {
            self.change(|pins, _| {
                for pin in pins.iter_mut().filter(|pin| is_over(pin)) {
                    pin.is_fresh = false;
                }
            });
        }
        self.balancer.tick_for(now, &self.per_nic());
    }

    /// What would become of a frame of a station now, and why. Changes nothing.
    #[must_use]
    pub fn explain(&self, station: Station, now: Millis) -> Explanation {
        let pins = self.pins.load();
        let pin = pins.iter().find(|pin| pin.station == station);
        let pin = pin.map(|pin| (pin.nic, pin.age_ms(now), pin.from.is_some()));
        self.balancer
            .explain_station(now, &station.key(), pin, &loads(&pins))
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
            // Its frames went by its slot until now, and answers may be under way to there.
            let from = view.by_slot(station, view.alive).filter(|&before| before != nic);
            let pin = Pin {
                station,
                nic,
                since: now,
                from,
                is_fresh: from.is_some(),
            };
            pins.insert(at, pin);
            Some(nic)
        })
    }

    /// Forgets stations, at once: their guest has gone. Returns how many of them there were.
    pub fn forget(&self, gone: &[Station]) -> usize {
        let mut gone = gone.to_vec();
        gone.sort_unstable();
        self.change(|pins, _| {
            let before = pins.len();
            pins.retain(|pin| gone.binary_search(&pin.station).is_err());
            before - pins.len()
        })
    }

    /// Moves the stations whose NIC is dead or gone to the first NIC of their slot that is alive, and says which. While none
    /// is alive they stay. A NIC that comes back gets none: they have been announced elsewhere.
    #[must_use = "the moves have to be announced"]
    pub fn settle(&self, now: Millis) -> Vec<Move> {
        self.designated
            .store(self.view().designated.unwrap_or(NOBODY), Relaxed);
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
                (pin.nic, pin.since, pin.from, pin.is_fresh) = (to, now, Some(from), true);
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
    /// The station's pin; `None`: nobody has assigned it yet.
    #[must_use]
    pub fn pin(&self, station: Station) -> Option<&Pin> {
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

    /// The one NIC from which broadcast and multicast frames are accepted. It stays that while it is alive: at each change a
    /// frame that is under way may be taken twice or not at all, and the switch's port of a NIC that has come back may not
    /// forward yet.
    #[must_use]
    pub fn designated(&self) -> Option<NicIndex> {
        self.designated
    }

    /// Whether a frame that came by a NIC for `dst` is to be taken.
    #[must_use]
    pub fn accept(&self, nic: NicIndex, dst: Station, now: Millis) -> Accept {
        let is_mine = if dst.mac.is_group() {
            self.designated() == Some(nic)
        } else {
            // What is still in the ring of a NIC that died was sent to it alone.
            let late = |pin: &Pin| pin.is_fresh && pin.from == Some(nic) && pin.age_ms(now) < GRACE_MS;
            self.pin(dst).is_some_and(|pin| pin.nic == nic || late(pin)) || self.steer(dst) == Some(nic)
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
