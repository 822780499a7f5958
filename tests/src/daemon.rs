//! The daemon under test and its operator's command line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::binaries::binary;
use crate::netns::Netns;
use crate::process::{Process, run, tail, wait_for};

/// How long vnicd may take until its control socket answers.
pub const START_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to end after SIGTERM.
pub const STOP_LIMIT: Duration = Duration::from_secs(5);

/// One port of the daemon.
#[derive(Debug, Clone)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// The guest's MAC address; `None` lets vnicd learn it.
    pub mac: Option<String>,
    /// Queue pairs.
    pub queues: u32,
    /// Further options, as `vlan=100`; may be empty.
    pub options: String,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// Its ports; each socket is `NAME.sock` in the daemon's folder.
    pub ports: Vec<Port>,
    /// Host NICs.
    pub nics: Vec<String>,
    /// What the NICs are plugged into, if there are several.
    pub topology: &'static str,
    /// Datapath threads.
    pub workers: u32,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// `LB_ALGORITHM` in its environment.
    pub lb_algorithm: Option<&'static str>,
}

impl DaemonOptions {
    /// A daemon with these ports and NICs, in the `lag` topology if there are several NICs.
    #[must_use]
    pub fn new(ports: &[(&str, &str)], nics: &[String], workers: u32) -> DaemonOptions {
        let port = |(name, mac): &(&str, &str)| Port {
            name: (*name).to_owned(),
            mac: Some((*mac).to_owned()),
            queues: 1,
            options: String::new(),
        };
        DaemonOptions {
            ports: ports.iter().map(port).collect(),
            nics: nics.to_vec(),
            topology: "lag",
            workers,
            arguments: Vec::new(),
            lb_algorithm: None,
        }
    }
}

/// A running vnicd; killed when dropped.
pub struct Daemon {
    folder: PathBuf,
    process: Process,
}

/// Asks a port's socket for its features, as a front-end does (GET_FEATURES).
///
/// # Errors
/// If there is no answer of the right shape, or VERSION_1 is not offered.
pub fn features(stream: &mut UnixStream) -> Result<u64> {
    stream.set_read_timeout(Some(START_LIMIT))?;
    // Request, protocol version, size of the payload.
    let request: Vec<u8> = [1u32, 1, 0]
        .iter()
        .flat_map(|field| field.to_ne_bytes())
        .collect();
    stream.write_all(&request)?;
    let mut header = [0; 12];
    stream
        .read_exact(&mut header)
        .context("no answer to GET_FEATURES")?;
    ensure!(
        header[..4] == 1u32.to_ne_bytes() && header[8..] == 8u32.to_ne_bytes(),
        "an answer with the header {header:?}"
    );
    let mut features = [0; 8];
    stream.read_exact(&mut features)?;
    let features = u64::from_ne_bytes(features);
    // VIRTIO_F_VERSION_1.
    ensure!(features & 1 << 32 != 0, "no VERSION_1 in {features:#x}");
    Ok(features)
}

/// The socket of a port, given the daemon's folder.
#[must_use]
pub fn port_socket(folder: &Path, port: &str) -> PathBuf {
    folder.join(format!("{port}.sock"))
}

/// The arguments with which vnicd is started.
#[must_use]
pub fn arguments(folder: &Path, options: &DaemonOptions) -> Vec<String> {
    let mut arguments = Vec::new();
    for port in &options.ports {
        let mut value = format!(
            "name={},socket={}",
            port.name,
            port_socket(folder, &port.name).display()
        );
        if let Some(mac) = &port.mac {
            value.push_str(&format!(",mac={mac}"));
        }
        if port.queues > 1 {
            value.push_str(&format!(",queues={}", port.queues));
        }
        if !port.options.is_empty() {
            value.push_str(&format!(",{}", port.options));
        }
        arguments.extend(["--port".to_owned(), value]);
    }
    for nic in &options.nics {
        arguments.extend(["--nic".to_owned(), nic.clone()]);
    }
    if options.nics.len() > 1 {
        arguments.extend(["--topology".to_owned(), options.topology.to_owned()]);
    }
    arguments.extend(["--workers".to_owned(), options.workers.to_string()]);
    // Two busy workers would starve the guest on a machine of two cores.
    arguments.extend(["--poll".to_owned(), "adaptive".to_owned()]);
    arguments.extend([
        "--control".to_owned(),
        control_socket(folder).display().to_string(),
    ]);
    arguments.extend([
        "--state-dir".to_owned(),
        folder.join("state").display().to_string(),
    ]);
    arguments.extend(options.arguments.iter().cloned());
    arguments
}

