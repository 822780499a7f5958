//! What was written, before it is checked: the same shape for the command line and for the file.

use std::path::PathBuf;

use super::sessions::{self, Numbers};

/// A value with the place that it comes from, for messages.
#[derive(Debug, Clone)]
pub(super) struct Given<T> {
    pub value: T,
    /// "`--workers`", "`workers` in /etc/vnicd.toml", ...
    pub origin: String,
}

impl<T> Given<T> {
    pub fn new(value: T, origin: impl Into<String>) -> Given<T> {
        Given {
            value,
            origin: origin.into(),
        }
    }
}

/// One `--port`, `[[port]]`, `--socket-path` or `--fd`.
#[derive(Debug, Clone, Default)]
pub(super) struct RawPort {
    pub origin: String,
    pub name: Option<String>,
    pub socket: Option<PathBuf>,
    pub fd: Option<i64>,
    pub mac: Option<String>,
    pub queues: Option<i64>,
    pub vlan: Option<i64>,
    pub trunk: Option<String>,
}

/// One `--nic` or `[[nic]]`.
#[derive(Debug, Clone, Default)]
pub(super) struct RawNic {
    pub origin: String,
    pub ifname: Option<String>,
    pub id: Option<String>,
    pub queues: Option<i64>,
    pub zerocopy: Option<String>,
    pub attach: Option<String>,
    pub weight: Option<i64>,
    pub set_channels: Option<String>,
    pub probe: Option<String>,
}

/// All options of one source.
#[derive(Debug, Clone, Default)]
pub(super) struct Raw {
    pub socket_path: Option<Given<PathBuf>>,
    pub fd: Option<Given<i64>>,
    pub ports: Vec<RawPort>,
    pub nics: Vec<RawNic>,
    pub topology: Option<Given<String>>,
    pub lb: Option<Given<String>>,
    pub poll: Option<Given<String>>,
    pub sleep_in: Option<Given<String>>,
    pub workers: Option<Given<i64>>,
    pub cpus: Option<Given<String>>,
    pub control: Option<Given<PathBuf>>,
    pub state_dir: Option<Given<PathBuf>>,
    pub ring_dir: Option<Given<PathBuf>>,
    pub sessions: Option<Given<i64>>,
    pub timeouts: Numbers,
    pub limits: Numbers,
    pub frames: Option<Given<i64>>,
    pub updelay: Option<Given<i64>>,
    pub flap_damping: Option<Given<String>>,
    pub allow_default_route_nic: Option<bool>,
}

impl Raw {
    /// `self` where it says something, `below` where it does not. Ports, in whichever form, and NICs are replaced whole, idle
    /// times and caps one by one.
    pub fn over(self, below: Raw) -> Raw {
        let (socket_path, fd, ports) = if self.names_ports() {
            (self.socket_path, self.fd, self.ports)
        } else {
            (below.socket_path, below.fd, below.ports)
        };
        Raw {
            socket_path,
            fd,
            ports,
            nics: if self.nics.is_empty() {
                below.nics
            } else {
                self.nics
            },
            topology: self.topology.or(below.topology),
            lb: self.lb.or(below.lb),
            poll: self.poll.or(below.poll),
            sleep_in: self.sleep_in.or(below.sleep_in),
            workers: self.workers.or(below.workers),
            cpus: self.cpus.or(below.cpus),
            control: self.control.or(below.control),
            state_dir: self.state_dir.or(below.state_dir),
            ring_dir: self.ring_dir.or(below.ring_dir),
            sessions: self.sessions.or(below.sessions),
            timeouts: sessions::over(self.timeouts, below.timeouts),
            limits: sessions::over(self.limits, below.limits),
            frames: self.frames.or(below.frames),
            updelay: self.updelay.or(below.updelay),
            flap_damping: self.flap_damping.or(below.flap_damping),
            allow_default_route_nic: self.allow_default_route_nic.or(below.allow_default_route_nic),
        }
    }

    fn names_ports(&self) -> bool {
        self.socket_path.is_some() || self.fd.is_some() || !self.ports.is_empty()
    }
}
