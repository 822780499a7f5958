//! QEMU guests, started with the same script that an operator uses.

mod requests;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::agent::{AgentClient, Command};
use crate::binaries::source_root;
use crate::process::{Process, run, tail, wait_for};

/// How long a guest may take to boot: seconds on an idle machine, much longer on a busy one without KVM.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long the agent may take to answer what needs no time of its own.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// One NIC of a guest.
#[derive(Debug, Clone)]
pub struct Vnic {
    /// vnicd's socket.
    pub socket: PathBuf,
    /// The guest's MAC address.
    pub mac: String,
    /// Queue pairs.
    pub queues: u32,
    /// Packed rings (VIRTIO_F_RING_PACKED) are offered to the guest.
    pub packed: bool,
}

impl Vnic {
    /// A NIC with one queue pair and split rings.
    #[must_use]
    pub fn new(socket: PathBuf, mac: &str) -> Vnic {
        Vnic {
            socket,
            mac: mac.to_owned(),
            queues: 1,
            packed: false,
        }
    }
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// Its name, for messages and files.
    pub name: String,
    /// Its NICs, `eth0` first.
    pub vnics: Vec<Vnic>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Another kernel and initramfs than the small guest's.
    pub image: Option<(PathBuf, PathBuf)>,
    /// Guest memory, as QEMU takes it.
    pub memory: String,
    /// The network namespace that QEMU runs in.
    pub namespace: Option<String>,
    /// Further arguments for QEMU.
    pub arguments: Vec<String>,
}

impl GuestOptions {
    /// A guest with two CPUs and these NICs.
    #[must_use]
    pub fn new(name: &str, vnics: Vec<Vnic>) -> GuestOptions {
        GuestOptions {
            name: name.to_owned(),
            vnics,
            cpus: 2,
            image: None,
            memory: "256M".to_owned(),
            namespace: None,
            arguments: Vec::new(),
        }
    }
}

/// The outcome of preparing the image and the KVM probe, once a process.
static PREPARED: OnceLock<Result<String, String>> = OnceLock::new();

/// Builds the guest image if need be and says which accelerator guests use here (`kvm` or `tcg`).
///
/// # Errors
/// With what the scripts said.
pub fn prepare() -> Result<String> {
    let prepared = PREPARED.get_or_init(|| {
        let scripts = source_root().join("qemu");
        run(&mut Program::new(scripts.join("build-guest-image.sh")))
            .and_then(|_| run(Program::new(scripts.join("launch.sh")).arg("--probe")))
            .map(|accelerator| accelerator.trim().to_owned())
            .map_err(|error| format!("{error:#}"))
    });
    match prepared {
        Ok(accelerator) => Ok(accelerator.clone()),
        Err(reason) => bail!("no guest image: {reason}"),
    }
}

/// As [`prepare`], with the scripts' progress on stderr for whoever watches.
///
/// # Errors
/// With what the scripts said.
pub fn prepare_visibly() -> Result<String> {
    let scripts = source_root().join("qemu");
    for (script, arguments) in [("build-guest-image.sh", &[][..]), ("launch.sh", &["--probe"])] {
        let mut command = Program::new(scripts.join(script));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let status = command.status().with_context(|| format!("starting {script}"))?;
        ensure!(status.success(), "qemu/{script} failed: see above");
    }
    prepare()
}

/// A running guest; killed when dropped.
pub struct Guest {
    name: String,
    process: Process,
    agent: AgentClient,
    console: PathBuf,
    monitor: PathBuf,
}

impl Guest {
    /// Starts a guest, with its files in `folder`, and waits until its agent is there.
    ///
    /// # Errors
    /// If it does not boot in time; the error holds the end of its console.
    pub fn boot(folder: &Path, options: &GuestOptions) -> Result<Guest> {
        let guest = Guest::launch(folder, options)?;
        guest.booted(1)
    }

