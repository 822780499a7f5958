//! What the tests and the guest's agent say to each other.

use serde::{Deserialize, Serialize};

use crate::traffic::bulk::{BulkPlan, BulkReport};
use crate::traffic::sessions::{SessionPlan, SessionsReport};
use crate::traffic::udp::{UdpPlan, UdpReport};

/// A request; its reply carries the same `id`. Requests run side by side and may be answered in any order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the sender.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What the agent can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// Answer with `Done`.
    Hello,
    /// List the interfaces.
    Interfaces,
    /// Set up an interface. It ends up; what is not given stays.
    Configure {
        /// Its name.
        interface: String,
        /// Addresses with prefix length, in place of the present ones.
        addresses: Vec<String>,
        /// A new MAC address.
        mac: Option<String>,
        /// A new MTU, in bytes.
        mtu: Option<u32>,
        /// Queue pairs to use, as `ethtool -L combined`.
        queue_pairs: Option<u32>,
    },
    /// Run a program of the guest (busybox: ping, ping6, arping, ip, cat, ...).
    Run {
        /// The program and its arguments.
        arguments: Vec<String>,
    },
    /// Start a TCP echo server; answers with `Started`.
    TcpEcho {
        /// Its port.
        port: u16,
    },
    /// Start a UDP echo server; answers with `Started`.
    UdpEcho {
        /// Its port.
        port: u16,
    },
    /// Start a bulk server; answers with `Started`.
    BulkServer {
        /// Its port.
        port: u16,
    },
    /// Open TCP sessions and keep them going; answers with `Started` once all have opened or failed.
    StartSessions {
        /// What to do.
        plan: SessionPlan,
    },
    /// How a group of sessions fares.
    SessionsProgress {
        /// The number that `StartSessions` answered.
        group: u64,
        /// Measure gaps anew from now on.
        reset_gaps: bool,
    },
    /// End a group of sessions and report.
    FinishSessions {
        /// The number that `StartSessions` answered.
        group: u64,
    },
    /// Send datagrams to a UDP echo server.
    Udp {
        /// What to do.
        plan: UdpPlan,
    },
    /// Transfer bytes to a bulk server.
    Bulk {
        /// What to do.
        plan: BulkPlan,
    },
    /// Send a raw frame.
    SendFrame {
        /// By which interface.
        interface: String,
        /// Its bytes, from the destination address on.
        frame: Vec<u8>,
        /// How often.
        count: u32,
    },
    /// Start to capture frames of one EtherType; answers with `Started`.
    StartCapture {
        /// On which interface.
        interface: String,
        /// The EtherType.
        ethertype: u16,
    },
    /// End a capture; answers with `Frames`.
    FinishCapture {
        /// The number that `StartCapture` answered.
        capture: u64,
        /// Return once this many are there.
        wanted: u32,
        /// Wait at most this long, in milliseconds.
        patience_ms: u32,
    },
    /// Restart the guest (no reply).
    Reboot,
    /// Switch the guest off (no reply).
    PowerOff,
}

/// What an agent's program wrote, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its exit status; -1 if a signal ended it.
    pub status: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// One interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it has carrier; `None` while it is down.
    pub carrier: Option<bool>,
    /// RX queues in use.
    pub rx_queues: u32,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Reply {
    /// Done; nothing to tell.
    Done,
    /// It did not work.
    Failed {
        /// Why.
        reason: String,
    },
    /// Something runs now, under this number.
    Started {
        /// The number.
        number: u64,
    },
    /// The interfaces but loopback.
    Interfaces {
        /// In the order of their names.
        interfaces: Vec<Interface>,
    },
    /// What a program wrote.
    Output(Output),
    /// What sessions have seen.
    Sessions(SessionsReport),
    /// What became of datagrams.
    Udp(UdpReport),
    /// How a transfer went.
    Bulk(BulkReport),
    /// Captured frames.
    Frames {
        /// Each from the destination address on.
        frames: Vec<Vec<u8>>,
    },
}

/// What the agent writes, one a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// Said again and again after the agent's start until the first request: nobody may have listened yet.
    Ready {
        /// Differs from one boot to the next (the kernel's boot id).
        boot: String,
    },
    /// The answer to a request.
    Reply {
        /// The request's.
        id: u64,
        /// The answer.
        reply: Reply,
    },
}
