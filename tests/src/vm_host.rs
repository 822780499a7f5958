//! A host inside a virtual machine: vnicd and a front-end run in it over NICs with a real driver (virtio_net), which filter what they
//! receive, have several queues and can do zero-copy. Outside, an echo is behind each NIC.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use tempfile::TempDir;

use crate::binaries::{binary, source_root};
use crate::frontend::Report;
use crate::frontend::frames::{self, Addresses};
use crate::ledger::Arrival;
use crate::lock::MachineLock;
use crate::netns::Netns;
use crate::process::{run, wait_for};
use crate::qemu::{Guest, GuestOptions};
use crate::sys::PacketSocket;
use crate::traffic::raw;

/// The guest behind vnicd, and the echo behind each NIC.
pub const ADDRESSES: Addresses = Addresses {
    guest: [0x52, 0x54, 0, 0, 0, 1],
    peer: [0x52, 0x54, 0, 0, 0xff, 1],
};
/// The same as text.
pub const GUEST_MAC: &str = "52:54:00:00:00:01";
const PEER_MAC: &str = "52:54:00:00:ff:01";

const COMMAND_LIMIT: Duration = Duration::from_secs(90);
const PACE: Duration = Duration::from_millis(50);

/// Which kernel the host inside the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The one of this machine's Debian release.
    Release,
    /// Debian's newest, from backports.
    Newest,
}

#[derive(Debug, Default)]
struct EchoCounters {
    answered: AtomicU64,
    damaged: AtomicU64,
    stop: AtomicBool,
    /// What has arrived and was not answered: everything, once this is there.
    written_down: Mutex<Option<Vec<(u32, Instant)>>>,
}

impl EchoCounters {
    fn written_down(&self) -> MutexGuard<'_, Option<Vec<(u32, Instant)>>> {
        self.written_down.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame down, unless frames are to be answered.
    fn wrote_down(&self, number: u32) -> bool {
        let mut written = self.written_down();
        if let Some(list) = &mut *written {
            list.push((number, Instant::now()));
        }
        written.is_some()
    }
}

/// Answers the front-end's frames behind one NIC, or writes down when they came, and checks every byte of them.
#[derive(Debug)]
pub struct Echo {
    counters: Arc<EchoCounters>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Answers what has [`ADDRESSES`] from now on, until it is dropped.
    #[must_use]
    pub fn start(socket: PacketSocket) -> Echo {
        Echo::between(socket, ADDRESSES)
    }

