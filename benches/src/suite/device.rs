//! The devices that are measured: each forwards between two vhost-user sockets on CPU 1.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use vnic_tests::binaries::binary;
use vnic_tests::netns::Netns;
use vnic_tests::process::{Process, tail, wait_for};

use super::ovs::Ovs;

/// The CPU of whatever is measured.
pub const DEVICE_CPU: usize = 1;
/// Addresses of the guests that the generator plays.
pub const GUEST_MACS: [&str; 2] = ["52:54:00:00:00:01", "52:54:00:00:00:02"];

/// What makes testpmd take frames of 9014 bytes.
pub const JUMBO_MBUFS: [&str; 2] = ["--max-pkt-len=9100", "--mbuf-size=9600"];

/// How long a device may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);
const PACE: Duration = Duration::from_millis(20);

/// A device that runs, or stands still while others are measured.
pub struct Device {
    process: Process,
    sockets: Vec<PathBuf>,
    /// testpmd ends when its input does.
    _input: Option<ChildStdin>,
    /// The rest of Open vSwitch.
    ovs: Option<Ovs>,
    busy: bool,
}

/// How vnicd's worker waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// `--poll busy`.
    Busy,
    /// `--poll adaptive`.
    Adaptive,
}

impl Device {
    /// vnicd with `ports` ports and these NICs, in a namespace or the caller's.
    ///
    /// # Errors
    /// If it has not been built or does not start.
    pub fn vnicd(
        folder: &Path,
        wait: Wait,
        ports: usize,
        namespace: Option<&Netns>,
        nics: &[String],
    ) -> Result<Device> {
        std::fs::create_dir_all(folder)?;
        let program = binary("vnicd")?;
        let mut command = namespace.map_or_else(|| Command::new(&program), |within| within.command(&program));
        let mut sockets = Vec::new();
        for index in 0..ports {
            let socket = folder.join(format!("p{index}.sock"));
            // Only the generator's two ports need a known address.
            let mac = GUEST_MACS
                .get(index)
                .map_or(String::new(), |mac| format!(",mac={mac}"));
            command.args([
                "--port",
                &format!("name=p{index},socket={}{mac}", socket.display()),
            ]);
            sockets.push(socket);
        }
        for nic in nics {
            command.args(["--nic", nic]);
        }
        if nics.len() > 1 {
            command.args(["--topology", "lag"]);
        }
        let poll = match wait {
            Wait::Busy => "busy",
            Wait::Adaptive => "adaptive",
        };
        let cpu = DEVICE_CPU.to_string();
        command.args(["--poll", poll, "--workers", "1", "--cpus", &cpu]);
        command.arg("--control").arg(folder.join("control.sock"));
        command.arg("--state-dir").arg(folder.join("state"));
        let process = Process::start("vnicd", command, &folder.join("log"))?;
        let device = Device {
            process,
            sockets,
            _input: None,
            ovs: None,
            busy: wait == Wait::Busy,
        };
        device.started(&folder.join("control.sock"))
    }

    /// testpmd that forwards between two vhost-user ports, whose mbufs take frames of up to 9014 bytes if `jumbo`.
    ///
    /// # Errors
    /// If it is not installed or does not start.
    pub fn testpmd(folder: &Path, jumbo: bool) -> Result<Device> {
        std::fs::create_dir_all(folder)?;
        let sockets = vec![folder.join("s0"), folder.join("s1")];
        let mut devices = Vec::new();
        for (index, socket) in sockets.iter().enumerate() {
            devices.push(format!("net_vhost{index},iface={}", socket.display()));
        }
        let more: &[&str] = if jumbo { &JUMBO_MBUFS } else { &[] };
        Device::testpmd_of(folder, None, &devices, sockets, more)
    }

