//! DPDK's `testpmd` as a guest: its virtio-user driver connects to vnicd as a VM's front-end and driver would, and
//! forwards between that device and capture files. It shares no code with QEMU, Linux or this project.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::pcap;
use crate::process::{Process, tail, wait_for};

/// How long it may take to start, or to carry out a command, on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);
/// What it writes when it is ready for a command.
const PROMPT: &str = "testpmd> ";

/// How to start it.
#[derive(Debug, Clone)]
pub struct TestpmdOptions {
    /// Names its files.
    pub name: String,
    /// vnicd's socket.
    pub socket: PathBuf,
    /// The address of its virtio device.
    pub mac: String,
    /// Queue pairs.
    pub queues: usize,
    /// Descriptors of each ring.
    pub queue_size: u32,
    /// Further arguments of the virtio-user device, such as `mrg_rxbuf=0`.
    pub device: Vec<String>,
    /// Further arguments of the capture-file device, such as `infinite_rx=1`.
    pub files: Vec<String>,
    /// Packet buffers, and the bytes of each if not as many as a whole frame needs.
    pub buffers: (u32, Option<u32>),
    /// Memory on 2 MiB huge pages rather than ordinary ones, taken as needed: the driver changes its memory table while its
    /// rings run.
    pub huge_pages: bool,
    /// Further arguments of DPDK's environment layer.
    pub environment: Vec<String>,
}

impl TestpmdOptions {
    /// With ordinary pages, mergeable buffers, and rings that together hold 8192 frames.
    ///
    /// # Panics
    /// With more queue pairs than 64.
    #[must_use]
    pub fn new(name: &str, socket: PathBuf, mac: &str, queues: usize) -> TestpmdOptions {
        TestpmdOptions {
            name: name.to_owned(),
            socket,
            mac: mac.to_owned(),
            queues,
            queue_size: 8192 / u32::try_from(queues.next_power_of_two()).expect("few queues"),
            device: Vec::new(),
            files: Vec::new(),
            buffers: (24576, None),
            huge_pages: false,
            environment: Vec::new(),
        }
    }
}

/// What one of its devices counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Frames that testpmd received from the device.
    pub rx: u64,
    /// Frames that it gave to the device.
    pub tx: u64,
}

/// A running testpmd; killed when dropped.
pub struct Testpmd {
    process: Process,
    input: ChildStdin,
    folder: PathBuf,
    options: TestpmdOptions,
}

/// Its virtio device, for [`Testpmd::counts`].
pub const VIRTIO: u32 = 0;
/// Its capture files, for [`Testpmd::counts`].
pub const FILES: u32 = 1;

impl Testpmd {
    /// Starts it in `folder`, to inject `frames` once [`Testpmd::forward`] is called: the frames of the first vector by the
    /// first queue and so on. Its rings run when this returns, and all receive buffers are offered.
    ///
    /// # Errors
    /// If it does not start; the error holds the end of its output.
    ///
    /// # Panics
    /// If there are not as many vectors as queues.
    pub fn start(folder: &Path, options: &TestpmdOptions, frames: &[Vec<Vec<u8>>]) -> Result<Testpmd> {
        assert_eq!(
            frames.len(),
            options.queues,
            "one vector of frames for each queue"
        );
        let (name, queues) = (&options.name, options.queues);
        let file = |kind: &str, queue: usize| folder.join(format!("{name}-{kind}{queue}.pcap"));
        for (queue, frames) in frames.iter().enumerate() {
            pcap::write(&file("in", queue), frames)?;
        }
        let mut files = vec!["net_pcap0".to_owned()];
        for kind in ["in", "out"] {
            let option = if kind == "in" { "rx_pcap" } else { "tx_pcap" };
            files.extend((0..queues).map(|queue| format!("{option}={}", file(kind, queue).display())));
        }
        files.extend(options.files.iter().cloned());
        let mut device = vec![
            "net_virtio_user0".to_owned(),
            format!("path={}", options.socket.display()),
            format!("mac={}", options.mac),
            format!("queues={queues}"),
            format!("queue_size={}", options.queue_size),
        ];
        device.extend(options.device.iter().cloned());

        // Its output is read while it runs.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--no-pci", "--no-telemetry"]);
        if options.huge_pages {
            // Separate files would be more than a vhost-user message can carry.
            command.args(["--in-memory", "--single-file-segments"]);
        } else {
            command.args(["--no-huge", "--no-shconf", "-m", "128"]);
        }
        // Two threads that the scheduler may place: the machine has other work on its cores.
        command.args(["--lcores", "0@(0-1),1@(0-1)"]);
        command.args(["--file-prefix", &format!("vnic-{}-{name}", std::process::id())]);
        command.args(&options.environment);
        command.args(["--vdev", &device.join(","), "--vdev", &files.join(","), "--"]);
        let (queues, size) = (queues.to_string(), options.queue_size.to_string());
        command.args(["--rxq", &queues, "--txq", &queues, "--rxd", &size, "--txd", &size]);
        command.args(["--total-num-mbufs", &options.buffers.0.to_string()]);
        if let Some(bytes) = options.buffers.1 {
            command.args(["--mbuf-size", &bytes.to_string()]);
        }
        // Else it would throw away what it finds in the files before it starts.
        command.args(["--no-flush-rx", "--disable-device-start", "-i"]);
        let log = folder.join(format!("{name}.log"));
        let _ = fs::remove_file(&log);
        let (process, input) = Process::start_with_input(name, command, &log)
            .context("starting testpmd: run scripts/setup-environment.sh (package dpdk-dev)")?;
        let mut testpmd = Testpmd {
            process,
            input,
            folder: folder.to_owned(),
            options: options.clone(),
        };
        testpmd.prompts(1)?;
        if options.buffers.1.is_some() {
            testpmd.command("port config 0 rx_offload scatter on")?;
            testpmd.command("port config 0 tx_offload multi_segs on")?;
        }
        testpmd.start_devices()?;
        Ok(testpmd)
    }