    /// The same with other addresses.
    #[must_use]
    pub fn between(socket: PacketSocket, addresses: Addresses) -> Echo {
        let counters = Arc::new(EchoCounters::default());
        let shared = Arc::clone(&counters);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 4096];
            while !shared.stop.load(Ordering::Relaxed) {
                let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut waiting, PollTimeout::from(20u8));
                while let Ok(Some(length)) = socket.receive(&mut buffer) {
                    let frame = &buffer[..length];
                    let Some(number) = frames::number(frame) else {
                        continue;
                    };
                    if frame != frames::request(addresses, number) {
                        shared.damaged.fetch_add(1, Ordering::Relaxed);
                    } else if !shared.wrote_down(number)
                        && socket.send(&frames::reply(addresses, number)).is_ok()
                    {
                        shared.answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        Echo {
            counters,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.counters.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A running host, and what is around it.
pub struct VmHost {
    guest: Guest,
    echoes: Vec<Echo>,
    monitor: UnixStream,
    outside: Netns,
    nics: usize,
    _folder: TempDir,
    _lock: MachineLock,
}

fn image(kernel: Kernel) -> Result<(PathBuf, PathBuf)> {
    let mut command = Command::new(source_root().join("qemu/build-host-image.sh"));
    if kernel == Kernel::Newest {
        command.arg("--newest");
    }
    for program in ["vnicd", "vnic"] {
        command.arg(binary(program)?);
    }
    // Not in VNIC_BIN_DIR: cargo builds it for the tests.
    command.arg(front_end()?);
    let printed = run(&mut command)?;
    let mut lines = printed.lines().map(PathBuf::from);
    match (lines.next(), lines.next()) {
        (Some(kernel), Some(initrd)) => Ok((kernel, initrd)),
        _ => bail!("qemu/build-host-image.sh printed no paths: {printed}"),
    }
}

fn front_end() -> Result<PathBuf> {
    // Tests are in deps/, next to the folder of the programs.
    let test = std::env::current_exe()?;
    let folders = test.ancestors().skip(1).take(2);
    let found = folders
        .map(|folder| folder.join("vnic-front-end"))
        .find(|path| path.is_file());
    found.context("vnic-front-end has not been built: run `cargo build -p vnic-tests`")
}

impl VmHost {
    /// Boots a host with `nics` NICs `eth0`, `eth1`, ... of `queues` queues each, and an echo behind each.
    ///
    /// # Errors
    /// If it does not boot, or anything around it cannot be made.
    pub fn boot(kernel: Kernel, nics: usize, queues: u32) -> Result<VmHost> {
        let image = image(kernel)?;
        let lock = MachineLock::acquire()?;
        let folder = TempDir::new()?;
        let outside = Netns::create("outside")?;
        outside.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        let monitor = folder.path().join("monitor");
        let mut options = GuestOptions::new("host", Vec::new());
        options.image = Some(image);
        options.memory = "768M".to_owned();
        options.namespace = Some(outside.name().to_owned());
        options.arguments = vec![
            "-monitor".to_owned(),
            format!("unix:{},server=on,wait=off", monitor.display()),
        ];
        let mut echoes = Vec::new();
        for nic in 0..nics {
            let tap = format!("tap{nic}");
            let mut add = vec!["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"];
            if queues > 1 {
                add.push("multi_queue");
            }
            outside.ip(&add)?;
            outside.ip(&["link", "set", &tap, "up", "arp", "off", "txqueuelen", "10000"])?;
            echoes.push(Echo::start(outside.run(|| Ok(PacketSocket::open(&tap)?))?));
            options.arguments.extend(nic_arguments(nic, &tap, queues));
        }
        let guest = Guest::boot(folder.path(), &options)?;
        let host = VmHost {
            guest,
            echoes,
            monitor: UnixStream::connect(&monitor).context("connecting to QEMU's monitor")?,
            outside,
            nics,
            _folder: folder,
            _lock: lock,
        };
        for nic in 0..nics {
            host.guest.configure(&format!("eth{nic}"), &[])?;
        }
        Ok(host)
    }

    /// Runs a line of shell in the host and returns what it wrote to stdout.
    ///
    /// # Errors
    /// If it ends with another status than 0.
    pub fn shell(&self, line: &str) -> Result<String> {
        let output = self.guest.run(&["sh", "-c", line], COMMAND_LIMIT)?;
        ensure!(output.status == 0, "`{line}` in the host: {output:?}");
        Ok(output.stdout)
    }

    /// Starts vnicd over all NICs, each with `nic_options`, with further arguments, and waits until it answers.
    ///
    /// # Errors
    /// If it does not; with its log.
    pub fn start_vnicd(&self, workers: u32, nic_options: &str, arguments: &str) -> Result<()> {
        let nics: String = (0..self.nics)
            .map(|nic| format!(" --nic eth{nic},{nic_options}"))
            .collect();
        let topology = if self.nics > 1 { " --topology lag" } else { "" };
        self.shell(&format!(
            "vnicd --port name=p,socket=/tmp/p.sock,mac={GUEST_MAC}{nics}{topology} --workers {workers} --poll adaptive \
             --control /tmp/control.sock --state-dir /tmp/state {arguments} >/tmp/vnicd.log 2>&1 & echo $! >/tmp/vnicd.pid"
        ))?;
        wait_for("vnicd in the host", COMMAND_LIMIT, PACE, || {
            if self.query("nics").is_ok() {
                return Ok(Some(()));
            }
            self.shell("kill -0 $(cat /tmp/vnicd.pid)")?;
            Ok(None)
        })
        .with_context(|| format!("its log:\n{}", self.log().unwrap_or_default()))
    }

    /// Ends vnicd with a signal and waits until it is gone.
    ///
    /// # Errors
    /// If it is still there in the end.
    pub fn stop_vnicd(&self, signal: &str) -> Result<()> {
        self.shell(&format!("kill -{signal} $(cat /tmp/vnicd.pid)"))?;
        wait_for("the end of vnicd", Duration::from_secs(20), PACE, || {
            let there = self.shell("kill -0 $(cat /tmp/vnicd.pid) 2>/dev/null && echo there || echo gone")?;
            Ok((there.trim() == "gone").then_some(()))
        })
    }

    /// What vnicd has written.
    ///
    /// # Errors
    /// If there is no log.
    pub fn log(&self) -> Result<String> {
        self.shell("cat /tmp/vnicd.log")
    }

    /// Asks vnicd with `vnic COMMAND --json`.
    ///
    /// # Errors
    /// With what `vnic` said.
    pub fn query(&self, command: &str) -> Result<Value> {
        let written = self.shell(&format!("vnic --control /tmp/control.sock {command} --json"))?;
        Ok(serde_json::from_str(&written)?)
    }

    /// Waits until vnicd calls a NIC alive, or not.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_alive(&self, nic: usize, alive: bool) -> Result<()> {
        wait_for(
            &format!("alive={alive} of eth{nic}"),
            Duration::from_secs(15),
            PACE,
            || Ok((self.query("nics")?["nics"][nic]["alive"] == alive).then_some(())),
        )
    }

    fn front_end(arguments: &str) -> String {
        format!("vnic-front-end --socket /tmp/p.sock --mac {GUEST_MAC} --peer {PEER_MAC} {arguments}")
    }

    /// Has the front-end exchange frames with the echoes.
    ///
    /// # Errors
    /// If a frame was lost or damaged on either way.
    pub fn exchange(&self, arguments: &str) -> Result<Report> {
        let written = self.shell(&Self::front_end(arguments));
        self.undamaged()?;
        Ok(serde_json::from_str(&written?)?)
    }

    /// As [`VmHost::exchange`], without waiting for its end.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_exchange(&self, arguments: &str) -> Result<()> {
        let command = Self::front_end(arguments);
        self.shell(&format!(
            "({command} >/tmp/report 2>&1; mv /tmp/report /tmp/done) >/dev/null 2>&1 &"
        ))
        .map(drop)
    }

    /// The outcome of the exchange that [`VmHost::start_exchange`] began.
    ///
    /// # Errors
    /// As those of [`VmHost::exchange`].
    pub fn finish_exchange(&self) -> Result<Report> {
        let written = wait_for("the end of the exchange", COMMAND_LIMIT, PACE, || {
            let written = self.shell("cat /tmp/done 2>/dev/null || echo")?;
            Ok((!written.trim().is_empty()).then_some(written))
        })?;
        self.undamaged()?;
        serde_json::from_str(&written).with_context(|| format!("the front-end failed: {written}"))
    }

    /// Has the front-end send `rate` frames a second until [`VmHost::finish_stream`]. Nobody answers them from now on: what arrives is
    /// written down.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_stream(&self, rate: u32) -> Result<()> {
        for echo in &self.echoes {
            *echo.counters.written_down() = Some(Vec::new());
        }
        let command = Self::front_end(&format!("--stream {rate}"));
        self.shell(&format!("{command} >/tmp/sent 2>&1 & echo $! >/tmp/stream.pid"))
            .map(drop)
    }

    /// Ends the stream and returns how many frames vnicd took from the front-end.
    ///
    /// # Errors
    /// If the front-end failed.
    pub fn finish_stream(&self) -> Result<u32> {
        self.shell("kill -TERM $(cat /tmp/stream.pid)")?;
        let written = wait_for("the end of the stream", COMMAND_LIMIT, PACE, || {
            let written = self.shell("cat /tmp/sent")?;
            Ok((!written.trim().is_empty()).then_some(written))
        })?;
        self.undamaged()?;
        written
            .trim()
            .parse()
            .with_context(|| format!("the front-end failed: {written}"))
    }

    /// What of the stream has arrived so far, in the order of time.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Arrival> {
        let mut all = Vec::new();
        for (nic, echo) in self.echoes.iter().enumerate() {
            let written = echo.counters.written_down();
            let list = written.as_deref().unwrap_or_default().iter();
            all.extend(list.map(|&(number, at)| Arrival { nic, number, at }));
        }
        all.sort_by_key(|arrival| arrival.at);
        all
    }

