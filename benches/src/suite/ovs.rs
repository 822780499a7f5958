//! Open vSwitch with its DPDK datapath, from Debian's packages, which are unpacked and not installed: installing them would start a
//! switch on the host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vnic_tests::netns::Netns;
use vnic_tests::process::{Process, run, wait_for};

/// What is unpacked.
const PACKAGES: [&str; 3] = [
    "openvswitch-switch-dpdk",
    "openvswitch-switch",
    "openvswitch-common",
];
const LIMIT: Duration = Duration::from_secs(20);

/// Its database, and where the parts are.
pub struct Ovs {
    folder: PathBuf,
    root: PathBuf,
    // The database ends before the namespace.
    _database: Process,
    namespace: Netns,
}

impl Ovs {
    /// Starts it in a namespace of its own with two `dpdkvhostuser` ports on a bridge; returns the switch's process beside it.
    ///
    /// # Errors
    /// If the packages cannot be had, or it does not start.
    pub fn start(folder: &Path, cpu: usize) -> Result<(Ovs, Process)> {
        let root = packages(&vnic_tests::binaries::source_root().join("target/bench/ovs"))?;
        // Its bridge is an interface as well.
        let namespace = Netns::create("ovs")?;
        let database = folder.join("conf.db");
        let _ = std::fs::remove_file(&database);
        run(Command::new(root.join("usr/bin/ovsdb-tool"))
            .arg("create")
            .arg(&database)
            .arg(root.join("usr/share/openvswitch/vswitch.ovsschema")))?;
        let mut command = namespace.command(root.join("usr/sbin/ovsdb-server"));
        command
            .env("OVS_RUNDIR", folder)
            .arg(&database)
            .arg(format!("--remote=punix:{}", folder.join("db.sock").display()))
            .arg(format!("--unixctl={}", folder.join("db.ctl").display()));
        let server = Process::start("ovsdb-server", command, &folder.join("db.log"))?;
        let ovs = Ovs {
            folder: folder.to_owned(),
            root,
            _database: server,
            namespace,
        };
        wait_for("ovsdb-server's socket", LIMIT, Duration::from_millis(20), || {
            Ok(folder.join("db.sock").exists().then_some(()))
        })?;
        ovs.vsctl(&["--no-wait", "init"])?;
        ovs.vsctl(&[
            "--no-wait",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:dpdk-lcore-mask=0x1",
            &format!("other_config:pmd-cpu-mask={:#x}", 1u64 << cpu),
            "other_config:dpdk-socket-mem=256",
            "other_config:dpdk-extra=--no-pci --in-memory",
            // Frames between two ports take one of both ways: nothing to balance.
            "other_config:pmd-auto-lb=false",
        ])?;
        let mut command = ovs
            .namespace
            .command(ovs.root.join("usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"));
        command
            .env("OVS_RUNDIR", folder)
            .arg(format!("unix:{}", folder.join("db.sock").display()))
            .arg(format!("--unixctl={}", folder.join("switch.ctl").display()));
        let switch = Process::start("ovs-vswitchd", command, &folder.join("log"))?;
        ovs.vsctl(&[
            "--timeout=30",
            "add-br",
            "br0",
            "--",
            "set",
            "bridge",
            "br0",
            "datapath_type=netdev",
        ])
        .with_context(|| {
            format!(
                "the end of its log:\n{}",
                vnic_tests::process::tail(&folder.join("log"), 5)
            )
        })?;
        for port in ["s0", "s1"] {
            ovs.vsctl(&[
                "--timeout=30",
                "add-port",
                "br0",
                port,
                "--",
                "set",
                "Interface",
                port,
                "type=dpdkvhostuser",
            ])?;
        }
        Ok((ovs, switch))
    }

    /// Its vhost-user sockets.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        ["s0", "s1"].iter().map(|name| self.folder.join(name)).collect()
    }

    /// Takes frames of 9014 bytes.
    ///
    /// # Errors
    /// With what ovs-vsctl said.
    pub fn take_jumbo_frames(&self) -> Result<()> {
        for port in ["s0", "s1"] {
            self.vsctl(&["--timeout=30", "set", "Interface", port, "mtu_request=9000"])?;
        }
        Ok(())
    }

    fn vsctl(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.namespace.command(self.root.join("usr/bin/ovs-vsctl"));
        command.env("OVS_RUNDIR", &self.folder);
        command.arg(format!("--db=unix:{}", self.folder.join("db.sock").display()));
        run(command.args(arguments)).map(drop)
    }
}

/// Unpacks the packages into `folder` unless that was done before; returns the root of what they hold.
fn packages(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.join("complete").exists() {
        return Ok(root);
    }
    std::fs::create_dir_all(&root)?;
    run(Command::new("apt-get")
        .arg("download")
        .args(PACKAGES)
        .current_dir(folder))
    .context("fetching Open vSwitch from Debian (`apt-get update` may help)")?;
    let mut unpacked = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(&path).arg(&root))?;
            unpacked += 1;
        }
    }
    ensure!(
        unpacked >= PACKAGES.len(),
        "apt-get fetched {unpacked} of {} packages",
        PACKAGES.len()
    );
    let needs = run(Command::new("ldd").arg(root.join("usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk")))?;
    let missing: Vec<&str> = needs
        .lines()
        .filter(|line| line.contains("not found"))
        .map(str::trim)
        .collect();
    ensure!(
        missing.is_empty(),
        "Open vSwitch lacks libraries: {}",
        missing.join(", ")
    );
    std::fs::write(root.join("complete"), "")?;
    Ok(root)
}
