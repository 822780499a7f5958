//! What the daemon reports. Counters count from the daemon's start and never go back; `bytes` are those of Ethernet frames
//! without virtio header and FCS. "Guest TX" is what guests send, "guest RX" what they receive.

mod changes;
mod stats;
mod status;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::changes::{
    AlgorithmReport, NicAddedReport, NicProbeReport, NicSessionsReport, NicWeightReport,
};
pub use self::stats::{
    BalancerReport, FrameMemoryReport, NicQueueStats, NicStats, PortStats, QueuePairStats, RarpStats,
    StatsReport, WorkerStats,
};
pub use self::status::{NicSummary, PinnedReport, PortSummary, StationReport, StatusReport, WorkerSummary};

/// Dropped frames by reason; a reason that never happened may be left out.
pub type Drops = BTreeMap<String, u64>;

/// Frames and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Frames.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What is counted of NICs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counted {
    /// Sessions.
    #[default]
    Sessions,
    /// Topology `pinned`: stations.
    Stations,
}

impl fmt::Display for Counted {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Counted::Sessions => "sessions",
            Counted::Stations => "stations",
        })
    }
}

/// How far a port's front-end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// Nobody is connected.
    Listening,
    /// A front-end is connected, and no ring is started.
    Connected,
    /// At least one ring is started.
    Running,
}

impl PortState {
    /// The word in the reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            PortState::Listening => "listening",
            PortState::Connected => "connected",
            PortState::Running => "running",
        }
    }
}

/// Answer to `sessions`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionsReport {
    /// Sessions in the table, listed or not.
    pub total: u64,
    /// Up to `limit` of them, in no particular order.
    pub sessions: Vec<SessionReport>,
}

/// A session in [`SessionsReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// The whole key as one text.
    pub key: String,
    /// VLAN ids, outermost first.
    pub vlans: Vec<u16>,
    /// `tcp`, `udp`, `icmp`, ... or the IP protocol's number.
    pub protocol: String,
    /// Both ends, in the key's canonical order, which does not tell who began.
    pub ends: [SessionEnd; 2],
    /// Id of the NIC that it is pinned to.
    pub nic: String,
    /// Milliseconds since its first frame.
    pub age_ms: u64,
    /// Milliseconds since its last frame.
    pub idle_ms: u64,
    /// Frames in both directions.
    pub frames: u64,
    /// Bytes in both directions.
    pub bytes: u64,
}

/// One end of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionEnd {
    /// IP address.
    pub address: String,
    /// TCP, UDP or SCTP port; `null` where there is none.
    pub port: Option<u16>,
}

/// Answer to `nics`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicsReport {
    /// In the order of the configuration.
    pub nics: Vec<NicReport>,
    /// What [`NicReport::sessions`] counts.
    #[serde(default)]
    pub counted: Counted,
}

/// A NIC in [`NicsReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicReport {
    /// Its stable id.
    pub id: String,
    /// The interface.
    pub ifname: String,
    /// Its own address.
    pub mac: String,
    /// The driver; `null` for virtual interfaces.
    pub driver: Option<String>,
    /// Bytes of the largest payload.
    pub mtu: u32,
    /// Queues driven.
    pub queues: u32,
    /// Where the XDP program runs: `native` or `skb`.
    pub attach: String,
    /// Whether all its sockets are bound without copying.
    pub zero_copy: bool,
    /// Whether frames longer than a chunk can pass.
    pub multi_buffer: bool,
    /// Relative share of new sessions that is in force; 0: none.
    pub weight: u32,
    /// Whether it takes no new sessions because an operator said so.
    #[serde(default)]
    pub drained: bool,
    /// Whether its interface is there and driven; one that vanished is taken up again when it is back.
    #[serde(default = "yes")]
    pub present: bool,
    /// Whether sessions are sent by it.
    pub alive: bool,
    /// Whether its link can carry frames.
    pub carrier: bool,
    /// Its probes; `null`: it is not probed.
    #[serde(default)]
    pub probe: Option<ProbeReport>,
    /// Sessions pinned to it.
    pub sessions: u64,
    /// The last change of its link or settings; `null`: none since the start.
    pub last_change: Option<NicChange>,
    /// Changes since the start.
    #[serde(default)]
    pub changes: u64,
    /// What is wrong with it now, and what to do about that.
    #[serde(default)]
    pub concerns: Vec<String>,
}

