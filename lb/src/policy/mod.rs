//! How a new session gets its NIC.

mod adaptive;
mod least_conn;

use std::fmt;
use std::str::FromStr;

pub(crate) use self::adaptive::NicCost;
use crate::MAX_NICS;
use crate::nics::{NicIndex, NicSet, NicState, has, members};
use crate::slots::{SLOTS, SlotTable};

/// Time for which a NIC that came back gets at most twice its fair share of the new sessions.
pub const SLOW_START_MS: u32 = 10_000;

/// The algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Algorithm {
    /// The session's slot decides: the same answer with a full table, after a restart, and on another host with the
    /// same hash key.
    #[default]
    Hash,
    /// The NIC with the fewest sessions for its weight.
    LeastConn,
    /// The session's slot, with slots dealt by weight or, where no weights were given, by link speed.
    Weighted,
    /// The NIC with the lowest latency for its idle capacity; long-lived heavy sessions are moved when they pause.
    Adaptive,
}

/// No algorithm has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no balancing algorithm: give hash, least_conn, weighted or adaptive")]
pub struct AlgorithmError(String);

impl Algorithm {
    /// All of them.
    pub const ALL: [Algorithm; 4] = [
        Algorithm::Hash,
        Algorithm::LeastConn,
        Algorithm::Weighted,
        Algorithm::Adaptive,
    ];

    /// The name in configuration and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Hash => "hash",
            Algorithm::LeastConn => "least_conn",
            Algorithm::Weighted => "weighted",
            Algorithm::Adaptive => "adaptive",
        }
    }

    /// Whether the choice depends on what the NICs carry now, and not on the slots alone.
    pub(crate) const fn uses_load(self) -> bool {
        matches!(self, Algorithm::LeastConn | Algorithm::Adaptive)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = AlgorithmError;

    fn from_str(text: &str) -> Result<Algorithm, AlgorithmError> {
        let found = Algorithm::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| AlgorithmError(text.to_owned()))
    }
}

/// Sessions of each NIC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Loads {
    /// Pinned to the NIC, half-open ones included.
    pub sessions: [u64; MAX_NICS],
    /// Of these, TCP sessions that have shown nothing but a SYN.
    pub half_open: [u64; MAX_NICS],
}

impl Loads {
    /// Counts a session that is about to be pinned.
    pub(crate) fn place(&mut self, nic: NicIndex, opening: bool) {
        let at = usize::from(nic) % MAX_NICS;
        self.sessions[at] += 1;
        self.half_open[at] += u64::from(opening);
    }
}

/// What a decision depends on.
#[derive(Clone, Copy)]
pub(crate) struct NewSession<'a> {
    pub slot: u16,
    pub slots: &'a SlotTable,
    /// NICs that are alive.
    pub alive: NicSet,
    /// Of these, the ones in slow start.
    pub warming: NicSet,
    /// Weights in force, by index.
    pub weights: &'a [u32; MAX_NICS],
    /// The session begins with a SYN, which anybody can send.
    pub opening: bool,
    pub loads: &'a Loads,
}

impl NewSession<'_> {
    /// NICs that may take the session: alive, not drained unless all are, and within their share if in slow start.
    fn candidates(&self) -> NicSet {
        let weight = |nic: NicIndex| u64::from(self.weights[usize::from(nic)]);
        let undrained = members(self.alive)
            .filter(|&nic| weight(nic) != 0)
            .fold(0, |set, nic| set | 1 << nic);
        if undrained == 0 {
            return self.alive;
        }
        if self.warming & undrained == 0 {
            return undrained;
        }
        // In slow start a NIC may take the sessions of as many slots as are twice its share: the slots that it serves first,
        // which are its share and where it goes before its equals, and nearly as many of the others (a sixteenth fewer,
        // since both are its share only more or less). For the others, the slots are a circle, in an order that an odd
        // factor makes of their numbers, and each NIC's part of it begins where the fair share of the one before ends.
        let total: u64 = members(undrained).map(weight).sum();
        let own = self.slots.choose(self.slot, undrained);
        let place = u64::from(self.slot.wrapping_mul(0x9e35));
        let (mut before, mut admitted) = (0, 0);
        for nic in members(undrained) {
            let start = before * SLOTS as u64 / total;
            let distance = (place + SLOTS as u64 - start) % SLOTS as u64;
            let others = (weight(nic) * SLOTS as u64 * 15 / 16)
                .checked_div(total - weight(nic))
                .unwrap_or(0);
            if !has(self.warming, nic) || own == Some(nic) || distance < others {
                admitted |= 1 << nic;
            }
            before += weight(nic);
        }
        admitted
    }

    /// Candidates in the order in which they serve the slot, so that equals are shared out evenly.
    fn in_order(&self) -> impl Iterator<Item = NicIndex> + Clone {
        let candidates = self.candidates();
        let order: [Option<NicIndex>; MAX_NICS] = {
            let mut order = self.slots.order(self.slot);
            std::array::from_fn(|_| order.next())
        };
        order
            .into_iter()
            .flatten()
            .filter(move |&nic| has(candidates, nic))
    }

    fn weight(&self, nic: NicIndex) -> f64 {
        // With every NIC drained all count the same.
        f64::from(self.weights[usize::from(nic)].max(1))
    }
}

/// The NIC of a new session: the choice that the session table then keeps. `None` only if no NIC is alive.
pub(crate) fn choose(
    algorithm: Algorithm,
    session: &NewSession<'_>,
    cost: impl Fn(NicIndex) -> NicCost,
) -> Option<NicIndex> {
    let chosen = match algorithm {
        Algorithm::Hash | Algorithm::Weighted => None,
        Algorithm::LeastConn => least_conn::choose(session),
        Algorithm::Adaptive => adaptive::choose(session, cost),
    };
    chosen.or_else(|| session.slots.choose(session.slot, session.alive))
}

/// The weight of each NIC for an algorithm, by index; 0 for one that is drained.
///
/// `hash` goes by the operator's weights only, 1 where there is none, so that it gives the same answer on a
/// host with other links. The others go by the link speeds unless an operator gave a weight other than 0: then NICs without
/// one have 1. An unknown speed counts as the lowest one that is known.
#[must_use]
pub fn weights_in_force(algorithm: Algorithm, nics: &[NicState]) -> [u32; MAX_NICS] {
    let by_speed = algorithm != Algorithm::Hash
        && nics
            .iter()
            .all(|nic| nic.info.weight.is_none_or(|weight| weight == 0));
    let slowest = nics.iter().filter_map(|nic| nic.speed_mbps).min().unwrap_or(1);
    let mut weights = [0; MAX_NICS];
    for nic in nics.iter().filter(|nic| !nic.drained) {
        let unset = if by_speed {
            nic.speed_mbps.unwrap_or(slowest).max(1)
        } else {
            1
        };
        if let Some(weight) = weights.get_mut(usize::from(nic.nic)) {
            *weight = nic.info.weight.unwrap_or(unset);
        }
    }
    weights
}

#[cfg(test)]
mod tests;
