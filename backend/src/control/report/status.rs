//! Answer to `status`.

use serde::{Deserialize, Serialize};

use super::PortState;

/// Answer to `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The daemon's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since its start.
    pub uptime_s: u64,
    /// What the NICs are plugged into; `null` if nothing was said.
    pub topology: Option<String>,
    /// Load-balancing algorithm.
    pub lb: String,
    /// `busy` or `adaptive`.
    pub poll: String,
    /// Datapath threads.
    pub workers: Vec<WorkerSummary>,
    /// Sessions in the table.
    pub sessions: u64,
    /// Most sessions that fit.
    pub session_capacity: u64,
    /// Topology `pinned`; `null` in another one.
    #[serde(default)]
    pub pinned: Option<PinnedReport>,
    /// Ports in the order of the configuration.
    pub ports: Vec<PortSummary>,
    /// NICs in the order of the configuration.
    pub nics: Vec<NicSummary>,
}

/// Topology `pinned` in [`StatusReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedReport {
    /// Guests' addresses, each in one VLAN, that have a NIC.
    pub stations: u64,
    /// The most that there can be.
    pub capacity: u64,
    /// Id of the NIC from which broadcast and multicast are taken; `null`: none is alive.
    pub designated: Option<String>,
    /// Frames that announced where stations are.
    pub announced: u64,
    /// Those for which the NIC had no room; they are repeated as if they had been sent.
    pub unsent: u64,
    /// The first stations.
    pub listed: Vec<StationReport>,
}

/// A station in [`PinnedReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StationReport {
    /// The guest's MAC address.
    pub mac: String,
    /// The VLAN of the tag that its frames have on the wire; 0: none.
    pub vlan: u16,
    /// The port.
    pub port: Option<String>,
    /// Id of its NIC.
    pub nic: String,
    /// Milliseconds since it is that one's.
    pub since_ms: u64,
    /// Id of the NIC before, if there was one.
    pub from: Option<String>,
    /// IP addresses that the guest was seen to have.
    pub addresses: Vec<String>,
}

/// A worker in [`StatusReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSummary {
    /// Number of the worker, from 0.
    pub index: usize,
    /// CPU that it is pinned to; `null`: not pinned.
    pub cpu: Option<usize>,
}

/// A port in [`StatusReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSummary {
    /// Its name.
    pub name: String,
    /// How far its front-end is.
    pub state: PortState,
}

/// A NIC in [`StatusReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSummary {
    /// Its stable id.
    pub id: String,
    /// The interface.
    pub ifname: String,
    /// Whether sessions are sent by it.
    pub alive: bool,
}
