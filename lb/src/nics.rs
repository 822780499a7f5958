//! The NICs as the balancer knows them: a stable id, a weight, a speed, and whether they are alive.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::MAX_NICS;

/// Position of a NIC in the daemon's list, `0..MAX_NICS`. Pins hold it; slots are keyed by the stable id instead.
pub type NicIndex = u8;

/// A set of NICs: bit i is NIC i.
pub type NicSet = u32;

/// What the balancer must know of one NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicInfo {
    /// The operator's `id=`, by default the interface's name. Slots and fallbacks are keyed by it.
    pub id: String,
    /// Relative share of new sessions as the operator gave it; 0 drains the NIC. See
    /// [`crate::policy::weights_in_force`] for what counts without it.
    pub weight: Option<u32>,
}

/// A NIC of a running balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicState {
    /// Its index, which stays until it is removed.
    pub nic: NicIndex,
    /// Its id and the operator's weight.
    pub info: NicInfo,
    /// Takes no new sessions until [`crate::balancer::Balancer::undrain`]; its weight is kept meanwhile.
    pub drained: bool,
    /// Link speed in Mb/s, if it was fed in.
    pub speed_mbps: Option<u32>,
    /// Weight that the algorithm in force uses: 0 for a drained NIC.
    pub weight: u32,
}

/// Why the NICs were not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NicError {
    /// Two NICs with one id would share their slots.
    #[error("there is a NIC with the id `{0}` already: give this one another `id=`")]
    DuplicateId(String),
    /// No index is free.
    #[error("{MAX_NICS} NICs are the most: remove one first")]
    NoRoom,
    /// No NIC has that index.
    #[error("there is no NIC with the index {0}")]
    Unknown(NicIndex),
}

/// Which NICs can carry frames now. Failover is one store to it.
#[derive(Debug, Default)]
pub struct AliveSet(AtomicU32);

impl AliveSet {
    /// A copy of the bits: bit i is NIC i.
    #[must_use]
    pub fn snapshot(&self) -> NicSet {
        // Acquire: whoever sees the new bit also sees what the health code wrote before it.
        self.0.load(Ordering::Acquire)
    }

    /// Marks a NIC alive or dead; returns whether that changed anything. There is no NIC beyond [`MAX_NICS`].
    pub fn set(&self, nic: NicIndex, alive: bool) -> bool {
        if usize::from(nic) >= MAX_NICS {
            return false;
        }
        let bit = 1u32 << nic;
        let before = if alive {
            self.0.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.0.fetch_and(!bit, Ordering::AcqRel)
        };
        (before & bit != 0) != alive
    }

    /// Whether one NIC is alive.
    #[must_use]
    pub fn contains(&self, nic: NicIndex) -> bool {
        has(self.snapshot(), nic)
    }
}

/// Whether a set holds a NIC.
pub(crate) const fn has(set: NicSet, nic: NicIndex) -> bool {
    set >> (nic % 32) & 1 == 1
}

/// The members of a set that are NICs, lowest first.
pub(crate) fn members(set: NicSet) -> impl Iterator<Item = NicIndex> + Clone {
    (0u8..8).filter(move |&nic| has(set, nic))
}

const _: () = assert!(
    MAX_NICS == 8,
    "`members` and the three bits of a pin count eight NICs"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nics_are_members() {
        let alive = AliveSet::default();
        assert!(alive.set(3, true) && !alive.set(3, true) && alive.contains(3));
        assert!(!alive.set(8, true) && !alive.set(255, true));
        assert_eq!(alive.snapshot(), 0b1000);
        assert!(alive.set(3, false));
        assert_eq!(members(u32::MAX).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    }
}