/// The probes of a NIC since it was last opened or told to probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Who is asked, as `probe=` has it.
    pub target: String,
    /// Probes sent.
    pub sent: u64,
    /// Probes answered in time.
    pub answered: u64,
    /// Round trip of the last answer in microseconds; 0: none yet.
    pub rtt_us: u32,
}

/// A change of a NIC: of its link, name, address, MTU, queues or master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicChange {
    /// Milliseconds since it happened.
    pub ago_ms: u64,
    /// Whether sessions were sent by it afterwards.
    pub alive: bool,
    /// What changed.
    pub cause: String,
}

/// Answer to `ports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsReport {
    /// In the order of the configuration.
    pub ports: Vec<PortReport>,
}

/// A port in [`PortsReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// Its name.
    pub name: String,
    /// Path of its socket, or `fd N`.
    pub socket: String,
    /// How far its front-end is.
    pub state: PortState,
    /// The guest's MAC; `null`: not learned yet.
    pub mac: Option<String>,
    /// Whether the MAC was configured rather than learned.
    pub mac_configured: bool,
    /// The VLANs that the guest takes part in: `any`, `access 100` or `trunk 10-20+30`.
    pub vlan: String,
    /// Most queue pairs that the guest may use.
    pub max_queue_pairs: u16,
    /// Queue pairs in use: both rings started and enabled.
    pub queue_pairs: u16,
    /// Negotiated virtio features by their names in the specification, such as `VIRTIO_NET_F_MRG_RXBUF`.
    pub features: Vec<String>,
    /// Guest memory mapped, in MiB, rounded up.
    pub memory_mib: u64,
}

const fn yes() -> bool {
    true
}

/// Answer to `events`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsReport {
    /// Oldest first; the daemon keeps the last 1024.
    pub events: Vec<EventReport>,
    /// Number of the newest event there is, to ask for what comes after it.
    pub last: u64,
}

/// Something that happened to the NICs, or was done by an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventReport {
    /// Counts up from 1 without a gap.
    pub number: u64,
    /// When: milliseconds since 1970 (UTC).
    pub unix_ms: u64,
    /// When: microseconds since the daemon's start.
    pub uptime_us: u64,
    /// The NIC's id; `null`: it is not about one.
    pub nic: Option<String>,
    /// `alive`, `lost`, `link`, `returned`, `moved`, `added`, `removed`, `weight`, `drained`, `undrained`, `probe` or `algorithm`.
    pub kind: String,
    /// Why, or what exactly.
    pub cause: String,
}

/// Answer to `explain`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ExplainReport {
    /// The session's key.
    pub key: String,
    /// What places new sessions.
    pub algorithm: String,
    /// The slot that the key hashes to, 0 to 65535.
    pub slot: u16,
    /// Ids of the NICs in the order in which they serve the slot.
    pub order: Vec<String>,
    /// Id of the NIC that the session is pinned to; `null`: there is no such session.
    pub pinned: Option<String>,
    /// Milliseconds since it was pinned first, which may have been to another NIC; of a station, since it is this NIC's.
    pub pinned_ms: Option<u64>,
    /// Whether it has been another NIC's.
    #[serde(default)]
    pub has_moved: bool,
    /// Id of the NIC that it is asked to move to at its next pause; `null`: it may stay.
    #[serde(default)]
    pub moves_to: Option<String>,
    /// Id of the NIC that its next frame leaves by; `null`: none is alive.
    pub choice: Option<String>,
    /// Why.
    pub reason: String,
    /// Each NIC's part in it.
    pub nics: Vec<ExplainedNic>,
}

/// A NIC in [`ExplainReport`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ExplainedNic {
    /// Its stable id.
    pub id: String,
    /// Whether sessions are sent by it.
    pub alive: bool,
    /// Whether an operator drained it.
    pub drained: bool,
    /// Whether it came back lately and takes at most twice its fair share.
    pub slow_start: bool,
    /// Weight in force.
    pub weight: u32,
    /// Link speed in Mb/s, if known.
    pub speed_mbps: Option<u32>,
    /// Sessions pinned to it.
    pub sessions: u64,
    /// Of these, TCP sessions of which only a SYN was seen.
    pub half_open: u64,
    /// Round trip in microseconds, as `adaptive` has measured it; 0: not measured.
    pub rtt_us: f64,
    /// Part of its link in use, 0 to 1, as `adaptive` has measured it.
    pub utilisation: f64,
    /// What `adaptive` compares; 0: not measured.
    pub cost: f64,
}
