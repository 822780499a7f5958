//! What most end-to-end tests need: a fabric, vnicd on it, and guests connected to vnicd.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::daemon::{Daemon, DaemonOptions, port_socket};
use crate::fabric::{Fabric, PEER_IPV4};
use crate::lag::Distribution;
use crate::lock::MachineLock;
use crate::process::{tail, wait_for};
use crate::qemu::{Guest, GuestOptions, Vnic, endpoint};
use crate::traffic::echo::EchoServer;
use crate::traffic::sessions::{SessionGroup, SessionPlan, SessionsReport};

/// Where echo servers listen.
pub const ECHO_PORT: u16 = 7;
/// Long enough for what TCP and QEMU retry by themselves.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `ready` has something to tell, for [`PATIENCE`] at most.
///
/// # Errors
/// If it has nothing, and its own.
pub fn wait<T>(what: &str, ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_for(what, PATIENCE, Duration::from_millis(50), ready)
}

/// The MAC address of a guest, counted from 0.
#[must_use]
pub fn guest_mac(index: usize) -> String {
    format!("52:54:00:00:00:{:02x}", index + 1)
}

/// The MAC address of a guest as bytes.
#[must_use]
pub fn guest_mac_bytes(index: usize) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, u8::try_from(index + 1).expect("few guests")]
}

/// The IPv4 address of a guest, counted from 0.
#[must_use]
pub fn guest_ipv4(index: usize) -> String {
    format!("10.77.0.{}", index + 2)
}

/// The IPv6 address of a guest, counted from 0.
#[must_use]
pub fn guest_ipv6(index: usize) -> String {
    format!("fd77::{:x}", index + 2)
}

/// A fabric, a running vnicd, and guests that have booted and have their addresses on `eth0`.
pub struct Scene {
    /// The guests.
    pub guests: Vec<Guest>,
    daemon: Option<Daemon>,
    daemon_options: DaemonOptions,
    /// The network.
    pub fabric: Fabric,
    folder: TempDir,
    packed: bool,
    _machine: MachineLock,
}

impl Scene {
    /// Sets the scene: `guests` guests on one daemon with `nics` NICs and `workers` workers.
    ///
    /// # Errors
    /// If anything does not start.
    pub fn set(nics: usize, workers: u32, guests: usize) -> Result<Scene> {
        Scene::with_queues(nics, workers, guests, 1)
    }

    /// As [`Scene::set`], with several queue pairs for each guest and as many queues on each NIC.
    ///
    /// # Errors
    /// If anything does not start.
    pub fn with_queues(nics: usize, workers: u32, guests: usize, queues: u32) -> Result<Scene> {
        Scene::build(nics, workers, guests, queues, false)
    }

    /// As [`Scene::set`], with guests whose rings are packed.
    ///
    /// # Errors
    /// If anything does not start.
    pub fn with_packed_rings(nics: usize, workers: u32, guests: usize) -> Result<Scene> {
        Scene::build(nics, workers, guests, 1, true)
    }

    /// As [`Scene::with_queues`], with one guest whose rings are packed.
    ///
    /// # Errors
    /// If anything does not start.
    pub fn with_packed_queues(nics: usize, workers: u32, queues: u32) -> Result<Scene> {
        Scene::build(nics, workers, 1, queues, true)
    }

    fn build(nics: usize, workers: u32, guests: usize, queues: u32, packed: bool) -> Result<Scene> {
        let machine = MachineLock::acquire()?;
        crate::qemu::prepare()?;
        let folder = tempfile::tempdir()?;
        let fabric = Fabric::new(nics, queues, Distribution::Lag)?;
        let names: Vec<(String, String)> = (0..guests)
            .map(|index| (format!("p{index}"), guest_mac(index)))
            .collect();
        let ports: Vec<(&str, &str)> = names
            .iter()
            .map(|(name, mac)| (name.as_str(), mac.as_str()))
            .collect();
        let mut daemon_options = DaemonOptions::new(&ports, &fabric.nics(), workers);
        daemon_options
            .ports
            .iter_mut()
            .for_each(|port| port.queues = queues);
        let daemon = Some(Daemon::start(&fabric.host, folder.path(), &daemon_options)?);
        let mut scene = Scene {
            guests: Vec::new(),
            daemon,
            daemon_options,
            fabric,
            folder,
            packed,
            _machine: machine,
        };
        // All boot side by side.
        let launched: Vec<Guest> = (0..guests)
            .map(|index| scene.launch(index))
            .collect::<Result<_>>()?;
        for (index, guest) in launched.into_iter().enumerate() {
            let guest = guest
                .booted(1)
                .with_context(|| format!("the end of vnicd's log:\n{}", scene.log(30)))?;
            scene.guests.push(guest);
            scene.address(index)?;
        }
        Ok(scene)
    }

    fn launch(&self, index: usize) -> Result<Guest> {
        let socket = port_socket(self.folder.path(), &format!("p{index}"));
        let queues = self.daemon_options.ports[index].queues;
        let vnic = Vnic {
            socket,
            mac: guest_mac(index),
            queues,
            packed: self.packed,
        };
        let mut options = GuestOptions::new(&format!("g{index}"), vec![vnic]);
        // Where many guests share few cores, second CPUs would only wait for each other.
        if self.daemon_options.ports.len() > 2 {
            options.cpus = 1;
        }
        Guest::launch(self.folder.path(), &options)
    }

