//! How a new session gets its NIC.

mod hash;

pub use hash::HashPolicy;

use crate::nics::{NicIndex, NicInfo};
use crate::slots::SlotTable;

/// Live figures of the NICs. They are summed when asked for, so that a policy pays only for what it uses.
pub trait NicLoad {
    /// Live sessions pinned to a NIC.
    fn sessions(&self, nic: NicIndex) -> u64;
}

/// What a policy decides on.
#[derive(Clone, Copy)]
pub struct NewSession<'a> {
    /// The session's slot.
    pub slot: u16,
    /// Who serves each slot.
    pub slots: &'a SlotTable,
    /// Bit i: NIC i is alive.
    pub alive: u32,
    /// The NICs in the order of their index.
    pub nics: &'a [NicInfo],
    /// Live figures of the NICs.
    pub load: &'a dyn NicLoad,
}

/// Chooses the NIC of a session at its first frame; the session table keeps the choice.
pub trait Policy: Send + Sync {
    /// The name in configuration and output.
    fn name(&self) -> &'static str;

    /// An alive NIC for the session; `None` only if none is alive.
    fn choose(&self, session: &NewSession<'_>) -> Option<NicIndex>;
}
