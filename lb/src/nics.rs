//! The NICs as the balancer knows them: a stable id, a weight, and whether they are alive.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::MAX_NICS;

/// Position of a NIC in the daemon's list, `0..MAX_NICS`. Pins hold it; slots are keyed by the stable id instead.
pub type NicIndex = u8;

/// What the balancer must know of one NIC.
#[derive(Debug, Clone, PartialEq)]
pub struct NicInfo {
    /// The operator's `id=`, by default the interface's name. Slots and fallbacks are keyed by it.
    pub id: String,
    /// Relative share of new sessions; 0 drains the NIC.
    pub weight: u32,
}

/// Which NICs can carry frames now. Failover is one store to it.
#[derive(Debug, Default)]
pub struct AliveSet(AtomicU32);

impl AliveSet {
    /// A copy of the bits: bit i is NIC i.
    #[must_use]
    pub fn snapshot(&self) -> u32 {
        // Acquire: whoever sees the new bit also sees what the health code wrote before it.
        self.0.load(Ordering::Acquire)
    }

    /// Marks a NIC alive or dead; returns whether that changed anything.
    pub fn set(&self, nic: NicIndex, alive: bool) -> bool {
        debug_assert!(usize::from(nic) < MAX_NICS);
        let bit = 1u32 << (u32::from(nic) % 32);
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
        self.snapshot() >> (u32::from(nic) % 32) & 1 == 1
    }
}
