//! Answers to what changes something.

use serde::{Deserialize, Serialize};

use super::Counted;

/// Answer to `lb_set`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlgorithmReport {
    /// What places new sessions now.
    pub algorithm: String,
    /// What did before.
    pub before: String,
}

/// Answer to `nic_add`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicAddedReport {
    /// Its stable id.
    pub id: String,
    /// The interface.
    pub ifname: String,
    /// Queues driven.
    pub queues: u32,
    /// Whether all its sockets are bound without copying.
    pub zero_copy: bool,
}

/// Answer to `nic_remove`, `nic_drain` and `nic_undrain`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSessionsReport {
    /// Its stable id.
    pub id: String,
    /// Sessions (or stations) pinned to it; for one that was removed, those that go on by the others.
    pub sessions: u64,
    /// Which of the two.
    #[serde(default)]
    pub counted: Counted,
}

/// Answer to `nic_set`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicWeightReport {
    /// Its stable id.
    pub id: String,
    /// Relative share of new sessions that is in force.
    pub weight: u32,
    /// The one before.
    pub before: u32,
}

/// Answer to `nic_probe`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicProbeReport {
    /// Its stable id.
    pub id: String,
    /// Who is asked; `null`: nobody.
    pub probe: Option<String>,
    /// Who was asked before.
    pub before: Option<String>,
}
