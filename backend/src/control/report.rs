//! What the daemon reports. Counters count from the daemon's start and never go back; `bytes` are those of Ethernet frames
//! without virtio header and FCS. "Guest TX" is what guests send, "guest RX" what they receive.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

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

/// Answer to `stats`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Milliseconds since the daemon's start, for rates between two reports.
    pub uptime_ms: u64,
    /// Per port.
    pub ports: Vec<PortStats>,
    /// Per NIC.
    pub nics: Vec<NicStats>,
    /// Per worker.
    pub workers: Vec<WorkerStats>,
    /// Sessions.
    pub balancer: BalancerReport,
    /// Chunks of frame memory by state.
    pub frame_memory: FrameMemoryReport,
}

/// A port in [`StatsReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Its name.
    pub name: String,
    /// Frames that the guest sent, dropped ones not counted.
    pub guest_tx: Traffic,
    /// Frames that the guest received.
    pub guest_rx: Traffic,
    /// Frames from or to this guest that were dropped, by reason.
    pub drops: Drops,
    /// Times that the guest's driver broke a ring.
    #[serde(default)]
    pub broken_rings: u64,
    /// What came of the front-end's requests to announce the guest.
    #[serde(default)]
    pub rarp: RarpStats,
    /// Per queue pair.
    pub queue_pairs: Vec<QueuePairStats>,
}

/// Requests of a front-end to announce its guest (SEND_RARP), in [`PortStats`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RarpStats {
    /// RARP frames sent, one for each VLAN that the guest is announced in.
    pub sent: u64,
    /// Those that no NIC took: none was alive, or it had no room.
    pub unsent: u64,
    /// Requests with an address that is not the guest's.
    pub refused: u64,
}

/// A queue pair in [`PortStats`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairStats {
    /// Number of the pair, from 0.
    pub index: usize,
    /// Frames that the guest sent by it.
    pub guest_tx: Traffic,
    /// Frames that the guest received by it.
    pub guest_rx: Traffic,
    /// Notifications (interrupts) sent to the guest.
    pub notifications: u64,
}

/// A NIC in [`StatsReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStats {
    /// Its stable id.
    pub id: String,
    /// The interface.
    pub ifname: String,
    /// Frames received for the guests, copies of group frames not counted.
    pub rx: Traffic,
    /// Frames put on the transmit ring.
    pub tx: Traffic,
    /// Copies of broadcast and multicast frames, taken beside the host.
    pub group_copies: Traffic,
    /// Frames in flight when it was lost, of which copies left by other NICs.
    #[serde(default)]
    pub redriven: u64,
    /// Frames that the XDP program sent to vnicd.
    pub xdp_redirected: u64,
    /// Frames that the XDP program left to the host.
    pub xdp_passed: u64,
    /// Frames to or from this NIC that were dropped, by reason.
    pub drops: Drops,
    /// Per queue.
    pub queues: Vec<NicQueueStats>,
}

/// A queue in [`NicStats`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicQueueStats {
    /// Number of the queue, from 0.
    pub index: usize,
    /// Frames received.
    pub rx: Traffic,
    /// Frames put on the transmit ring.
    pub tx: Traffic,
    /// Frames that the kernel dropped for want of ring space or chunks.
    pub kernel_dropped: u64,
    /// Descriptors that the kernel called invalid.
    pub kernel_invalid: u64,
    /// System calls made to wake the kernel.
    pub kicks: u64,
    /// Of those, how many the kernel answered with an error.
    pub kick_errors: u64,
}

/// A worker in [`StatsReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStats {
    /// Number of the worker, from 0.
    pub index: usize,
    /// CPU that it is pinned to; `null`: not pinned.
    pub cpu: Option<usize>,
    /// Turns of its loop.
    pub turns: u64,
    /// Turns that moved at least one frame.
    pub busy_turns: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Frames left to another worker because that one held the ring.
    pub handoffs: u64,
    /// Times a ring was held by another worker.
    pub contention: u64,
}

/// Sessions in [`StatsReport`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancerReport {
    /// Sessions in the table.
    pub sessions: u64,
    /// Most sessions that fit.
    pub capacity: u64,
    /// Sessions ever created.
    pub created: u64,
    /// Sessions that timed out.
    pub expired: u64,
    /// Sessions moved because their NIC was not alive.
    pub repinned: u64,
    /// Sessions that `adaptive` moved to even out the NICs.
    #[serde(default)]
    pub moved: u64,
    /// Frames forwarded without a session because there was no room for one.
    pub table_full: u64,
    /// TCP sessions before the end of their handshake, now; part of `sessions`.
    #[serde(default)]
    pub half_open: u64,
    /// Fragmented datagrams whose NIC is remembered, now; not part of `sessions`.
    #[serde(default)]
    pub fragments: u64,
    /// Frames forwarded without a session because of the cap on half-open ones.
    #[serde(default)]
    pub half_open_full: u64,
    /// Frames of TCP in mid-stream forwarded without a session because half the table is sessions of which one end was heard.
    #[serde(default)]
    pub one_way_full: u64,
    /// Frames forwarded without a session because of the cap on new ones in a second.
    #[serde(default)]
    pub new_capped: u64,
    /// First fragments that left no word for the later ones because of the cap on fragments.
    #[serde(default)]
    pub fragments_full: u64,
}

/// Frame memory in [`StatsReport`]: chunks of 4096 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameMemoryReport {
    /// Free.
    pub free: u32,
    /// In frames that workers hold.
    pub held: u32,
    /// On fill rings.
    pub fill: u32,
    /// On transmit rings.
    pub tx: u32,
    /// Of retired sockets.
    pub quarantined: u32,
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
    /// `alive`, `lost`, `link`, `added`, `removed`, `returned`, `weight`, `drained`, `undrained` or `algorithm`.
    pub kind: String,
    /// Why, or what exactly.
    pub cause: String,
}

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
    /// Milliseconds since it was pinned first.
    pub pinned_ms: Option<u64>,
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