    /// testpmd that forwards between a vhost-user port and a NIC by AF_XDP.
    ///
    /// # Errors
    /// If it is not installed or does not start.
    pub fn testpmd_to_nic(folder: &Path, namespace: &Netns, nic: &str) -> Result<Device> {
        std::fs::create_dir_all(folder)?;
        let socket = folder.join("s0");
        let devices = [
            format!("net_vhost0,iface={}", socket.display()),
            format!("net_af_xdp0,iface={nic}"),
        ];
        Device::testpmd_of(folder, Some(namespace), &devices, vec![socket], &[])
    }

    fn testpmd_of(
        folder: &Path,
        namespace: Option<&Netns>,
        devices: &[String],
        sockets: Vec<PathBuf>,
        more: &[&str],
    ) -> Result<Device> {
        let mut command = namespace.map_or_else(
            || Command::new("dpdk-testpmd"),
            |within| within.command("dpdk-testpmd"),
        );
        command.args(["--lcores", &format!("0@{DEVICE_CPU},1@{DEVICE_CPU}")]);
        command.args(["--no-pci", "--in-memory", "--no-telemetry"]);
        for device in devices {
            command.args(["--vdev", device]);
        }
        command
            .args(["--", "--forward-mode=io", "--total-num-mbufs=16384"])
            .args(more);
        let (process, input) = Process::start_with_input("testpmd", command, &folder.join("log"))
            .context("starting dpdk-testpmd (Debian: dpdk-dev)")?;
        let ready = sockets[0].clone();
        let device = Device {
            process,
            sockets,
            _input: Some(input),
            ovs: None,
            busy: true,
        };
        device.started(&ready)
    }

    /// Open vSwitch with a DPDK datapath that learns addresses.
    ///
    /// # Errors
    /// If it can be neither found nor fetched, or does not start.
    pub fn ovs(folder: &Path) -> Result<Device> {
        std::fs::create_dir_all(folder)?;
        let (ovs, process) = Ovs::start(folder, DEVICE_CPU)?;
        let sockets = ovs.sockets();
        let ready = sockets[1].clone();
        let device = Device {
            process,
            sockets,
            _input: None,
            ovs: Some(ovs),
            busy: true,
        };
        device.started(&ready)
    }

    /// Waits until `socket` is there, and stands still then.
    fn started(mut self, socket: &Path) -> Result<Device> {
        wait_for("the device's sockets", START_LIMIT, PACE, || {
            self.process.must_run()?;
            Ok(socket.exists().then_some(()))
        })
        .with_context(|| format!("the end of its log:\n{}", tail(self.process.log(), 5)))?;
        // vnicd's control socket is there last, and answers once all is.
        if socket.ends_with("control.sock") {
            wait_for("vnicd's answer", START_LIMIT, PACE, || {
                Ok(UnixStream::connect(socket).ok())
            })?;
        }
        self.stand_still()?;
        Ok(self)
    }

    /// Its vhost-user sockets.
    #[must_use]
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Whether it takes all of its CPU, with or without a load.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Takes no CPU until it goes on.
    ///
    /// # Errors
    /// If it has ended.
    pub fn stand_still(&mut self) -> Result<()> {
        self.process.must_run()?;
        self.process.signal(Signal::SIGSTOP)
    }

    /// Goes on.
    ///
    /// # Errors
    /// If it has ended.
    pub fn go_on(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)?;
        self.process.must_run()
    }

    /// Runs `work` while it goes on.
    ///
    /// # Errors
    /// Those of `work`, or if the device has ended.
    pub fn while_running<T>(&mut self, work: impl FnOnce(&Device) -> Result<T>) -> Result<T> {
        self.go_on()?;
        let outcome = work(self);
        self.stand_still().context("after a load")?;
        outcome
    }

    /// Takes frames of 9014 bytes from now on; only Open vSwitch has to be told.
    ///
    /// # Errors
    /// If it refuses.
    pub fn take_jumbo_frames(&mut self) -> Result<()> {
        if self.ovs.is_none() {
            return Ok(());
        }
        self.go_on()?;
        let outcome = self.ovs.as_ref().map_or(Ok(()), Ovs::take_jumbo_frames);
        self.stand_still()?;
        outcome
    }
}