    /// What the front-end wrote, what vnicd counted, and its log: for a failure's message.
    #[must_use]
    pub fn circumstances(&self) -> String {
        let shown = |what: &str, text: Result<String>| match text {
            Ok(text) => format!("{what}:\n{text}\n"),
            Err(error) => format!("{what}: {error:#}\n"),
        };
        let arrived: Vec<usize> = self
            .echoes
            .iter()
            .map(|echo| echo.counters.written_down().as_deref().map_or(0, <[_]>::len))
            .collect();
        [
            format!("arrived by NIC: {arrived:?}\n"),
            shown("the front-end", self.shell("cat /tmp/sent")),
            shown("statistics", self.query("stats").map(|stats| stats.to_string())),
            shown("NICs", self.query("nics").map(|nics| nics.to_string())),
            shown("log", self.log()),
        ]
        .concat()
    }

    fn undamaged(&self) -> Result<()> {
        let damaged = |echo: &Echo| echo.counters.damaged.load(Ordering::Relaxed);
        let damaged: u64 = self.echoes.iter().map(damaged).sum();
        ensure!(damaged == 0, "{damaged} frames from the guest were damaged");
        Ok(())
    }

    /// Frames that each echo has answered.
    #[must_use]
    pub fn answered(&self) -> Vec<u64> {
        let answered = |echo: &Echo| echo.counters.answered.load(Ordering::Relaxed);
        self.echoes.iter().map(answered).collect()
    }

