//! Which NIC a session uses or would use, and why.

use std::fmt;

use super::{Balancer, is_alive};
use crate::key::SessionKey;
use crate::nics::{NicIndex, NicSet, NicState, has};
use crate::parse::{Class, Parsed};
use crate::plan::Plan;
use crate::policy::{Algorithm, Loads};
use crate::signals::{NicFigures, names};
use crate::table::elapsed_ms;
use crate::{Clock, Millis};

/// All that decides where a frame goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The session's key, or what is hashed for a frame without a session.
    pub key: SessionKey,
    /// The algorithm in force.
    pub algorithm: Algorithm,
    /// The slot that the key hashes to.
    pub slot: u16,
    /// The slot's NICs in the order in which they serve it: the primary, then the fallbacks.
    pub order: Vec<NicIndex>,
    /// The NIC that the session is pinned to, dead or alive; `None` without an entry in the table.
    pub pinned: Option<NicIndex>,
    /// How long ago the session was pinned at first, in milliseconds.
    pub pinned_ms: Option<Millis>,
    /// Whether it has been on another NIC since.
    pub has_moved: bool,
    /// The NIC that it is asked to move to when it pauses.
    pub moves_to: Option<NicIndex>,
    /// The NIC that the next frame leaves by; `None` if none is alive.
    pub choice: Option<NicIndex>,
    /// Why that one.
    pub reason: Reason,
    /// Ids of the NICs that are alive.
    pub alive: Vec<String>,
    /// Each NIC's part in it.
    pub nics: Vec<NicExplained>,
}

/// One NIC's part in a decision.
#[derive(Debug, Clone, PartialEq)]
pub struct NicExplained {
    /// Index, id, weights and link speed.
    pub state: NicState,
    /// Whether it can carry frames now.
    pub alive: bool,
    /// Whether it came back lately, and so gets at most twice its fair share.
    pub warming: bool,
    /// Sessions, or stations in topology `pinned`, that are pinned to it.
    pub sessions: u64,
    /// Of these, TCP sessions that have shown nothing but a SYN.
    pub half_open: u64,
    /// What `adaptive` goes by; all zero until it has been in force.
    pub figures: NicFigures,
}

/// Why a frame leaves by a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The session is pinned to it.
    Pinned,
    /// The session's own NIC is dead; this one is the slot's first fallback that is alive.
    Fallback,
    /// A new session: the slot's first NIC that is alive.
    Slot,
    /// A new session: the algorithm prefers it for what the NICs carry now.
    Load,
    /// No session, so the slot decides.
    Stateless,
    /// No NIC is alive; pins are kept.
    NoneAlive,
    /// Topology `pinned`: the station is pinned to it.
    StationPinned,
    /// Topology `pinned`: the station's own NIC is dead; this one is its slot's first that is alive.
    StationFallback,
    /// Topology `pinned`: nobody has assigned the station yet.
    StationSlot,
}

impl fmt::Display for Reason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Reason::Pinned => "the session is pinned to it",
            Reason::Fallback => {
                "the session's NIC is not alive, and this is its slot's first fallback that is"
            }
            Reason::Slot => "new session: its slot's first NIC that is alive",
            Reason::Load => "new session: the lowest cost of the NICs that may take it",
            Reason::Stateless => "no session: its slot's first NIC that is alive",
            Reason::NoneAlive => "no NIC is alive",
            Reason::StationPinned => "the station is pinned to it",
            Reason::StationFallback => {
                "the station's NIC is not alive, and this is its slot's first fallback that is"
            }
            Reason::StationSlot => "no such station yet: its slot's first NIC that is alive",
        })
    }
}

impl Balancer {
    /// What would become of a frame from a guest now, and why. Changes nothing.
    #[must_use]
    pub fn explain(&self, now: impl Into<Clock>, parsed: &Parsed) -> Explanation {
        let now = now.into();
        let (turn, plan) = (self.turn(0, now), self.plan.load());
        let slot = plan.slots.slot(parsed.key());
        let stored = match parsed.class() {
            Class::LaterFragment => self.table.lookup(&parsed.fragment_key()).hit,
            _ => parsed.session_key().and_then(|key| self.table.lookup(key).hit),
        };
        let by_slot = plan.slots.choose(slot, turn.alive);
        let (choice, reason) = match (stored.map(|hit| hit.meta.nic()), parsed.class()) {
            _ if by_slot.is_none() => (None, Reason::NoneAlive),
            (Some(nic), _) if is_alive(turn.alive, nic) => (Some(nic), Reason::Pinned),
            (Some(_), _) => (by_slot, Reason::Fallback),
            (None, Class::Session | Class::FirstFragment) if plan.algorithm.uses_load() => {
                (turn.choose(parsed), Reason::Load)
            }
            (None, Class::Session | Class::FirstFragment) => (by_slot, Reason::Slot),
            (None, _) => (by_slot, Reason::Stateless),
        };
        Explanation {
            key: *parsed.key(),
            algorithm: plan.algorithm,
            slot,
            order: plan.slots.order(slot).collect(),
            pinned: stored.map(|hit| hit.meta.nic()),
            has_moved: stored.is_some_and(|hit| hit.meta.has_moved()),
            moves_to: stored.and_then(|hit| hit.meta.target()),
            pinned_ms: stored
                .and_then(|hit| self.table.read(&hit))
                .map(|entry| elapsed_ms(now.millis, entry.created)),
            choice,
            reason,
            alive: names(&plan.nics, turn.alive),
            nics: self.explain_nics(&plan, turn.alive, now.millis, &self.counters.loads()),
        }
    }

    /// The same for a station with `key` and `pin`: its NIC, for how many milliseconds, and whether it was on another one before.
    pub(crate) fn explain_station(
        &self,
        now: Millis,
        key: &SessionKey,
        pin: Option<(NicIndex, Millis, bool)>,
        loads: &Loads,
    ) -> Explanation {
        let (plan, alive) = (self.plan.load(), self.usable());
        let slot = plan.slots.slot(key);
        let by_slot = plan.slots.choose(slot, alive & plan.present);
        let (choice, reason) = match pin {
            _ if by_slot.is_none() => (None, Reason::NoneAlive),
            Some((nic, ..)) if is_alive(alive, nic) => (Some(nic), Reason::StationPinned),
            Some(_) => (by_slot, Reason::StationFallback),
            None => (by_slot, Reason::StationSlot),
        };
        Explanation {
            key: *key,
            algorithm: plan.algorithm,
            slot,
            order: plan.slots.order(slot).collect(),
            pinned: pin.map(|(nic, ..)| nic),
            pinned_ms: pin.map(|(_, ms, _)| ms),
            has_moved: pin.is_some_and(|(.., moved)| moved),
            moves_to: None,
            choice,
            reason,
            alive: names(&plan.nics, alive),
            nics: self.explain_nics(&plan, alive, now, loads),
        }
    }

    fn explain_nics(&self, plan: &Plan, alive: NicSet, now: Millis, loads: &Loads) -> Vec<NicExplained> {
        let warming = self.warming(now);
        let explained = |state: &NicState| {
            let at = usize::from(state.nic);
            NicExplained {
                alive: is_alive(alive, state.nic),
                warming: has(warming, state.nic),
                sessions: loads.sessions[at],
                half_open: loads.half_open[at],
                figures: self.signals.figures(state.nic, loads.sessions[at]),
                state: state.clone(),
            }
        };
        plan.nics.iter().map(explained).collect()
    }
}