    /// Ends the QEMU of a guest without warning and boots another in its place.
    ///
    /// # Errors
    /// If it does not boot.
    pub fn replace_guest(&mut self, index: usize) -> Result<()> {
        self.guests[index].process().kill()?;
        let agent = self.folder.path().join(format!("g{index}.agent"));
        // Else the new QEMU's client might still meet the old socket.
        let _ = std::fs::remove_file(agent);
        self.guests[index] = self.launch(index)?.booted(1)?;
        self.address(index)
    }

    /// Gives a guest its addresses (again).
    ///
    /// # Errors
    /// With what the guest said.
    pub fn address(&self, index: usize) -> Result<()> {
        let addresses = [
            format!("{}/24", guest_ipv4(index)),
            format!("{}/64", guest_ipv6(index)),
        ];
        self.guests[index].configure("eth0", &[&addresses[0], &addresses[1]])
    }

    /// The daemon.
    ///
    /// # Errors
    /// If the test has ended it.
    pub fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("vnicd has been ended")
    }

    /// The daemon, to be ended.
    ///
    /// # Errors
    /// If the test has ended it before.
    pub fn take_daemon(&mut self) -> Result<Daemon> {
        self.daemon.take().context("vnicd has been ended")
    }

    /// Starts the daemon again with the same arguments.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_daemon(&mut self) -> Result<()> {
        self.daemon = Some(Daemon::start(
            &self.fabric.host,
            self.folder.path(),
            &self.daemon_options,
        )?);
        Ok(())
    }

    /// The folder of all sockets and logs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The end of the daemon's log.
    #[must_use]
    pub fn log(&self, lines: usize) -> String {
        tail(&self.folder.path().join("vnicd.log"), lines)
    }

    /// Opens sessions between guest 0 and the peer, `each_way` from either side, and checks that all have opened.
    ///
    /// # Errors
    /// If one does not open.
    pub fn open_sessions(&self, each_way: u32) -> Result<Sessions> {
        self.open_sessions_of(each_way, 50, 200)
    }

    /// As [`Scene::open_sessions`], with the pause between two messages of a session and their size.
    ///
    /// # Errors
    /// If one does not open.
    pub fn open_sessions_of(&self, each_way: u32, interval_ms: u32, message_bytes: u32) -> Result<Sessions> {
        let peer_echo = self.fabric.peer.run(|| Ok(EchoServer::start(ECHO_PORT)?))?;
        self.guests[0].tcp_echo(ECHO_PORT)?;
        let plan = |target| SessionPlan {
            target,
            count: each_way,
            interval_ms,
            message_bytes,
        };
        let (to_peer, to_guest) = (
            plan(endpoint(PEER_IPV4, ECHO_PORT)?),
            plan(endpoint(&guest_ipv4(0), ECHO_PORT)?),
        );
        let from_guest = self.guests[0].start_sessions(to_peer)?;
        let from_peer = self.fabric.peer.run(|| Ok(SessionGroup::start(&to_guest)?))?;
        let sessions = Sessions {
            from_guest,
            from_peer,
            peer_echo,
        };
        sessions.advance(self, "sessions right after their start")?;
        Ok(sessions)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("The end of vnicd's log:\n{}", self.log(40));
            for guest in &self.guests {
                eprintln!("The end of a guest's console:\n{}", tail(guest.console(), 10));
            }
        }
    }
}

/// Sessions between guest 0 and the peer, opened from both sides.
pub struct Sessions {
    from_guest: u64,
    from_peer: SessionGroup,
    peer_echo: EchoServer,
}

impl Sessions {
    /// How all of them fare.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn progress(&self, scene: &Scene, reset_gaps: bool) -> Result<SessionsReport> {
        let mut report = scene.guests[0].sessions_progress(self.from_guest, reset_gaps)?;
        report
            .sessions
            .extend(self.from_peer.progress(reset_gaps).sessions);
        Ok(report)
    }

    /// Waits until each session has got ten more echoes.
    ///
    /// # Errors
    /// If a session ends, or stands still for [`PATIENCE`].
    pub fn advance(&self, scene: &Scene, when: &str) -> Result<()> {
        let echoed = |report: &SessionsReport| {
            report
                .sessions
                .iter()
                .map(|session| session.echoed)
                .collect::<Vec<_>>()
        };
        let start = echoed(&self.progress(scene, false)?);
        wait_for(
            &format!("progress of all sessions: {when}"),
            PATIENCE,
            Duration::from_millis(100),
            || {
                let report = self.progress(scene, false)?;
                let errors = report.errors();
                ensure!(
                    errors.is_empty(),
                    "{when}: {} sessions ended, the first: {}",
                    errors.len(),
                    errors[0]
                );
                let all = echoed(&report)
                    .iter()
                    .zip(&start)
                    .all(|(now, then)| *now >= then + 10);
                Ok(all.then_some(()))
            },
        )
        .with_context(|| format!("the end of vnicd's log:\n{}", scene.log(30)))
    }

    /// Ends the sessions and checks that each got all echoes and none was reset.
    ///
    /// # Errors
    /// What was wrong with a session.
    pub fn finish(self, scene: &Scene) -> Result<()> {
        let mut report = scene.guests[0].finish_sessions(self.from_guest)?;
        report.sessions.extend(self.from_peer.finish().sessions);
        let errors = report.errors();
        ensure!(
            errors.is_empty(),
            "{} sessions failed, the first: {}",
            errors.len(),
            errors[0]
        );
        let resets = self.peer_echo.stats().resets;
        ensure!(resets == 0, "the peer saw {resets} resets");
        Ok(())
    }
}