fn control_socket(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

impl Daemon {
    /// Starts vnicd in `namespace`, with its sockets and log in `folder`, and waits until its control socket answers.
    ///
    /// # Errors
    /// If it ends or does not answer in time; the error holds the end of its log.
    pub fn start(namespace: &Netns, folder: &Path, options: &DaemonOptions) -> Result<Daemon> {
        let mut command = namespace.command(binary("vnicd")?);
        command
            .args(arguments(folder, options))
            .env("RUST_BACKTRACE", "1")
            .env_remove("LB_ALGORITHM")
            .envs(options.lb_algorithm.map(|word| ("LB_ALGORITHM", word)));
        let process = Process::start("vnicd", command, &folder.join("vnicd.log"))?;
        let mut daemon = Daemon {
            folder: folder.to_owned(),
            process,
        };
        wait_for(
            "vnicd's control socket",
            START_LIMIT,
            Duration::from_millis(10),
            || {
                daemon.process.must_run()?;
                // A stale socket of a killed daemon refuses the connection. A new one listens before it has opened its NICs, and
                // answers afterwards.
                let connected = UnixStream::connect(control_socket(&daemon.folder)).is_ok();
                Ok(connected.then(|| daemon.query("status").ok()).flatten())
            },
        )
        .with_context(|| format!("the end of vnicd's log:\n{}", daemon.log_tail(30)))?;
        Ok(daemon)
    }

    /// The socket of one of its ports.
    #[must_use]
    pub fn socket(&self, port: &str) -> PathBuf {
        port_socket(&self.folder, port)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        tail(self.process.log(), lines)
    }

    /// Runs `vnic` on it, and returns what it wrote.
    ///
    /// # Errors
    /// With what `vnic` said.
    pub fn vnic(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new(binary("vnic")?)
            .arg("--control")
            .arg(control_socket(&self.folder))
            .args(arguments))
    }

    /// Runs `vnic COMMAND --json` on it.
    ///
    /// # Errors
    /// With what `vnic` said, or if that is no JSON.
    pub fn query(&self, command: &str) -> Result<Value> {
        let output = self.vnic(&[command, "--json"])?;
        serde_json::from_str(&output)
            .with_context(|| format!("vnic {command} --json wrote no JSON: {output:.500}"))
    }

    /// What it reports of a NIC.
    ///
    /// # Errors
    /// If it does not know the NIC.
    pub fn nic(&self, id: &str) -> Result<Value> {
        let listed = self.query("nics")?;
        let rows = listed["nics"]
            .as_array()
            .context("the answer to `nics` has no list of them")?;
        let found = rows.iter().find(|row| row["id"].as_str() == Some(id));
        found
            .cloned()
            .with_context(|| format!("vnicd knows no NIC {id}: {listed}"))
    }

    /// Whether it sends sessions by a NIC.
    ///
    /// # Errors
    /// If it does not know the NIC.
    pub fn nic_is_alive(&self, id: &str) -> Result<bool> {
        self.nic(id)?["alive"]
            .as_bool()
            .context("the report of a NIC has no `alive`")
    }

    /// How many sessions are pinned to each of the NICs, as it counts them.
    ///
    /// # Errors
    /// If it does not know a NIC.
    pub fn sessions_per_nic(&self, ids: &[String]) -> Result<Vec<u64>> {
        let count = |id: &String| {
            self.nic(id)?["sessions"]
                .as_u64()
                .context("the report of a NIC has no `sessions`")
        };
        ids.iter().map(count).collect()
    }

    /// How many of the sessions that it lists are pinned to each of the NICs.
    ///
    /// # Errors
    /// With what `vnic` said.
    pub fn listed_sessions_per_nic(&self, ids: &[String]) -> Result<Vec<u64>> {
        let output = self.vnic(&["sessions", "--limit", "1000000", "--json"])?;
        let listed: Value = serde_json::from_str(&output)?;
        let rows = listed["sessions"]
            .as_array()
            .context("the answer to `sessions` has no list of them")?;
        let on = |id: &String| rows.iter().filter(|row| row["nic"].as_str() == Some(id)).count();
        Ok(ids
            .iter()
            .map(|id| u64::try_from(on(id)).unwrap_or(u64::MAX))
            .collect())
    }

    /// Waits until a NIC is alive, or not.
    ///
    /// # Errors
    /// If it does not become so, or vnicd ends.
    pub fn wait_alive(&self, nic: &str, alive: bool) -> Result<()> {
        wait_for(
            &format!("alive={alive} of {nic}"),
            // Longer than a NIC is left out that fails again and again: on a busy machine answers to probes come too late.
            Duration::from_secs(60),
            Duration::from_millis(20),
            || Ok((self.nic_is_alive(nic)? == alive).then_some(())),
        )
    }

    /// Ends it with SIGTERM; returns the exit status and how long it took.
    ///
    /// # Errors
    /// If it does not end within [`STOP_LIMIT`].
    pub fn terminate(mut self) -> Result<(ExitStatus, Duration)> {
        self.process.terminate(STOP_LIMIT)
    }

    /// Ends it with SIGKILL, which leaves it no chance to clean up.
    ///
    /// # Errors
    /// Those of kill(2).
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(STOP_LIMIT).map(drop)
    }

    /// Waits until the fill rings of so many NIC queues are full and nothing else is out: every chunk of closed sockets is back.
    ///
    /// # Errors
    /// If that does not come to be.
    pub fn chunks_are_back(&self, queues: u64) -> Result<()> {
        wait_for(
            "every chunk in its place",
            Duration::from_secs(20),
            Duration::from_millis(20),
            || {
                let memory = &self.query("stats")?["frame_memory"];
                let count = |state: &str| memory[state].as_u64();
                let there = [count("fill"), count("tx"), count("quarantined")];
                Ok((there == [Some(2048 * queues), Some(0), Some(0)]).then_some(()))
            },
        )
    }
}