    /// Takes the link of a NIC away, or gives it back.
    ///
    /// # Errors
    /// If QEMU's monitor does not answer.
    pub fn set_link(&mut self, nic: usize, up: bool) -> Result<()> {
        let word = if up { "on" } else { "off" };
        self.monitor.set_read_timeout(Some(COMMAND_LIMIT))?;
        writeln!(self.monitor, "set_link nic{nic} {word}")?;
        // The prompt that follows the command's echo says that it is done.
        let (mut seen, mut buffer) = (Vec::new(), [0; 512]);
        loop {
            let count = self.monitor.read(&mut buffer)?;
            ensure!(count > 0, "QEMU closed its monitor");
            seen.extend(&buffer[..count]);
            let text = String::from_utf8_lossy(&seen);
            if let Some((_, after)) = text.rsplit_once(&format!("nic{nic} {word}"))
                && after.contains("(qemu)")
            {
                ensure!(!after.contains("rror"), "QEMU's monitor: {text}");
                return Ok(());
            }
        }
    }

    /// Sends a frame to a NIC from outside, `count` times.
    ///
    /// # Errors
    /// Those of the packet socket.
    pub fn send_to(&self, nic: usize, destination: [u8; 6], count: u32) -> Result<()> {
        let frame = raw::experimental_frame(destination, ADDRESSES.peer, b"filter");
        self.outside
            .run(|| Ok(raw::send(&format!("tap{nic}"), &frame, count)?))
    }

    /// Of 50 frames to an address, how many a NIC lets into the host.
    ///
    /// # Errors
    /// If a broadcast frame after them does not arrive.
    pub fn let_in(&self, nic: usize, destination: [u8; 6]) -> Result<u64> {
        let received = || -> Result<u64> {
            let path = format!("/sys/class/net/eth{nic}/statistics/rx_packets");
            Ok(self.shell(&format!("cat {path}"))?.trim().parse()?)
        };
        let before = received()?;
        self.send_to(nic, destination, 50)?;
        self.send_to(nic, [0xff; 6], 1)?;
        let mut last = before;
        // The broadcast frame comes last, and behind it nothing.
        let after = wait_for("a broadcast frame", Duration::from_secs(10), PACE, || {
            let now = received()?;
            let settled = now > before && now == std::mem::replace(&mut last, now);
            Ok(settled.then_some(now))
        })?;
        Ok(after - before - 1)
    }
}

fn nic_arguments(nic: usize, tap: &str, queues: u32) -> Vec<String> {
    let mut device = format!(
        "virtio-net-pci,id=nic{nic},netdev=tap{nic},mac=52:54:00:00:01:{nic:02x},iommu_platform=on,disable-legacy=on"
    );
    let mut backend = format!("tap,id={tap},ifname={tap},script=no,downscript=no");
    if queues > 1 {
        device.push_str(&format!(",mq=on,vectors={}", 2 * queues + 2));
        backend.push_str(&format!(",queues={queues}"));
    }
    ["-netdev", &backend, "-device", &device]
        .map(str::to_owned)
        .to_vec()
}