    /// Starts a guest without waiting for its boot.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn launch(folder: &Path, options: &GuestOptions) -> Result<Guest> {
        let accelerator = prepare()?;
        let file = |ending: &str| folder.join(format!("{}.{ending}", options.name));
        let (console, socket, log) = (file("console"), file("agent"), file("qemu"));
        let monitor = file("monitor");
        let script = source_root().join("qemu/launch.sh");
        let mut command = match &options.namespace {
            None => Program::new(script),
            Some(namespace) => {
                let mut command = Program::new("ip");
                command.args(["netns", "exec", namespace]).arg(script);
                command
            }
        };
        if let Some((kernel, initrd)) = &options.image {
            command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        }
        command.args([
            "--accel",
            &accelerator,
            "--name",
            &options.name,
            "--smp",
            &options.cpus.to_string(),
            "--memory",
            &options.memory,
        ]);
        command.arg("--console").arg(&console).arg("--agent").arg(&socket);
        for vnic in &options.vnics {
            let (path, mac, queues) = (vnic.socket.display(), &vnic.mac, vnic.queues);
            let packed = if vnic.packed { "on" } else { "off" };
            command
                .arg("--vnic")
                .arg(format!("socket={path},mac={mac},queues={queues},packed={packed}"));
        }
        command.arg("--").args(&options.arguments);
        command.args([
            "-monitor",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ]);
        let mut process = Process::start(&options.name, command, &log)?;
        let agent = wait_for(
            "QEMU's agent port",
            Duration::from_secs(20),
            Duration::from_millis(10),
            || {
                process.must_run()?;
                Ok(if socket.exists() {
                    AgentClient::connect(&socket).ok()
                } else {
                    None
                })
            },
        )?;
        Ok(Guest {
            name: options.name.clone(),
            process,
            agent,
            console,
            monitor,
        })
    }

    /// Waits until the guest has booted `boots` times in all.
    ///
    /// # Errors
    /// If it does not in time; the error holds the end of its console.
    pub fn booted(mut self, boots: u32) -> Result<Guest> {
        self.wait_boots(boots)?;
        Ok(self)
    }

    /// As [`Guest::booted`], in place.
    ///
    /// # Errors
    /// If it does not in time; the error holds the end of its console.
    pub fn wait_boots(&mut self, boots: u32) -> Result<()> {
        let end = std::time::Instant::now() + BOOT_LIMIT;
        loop {
            self.process.must_run()?;
            let there = self.agent.wait_boots(boots, Duration::from_millis(500));
            match there {
                Ok(true) => break,
                Ok(false) if std::time::Instant::now() < end => {}
                // QEMU's own end says more than the closed port.
                Err(_) if self.process.wait(Duration::from_secs(1)).is_ok() => {}
                other => {
                    let seconds = BOOT_LIMIT.as_secs();
                    let console = tail(&self.console, 30);
                    other?;
                    bail!(
                        "{} did not boot within {seconds} s. The end of its console:\n{console}",
                        self.name
                    );
                }
            }
        }
        self.agent.call(Command::Hello, ANSWER_LIMIT).map(drop)
    }

    /// The connection to its agent.
    #[must_use]
    pub fn agent(&self) -> &AgentClient {
        &self.agent
    }

    /// The QEMU process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The file that holds its console.
    #[must_use]
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// Restarts the guest's kernel and waits until the agent is there again.
    ///
    /// # Errors
    /// If it does not boot in time.
    pub fn reboot(&mut self) -> Result<()> {
        let boots = self.agent.boots();
        self.agent.tell(Command::Reboot)?;
        self.wait_boots(boots + 1)
    }

    /// Pauses the machine and lets it go on, whereupon its rings are stopped and started where they stood.
    ///
    /// # Errors
    /// If QEMU's monitor does not say that the machine runs.
    pub fn pause_and_resume(&self) -> Result<()> {
        self.command("stop\ncont")
    }

    /// Has QEMU announce the guest to the network, as it does after a migration.
    ///
    /// # Errors
    /// If QEMU's monitor does not answer.
    pub fn announce(&self) -> Result<()> {
        self.command("announce_self")
    }

    /// Gives QEMU's monitor commands, after which the machine runs.
    fn command(&self, commands: &str) -> Result<()> {
        let mut monitor = UnixStream::connect(&self.monitor).context("connecting to QEMU's monitor")?;
        monitor.set_read_timeout(Some(ANSWER_LIMIT))?;
        monitor.write_all(format!("{commands}\ninfo status\n").as_bytes())?;
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains("VM status: running") {
            let mut bytes = [0; 512];
            let count = monitor.read(&mut bytes).context("reading from QEMU's monitor")?;
            ensure!(
                count > 0,
                "QEMU's monitor closed: {}",
                String::from_utf8_lossy(&said)
            );
            said.extend_from_slice(&bytes[..count]);
        }
        Ok(())
    }
}

/// How many answers ping counted: "3 packets transmitted, 3 packets received, 0% packet loss".
fn answered(output: &str) -> Result<u32> {
    let line = output
        .lines()
        .find(|line| line.contains("transmitted"))
        .context("no summary")?;
    let part = line
        .split(", ")
        .find(|part| part.contains("received"))
        .context("no count")?;
    part.split_whitespace()
        .next()
        .context("no count")?
        .parse()
        .context("no count")
}

/// Sends `count` echo requests with the host's ping from a namespace and returns how many were answered.
///
/// # Errors
/// If ping does not run.
pub fn ping_from(namespace: &crate::netns::Netns, target: &str, count: u32, payload: u32) -> Result<u32> {
    let (count, payload) = (count.to_string(), payload.to_string());
    let arguments = ["-n", "-i", "0.1", "-W", "2", "-c", &count, "-s", &payload, target];
    // Its status tells of lost packets, which the caller wants as a number.
    let output = namespace
        .command("ping")
        .args(arguments)
        .output()
        .context("starting ping")?;
    answered(&String::from_utf8_lossy(&output.stdout))
}

/// An address and port as a socket address.
///
/// # Errors
/// If `address` is no IP address.
pub fn endpoint(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(
        address
            .parse()
            .with_context(|| format!("{address} is no IP address"))?,
        port,
    ))
}

#[cfg(test)]
mod tests {
    use super::answered;

    #[test]
    fn both_kinds_of_ping_are_understood() {
        let busybox = "\n--- 10.0.0.1 ping statistics ---\n3 packets transmitted, 2 packets received, 33% packet loss\n";
        let iputils =
            "--- ::1 ping statistics ---\n4 packets transmitted, 4 received, 0% packet loss, time 3ms\n";
        assert_eq!(answered(busybox).expect("a count"), 2);
        assert_eq!(answered(iputils).expect("a count"), 4);
        assert!(answered("ping: bad address").is_err());
    }
}
