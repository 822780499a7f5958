//! Answer to `stats`.

use serde::{Deserialize, Serialize};

use super::{Drops, Traffic};

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
    /// Turns that moved at least one frame, or came back to a ring that another thread had held.
    pub busy_turns: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Frames left on a ring's hand-off ring because another thread held it.
    pub handoffs: u64,
    /// Times a ring was held by another thread.
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
    /// Times that a chunk was not where it had to be, and was given up. Not 0 is a bug of the kernel, a driver or vnicd.
    pub state_errors: u64,
}
