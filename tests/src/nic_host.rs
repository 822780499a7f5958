//! A host with two NICs on which nobody but vnicd is: for tests of what becomes of NICs and of the daemon, not of traffic.

use anyhow::{Context, Result};

use crate::binaries::binary;
use crate::daemon::{Daemon, DaemonOptions};
use crate::netns::Netns;
use crate::process::run;

/// The address of the guest that the daemon has a port for.
pub const GUEST: &str = "52:54:00:00:00:01";

/// NICs `up0` and `up1` with up to two queues, one in use.
pub struct NicHost {
    /// Where the NICs are.
    pub host: Netns,
    /// Where their other ends `far0` and `far1` are.
    pub far: Netns,
    /// For sockets, state and logs.
    pub folder: tempfile::TempDir,
}

impl NicHost {
    /// With nothing in it but the NICs.
    ///
    /// # Errors
    /// If there are no namespaces or veth pairs to be had.
    pub fn new() -> Result<NicHost> {
        let (host, far) = (Netns::create("host")?, Netns::create("far")?);
        for nic in ["0", "1"] {
            let (near, other) = (format!("up{nic}"), format!("far{nic}"));
            host.add_veth(&near, &far, &other, 2)?;
            run(far.command("ethtool").args(["-L", &other, "rx", "1", "tx", "1"]))?;
            run(host.command("ethtool").args(["-L", &near, "rx", "1", "tx", "1"]))?;
        }
        let folder = tempfile::tempdir()?;
        Ok(NicHost { host, far, folder })
    }

    /// Starts vnicd for one guest by these NICs.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&self, nics: &[&str]) -> Result<Daemon> {
        let nics: Vec<String> = nics.iter().map(|nic| (*nic).to_owned()).collect();
        let options = DaemonOptions::new(&[("a", GUEST)], &nics, 1);
        Daemon::start(&self.host, self.folder.path(), &options)
    }

    /// Runs vnicd behind `wrapper` until it ends or `seconds` are over; returns its exit code and its log.
    ///
    /// # Errors
    /// If it cannot be run.
    ///
    /// # Panics
    /// If vnicd panicked.
    pub fn run(&self, wrapper: &[&str], arguments: &[&str], seconds: &str) -> Result<(i32, String)> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let mut command = self.host.command("timeout");
        command
            .args(["--signal=TERM", seconds])
            .args(wrapper)
            .arg(binary("vnicd")?);
        command.args(["--control", &path("c.sock"), "--state-dir", &path("state")]);
        command.args(["--socket-path", &path("a.sock")]).args(arguments);
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!log.contains("panicked"), "{log}");
        Ok((output.status.code().unwrap_or(-1), log))
    }

    /// Whether every group frame that reaches an interface is received.
    ///
    /// # Errors
    /// If there is no such interface.
    pub fn takes_all_groups(&self, nic: &str) -> Result<bool> {
        const IFF_ALLMULTI: u32 = 0x200;
        let text = run(self
            .host
            .command("cat")
            .arg(format!("/sys/class/net/{nic}/flags")))?;
        let flags = text.trim().strip_prefix("0x").context("no flags")?;
        Ok(u32::from_str_radix(flags, 16)? & IFF_ALLMULTI != 0)
    }

    /// Receive queues of an interface.
    ///
    /// # Errors
    /// If there is no such interface.
    pub fn rx_queues(&self, nic: &str) -> Result<usize> {
        let listed = run(self
            .host
            .command("ls")
            .arg(format!("/sys/class/net/{nic}/queues")))?;
        Ok(listed
            .split_whitespace()
            .filter(|name| name.starts_with("rx-"))
            .count())
    }
}