    /// Queue pairs of its virtio device.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.options.queues
    }

    fn output(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.process.log())?).into_owned())
    }

    /// Waits until it has asked for `count` commands in all.
    fn prompts(&mut self, count: usize) -> Result<()> {
        let what = format!("prompt {count} of testpmd {}", self.options.name);
        wait_for(&what, LIMIT, Duration::from_millis(5), || {
            let prompts = self.output()?.matches(PROMPT).count();
            if prompts < count {
                self.process.must_run()?;
            }
            Ok((prompts >= count).then_some(()))
        })
        .with_context(|| format!("the end of its output:\n{}", tail(self.process.log(), 20)))
    }

    /// Gives it a command and returns what it wrote in answer.
    ///
    /// # Errors
    /// If it ends, or does not come back with a prompt.
    pub fn command(&mut self, text: &str) -> Result<String> {
        let before = self.output()?;
        writeln!(self.input, "{text}").with_context(|| format!("testpmd {}", self.options.name))?;
        self.prompts(before.matches(PROMPT).count() + 1)?;
        Ok(self.output()?[before.len()..].to_owned())
    }

    /// Starts its devices (again): the rings run, and the files are at their beginning.
    ///
    /// # Errors
    /// With what it wrote, if one does not start.
    pub fn start_devices(&mut self) -> Result<()> {
        let answer = self.command("port start all")?;
        ensure!(
            answer.contains("Checking link statuses") && !answer.to_lowercase().contains("fail"),
            "testpmd {} did not start its devices: {answer}",
            self.options.name
        );
        self.command("clear port stats all").map(drop)
    }

    /// Starts to forward between the files and the virtio device, both ways.
    ///
    /// # Errors
    /// If it ends.
    pub fn forward(&mut self) -> Result<()> {
        self.command("start").map(drop)
    }

    /// What a device has counted since its devices were started.
    ///
    /// # Errors
    /// If it ends or writes no counts.
    pub fn counts(&mut self, device: u32) -> Result<Counts> {
        let answer = self.command(&format!("show port stats {device}"))?;
        let count = |label: &str| {
            let (_, rest) = answer.split_once(label)?;
            rest.split_whitespace().next()?.parse().ok()
        };
        match (count("RX-packets:"), count("TX-packets:")) {
            (Some(rx), Some(tx)) => Ok(Counts { rx, tx }),
            _ => anyhow::bail!("testpmd {} wrote no counts: {answer}", self.options.name),
        }
    }

    /// Stops forwarding and its devices, and returns the frames that came from the virtio device since they were started,
    /// queue by queue.
    ///
    /// # Errors
    /// If it ends, or the files are not whole.
    pub fn stop(&mut self) -> Result<Vec<Vec<Vec<u8>>>> {
        self.command("stop")?;
        self.command("port stop all")?;
        let file = |queue| self.folder.join(format!("{}-out{queue}.pcap", self.options.name));
        (0..self.options.queues)
            .map(|queue| pcap::read(&file(queue)))
            .collect()
    }

    /// Ends it without warning, as a guest that crashes.
    ///
    /// # Errors
    /// Those of kill(2).
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(LIMIT).map(drop)
    }

    /// Ends it in order, and checks that it ends well.
    ///
    /// # Errors
    /// If it does not end, or not with status 0.
    pub fn quit(mut self) -> Result<()> {
        writeln!(self.input, "quit")?;
        let status = self.process.wait(LIMIT)?;
        ensure!(
            status.success(),
            "testpmd {} ended with {status}:\n{}",
            self.options.name,
            tail(self.process.log(), 20)
        );
        Ok(())
    }
}
