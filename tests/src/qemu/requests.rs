//! What a guest's agent is asked to do.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{ANSWER_LIMIT, Guest, answered};
use crate::agent::{Command, Interface, Output, Reply};
use crate::traffic::bulk::{BulkPlan, BulkReport};
use crate::traffic::sessions::{SessionPlan, SessionsReport};
use crate::traffic::udp::{UdpPlan, UdpReport};

impl Guest {
    fn call(&self, command: Command, limit: Duration) -> Result<Reply> {
        self.agent
            .call(command, limit)
            .with_context(|| format!("guest {}", self.name))
    }

    /// Gives an interface its addresses (with prefix length) and takes it up.
    ///
    /// # Errors
    /// With what the guest said.
    pub fn configure(&self, interface: &str, addresses: &[&str]) -> Result<()> {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        let interface = interface.to_owned();
        let command = Command::Configure {
            interface,
            addresses,
            mac: None,
            mtu: None,
            queue_pairs: None,
        };
        self.call(command, ANSWER_LIMIT).map(drop)
    }

    /// Has an interface use so many queue pairs from now on, as `ethtool -L IF combined N` does.
    ///
    /// # Errors
    /// With what the guest said.
    pub fn set_queue_pairs(&self, interface: &str, pairs: u32) -> Result<()> {
        let command = Command::Configure {
            interface: interface.to_owned(),
            addresses: Vec::new(),
            mac: None,
            mtu: None,
            queue_pairs: Some(pairs),
        };
        self.call(command, ANSWER_LIMIT).map(drop)
    }

    /// Its interfaces but loopback.
    ///
    /// # Errors
    /// With what the guest said.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        match self.call(Command::Interfaces, ANSWER_LIMIT)? {
            Reply::Interfaces { interfaces } => Ok(interfaces),
            other => unexpected(&other),
        }
    }

    /// Runs a busybox program.
    ///
    /// # Errors
    /// If it cannot start or does not end within `limit`.
    pub fn run(&self, arguments: &[&str], limit: Duration) -> Result<Output> {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        match self.call(Command::Run { arguments }, limit)? {
            Reply::Output(output) => Ok(output),
            other => unexpected(&other),
        }
    }

    /// Sends `count` echo requests to an IPv4 or IPv6 address and returns how many were answered.
    ///
    /// # Errors
    /// If ping does not run.
    pub fn ping(&self, target: &str, count: u32, payload: u32) -> Result<u32> {
        let program = if target.contains(':') { "ping6" } else { "ping" };
        let limit = Duration::from_secs(u64::from(count) + 30);
        let (count, payload) = (count.to_string(), payload.to_string());
        let output = self.run(&[program, "-c", &count, "-s", &payload, "-W", "2", target], limit)?;
        answered(&output.stdout).with_context(|| format!("reading what {program} wrote: {output:?}"))
    }

    fn start(&self, command: Command, limit: Duration) -> Result<u64> {
        match self.call(command, limit)? {
            Reply::Started { number } => Ok(number),
            other => unexpected(&other),
        }
    }

    /// Starts a TCP echo server and returns its number.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn tcp_echo(&self, port: u16) -> Result<u64> {
        self.start(Command::TcpEcho { port }, ANSWER_LIMIT)
    }

    /// Starts a UDP echo server.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn udp_echo(&self, port: u16) -> Result<u64> {
        self.start(Command::UdpEcho { port }, ANSWER_LIMIT)
    }

    /// Starts a server for bulk transfers.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn bulk_server(&self, port: u16) -> Result<u64> {
        self.start(Command::BulkServer { port }, ANSWER_LIMIT)
    }

    /// Opens TCP sessions from the guest and returns the group's number once all have opened or failed.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn start_sessions(&self, plan: SessionPlan) -> Result<u64> {
        self.start(Command::StartSessions { plan }, Duration::from_secs(120))
    }

    /// How the sessions of a group fare.
    ///
    /// # Errors
    /// If there is no such group.
    pub fn sessions_progress(&self, group: u64, reset_gaps: bool) -> Result<SessionsReport> {
        match self.call(Command::SessionsProgress { group, reset_gaps }, ANSWER_LIMIT)? {
            Reply::Sessions(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    /// Ends the sessions of a group.
    ///
    /// # Errors
    /// If there is no such group.
    pub fn finish_sessions(&self, group: u64) -> Result<SessionsReport> {
        match self.call(Command::FinishSessions { group }, ANSWER_LIMIT)? {
            Reply::Sessions(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    /// Sends datagrams to a UDP echo server.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn udp(&self, plan: UdpPlan) -> Result<UdpReport> {
        match self.call(Command::Udp { plan }, Duration::from_secs(120))? {
            Reply::Udp(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    /// Sends bytes to a bulk server.
    ///
    /// # Errors
    /// If the transfer fails.
    pub fn bulk(&self, plan: BulkPlan) -> Result<BulkReport> {
        match self.call(Command::Bulk { plan }, Duration::from_secs(180))? {
            Reply::Bulk(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    /// Sends a raw frame by an interface.
    ///
    /// # Errors
    /// With what the guest said.
    pub fn send_frame(&self, interface: &str, frame: Vec<u8>, count: u32) -> Result<()> {
        let interface = interface.to_owned();
        self.call(
            Command::SendFrame {
                interface,
                frame,
                count,
            },
            ANSWER_LIMIT,
        )
        .map(drop)
    }

    /// Starts to capture frames of one EtherType.
    ///
    /// # Errors
    /// With what the guest said.
    pub fn start_capture(&self, interface: &str, ethertype: u16) -> Result<u64> {
        self.start(
            Command::StartCapture {
                interface: interface.to_owned(),
                ethertype,
            },
            ANSWER_LIMIT,
        )
    }

    /// Ends a capture once `wanted` frames are there or `patience` is over.
    ///
    /// # Errors
    /// If there is no such capture.
    pub fn finish_capture(&self, capture: u64, wanted: u32, patience: Duration) -> Result<Vec<Vec<u8>>> {
        let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        match self.call(
            Command::FinishCapture {
                capture,
                wanted,
                patience_ms,
            },
            patience + ANSWER_LIMIT,
        )? {
            Reply::Frames { frames } => Ok(frames),
            other => unexpected(&other),
        }
    }
}

fn unexpected<T>(reply: &Reply) -> Result<T> {
    bail!("the guest's agent answered something else: {reply:?}")
}
