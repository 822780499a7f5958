//! Network namespaces that vanish with their owner.

use std::fs::{self, File};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// Namespaces made by this process so far: part of their names.
static CREATED: AtomicU32 = AtomicU32::new(0);

/// A named network namespace, deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates a namespace with loopback up; `label` becomes part of its name.
    ///
    /// # Errors
    /// If `ip netns` fails: it needs root and iproute2.
    pub fn create(label: &str) -> Result<Netns> {
        sweep_abandoned();
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let name = format!("vnic-{}-{number}-{label}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))
            .context("creating a network namespace needs root")?;
        let namespace = Netns { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread of its own inside the namespace. Threads and sockets made there stay in it.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or what `work` returns.
    ///
    /// # Panics
    /// If `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let file =
                    File::open(format!("/run/netns/{}", self.name)).context("opening the namespace")?;
                setns(&file, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
                work()
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command that will run inside the namespace, with that namespace's /sys.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs `ip` on the namespace.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments))
    }

    /// Writes a setting below /proc/sys, as `net/ipv6/conf/all/disable_ipv6`.
    ///
    /// # Errors
    /// If there is no such setting.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.run(|| {
            fs::write(format!("/proc/sys/{path}"), value).with_context(|| format!("setting {path}={value}"))
        })
    }

    /// Adds a veth pair: `interface` here, `other_interface` in `other`, each with `queues` queues, both up. Neither end
    /// offers segmentation offloads, so that frames on the pair have the size they would have on a wire.
    ///
    /// # Errors
    /// With what `ip` or `ethtool` said.
    pub fn add_veth(&self, interface: &str, other: &Netns, other_interface: &str, queues: u32) -> Result<()> {
        let queues = queues.to_string();
        let q = ["numtxqueues", queues.as_str(), "numrxqueues", queues.as_str()];
        let mut add = vec!["link", "add", "name", interface, "netns", &self.name];
        add.extend(q);
        add.extend([
            "type",
            "veth",
            "peer",
            "name",
            other_interface,
            "netns",
            &other.name,
        ]);
        add.extend(q);
        self.ip(&add)?;
        for (namespace, end) in [(self, interface), (other, other_interface)] {
            // GRO stays: vnicd's XDP program decides about it on its end.
            run(namespace
                .command("ethtool")
                .args(["-K", end, "tso", "off", "gso", "off"]))?;
            namespace.ip(&["link", "set", end, "up", "txqueuelen", "10000"])?;
        }
        Ok(())
    }

    /// Adds an address such as `10.0.0.1/24` or `fd00::1/64`, usable at once.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn add_address(&self, interface: &str, address: &str) -> Result<()> {
        let mut arguments = vec!["addr", "add", address, "dev", interface];
        if address.contains(':') {
            arguments.push("nodad");
        }
        self.ip(&arguments)?;
        Ok(())
    }

    /// The MAC address of an interface.
    ///
    /// # Errors
    /// If there is no such interface.
    pub fn mac(&self, interface: &str) -> Result<String> {
        let shown = self.ip(&["-json", "link", "show", "dev", interface])?;
        let links: serde_json::Value = serde_json::from_str(&shown)?;
        match links[0]["address"].as_str() {
            Some(mac) => Ok(mac.to_owned()),
            None => bail!("no MAC address on {interface}: {shown}"),
        }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Nothing more can be done about a failure here; the next run sweeps what is left.
        let _ = run(Command::new("ip").args(["netns", "del", &self.name]));
    }
}

/// Deletes namespaces of fixtures whose process is gone (it was killed before it could clean up).
fn sweep_abandoned() {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix("vnic-")
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if let Some(owner) = owner
            && !std::path::Path::new(&format!("/proc/{owner}")).exists()
        {
            let _ = run(Command::new("ip").args(["netns", "del", &name]));
        }
    }
}
