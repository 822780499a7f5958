//! qemu/libvirt/vnic-guest.xml, started by a real libvirtd, with vnicd as its systemd units start it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vnic_tests::agent::{AgentClient, Command, Reply};
use vnic_tests::binaries::{binary, source_root};
use vnic_tests::fabric::{Fabric, PEER_IPV4};
use vnic_tests::lag::Distribution;
use vnic_tests::lock::MachineLock;
use vnic_tests::process::{Process, run, tail, wait_for};
use vnic_tests::qemu::{BOOT_LIMIT, endpoint, ping_from, prepare};
use vnic_tests::scene::guest_ipv4;
use vnic_tests::traffic::bulk::{BulkPlan, BulkServer};
use vnic_tests::unit::{Activation, UnitDaemon};

const LIMIT: Duration = Duration::from_secs(30);
const PACE: Duration = Duration::from_millis(50);

/// What libvirtd needs to know: nothing of the machine's own libvirt, users, security modules or control groups.
const LIBVIRTD_CONF: &str = "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n";
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nsecurity_driver = \"none\"\n\
                         cgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n";

/// Run as the first process of namespaces of its own, so that libvirtd's folders are the test's, and whatever it starts ends with
/// it. The user that Debian's package wants is there only inside.
const START: &str = r#"
set -eu
for folder in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /etc/libvirt; do
    mkdir -p "$folder" "$1$folder"
done
cp "$1/libvirtd.conf" "$1/qemu.conf" "$1/etc/libvirt"
{ cat /etc/passwd; echo 'libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin'; } >"$1/etc/passwd"
{ cat /etc/group; echo 'libvirt-qemu:x:64055:'; echo 'kvm:x:64056:'; } >"$1/etc/group"
for place in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /etc/libvirt /etc/passwd /etc/group; do
    mount --bind "$1$place" "$place"
done
libvirtd &
wait
"#;

/// A libvirtd of our own; all that it started ends when this is dropped.
struct Libvirt {
    folder: PathBuf,
    process: Process,
}

impl Libvirt {
    fn start(folder: &Path) -> Result<Libvirt> {
        let sockets = format!("unix_sock_dir = \"{}\"\n", folder.display());
        fs::write(folder.join("libvirtd.conf"), format!("{sockets}{LIBVIRTD_CONF}"))?;
        fs::write(folder.join("qemu.conf"), QEMU_CONF)?;
        let mut command = Program::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", START, "libvirtd"])
            .arg(folder);
        let mut process = Process::start("libvirtd", command, &folder.join("libvirtd.log"))?;
        wait_for("libvirtd's socket", LIMIT, PACE, || {
            process.must_run()?;
            Ok(folder.join("libvirt-sock").exists().then_some(()))
        })?;
        let folder = folder.to_owned();
        Ok(Libvirt { folder, process })
    }

    fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let socket = self.folder.join("libvirt-sock");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        run(Program::new("virsh").args(["--connect", &uri]).args(arguments))
            .with_context(|| format!("libvirtd's last words:\n{}", tail(self.process.log(), 20)))
    }
}

/// The example with this test's paths and a port for the agent. Each change must hit exactly one place.
fn domain(folder: &Path, socket: &Path, accelerator: &str) -> Result<String> {
    let mut xml = fs::read_to_string(source_root().join("qemu/libvirt/vnic-guest.xml"))?;
    let cache =
        std::env::var_os("VNIC_CACHE").map_or_else(|| source_root().join(".cache/guest"), PathBuf::from);
    let agent = format!(
        "</serial><serial type='unix'><source mode='bind' path='{}'/><target port='1'/></serial>",
        folder.join("agent").display()
    );
    let image = |file: &str| format!(">{}<", cache.join(file).display());
    let mut changes = vec![
        (
            ">/var/lib/libvirt/images/vnic-guest/vmlinuz<".to_owned(),
            image("vmlinuz"),
        ),
        (
            ">/var/lib/libvirt/images/vnic-guest/initramfs.gz<".to_owned(),
            image("initramfs.gz"),
        ),
        (
            "'/run/vnic/web.sock'".to_owned(),
            format!("'{}'", socket.display()),
        ),
        (" vnic.shell".to_owned(), String::new()),
        ("</serial>".to_owned(), agent),
    ];
    if accelerator == "tcg" {
        // As the example says what to do without KVM.
        changes.push(("<domain type='kvm'".to_owned(), "<domain type='qemu'".to_owned()));
        changes.push(("its queues.\n".to_owned(), "its queues. -->\n".to_owned()));
        changes.push((
            "</qemu:override>\n  -->".to_owned(),
            "</qemu:override>".to_owned(),
        ));
    }
    for (from, to) in changes {
        ensure!(
            xml.matches(&from).count() == 1,
            "`{from}` is not once in the example"
        );
        xml = xml.replace(&from, &to);
    }
    Ok(xml)
}

#[test]
fn libvirt_starts_the_example_and_its_traffic_passes() -> Result<()> {
    let _machine = MachineLock::acquire()?;
    let accelerator = prepare()?;
    let fabric = Fabric::new(2, 1, Distribution::Lag)?;
    let folder = tempfile::tempdir()?;
    let arguments = [
        "--port",
        "name=web,socket=activation,mac=52:54:00:00:00:01",
        "--nic",
        "up0",
        "--nic",
        "up1",
        "--topology",
        "lag",
    ];
    let mut activation = Activation::named(&["web"], &arguments).within(&fabric.host);
    activation.confined = true;
    // QEMU's own connection starts vnicd.
    let mut daemon = UnitDaemon::listen(folder.path(), &activation)?;

    let libvirt = Libvirt::start(folder.path())?;
    let xml = folder.path().join("vnic-guest.xml");
    fs::write(&xml, domain(folder.path(), &daemon.socket("web"), &accelerator)?)?;
    libvirt.virsh(&["create", "--validate", &xml.display().to_string()])?;
    daemon.wait_told("READY=1")?;
    daemon.wait_told("1 of 1 ports connected")?;

    let agent = AgentClient::connect(&folder.path().join("agent"))?;
    ensure!(
        agent.wait_boots(1, BOOT_LIMIT)?,
        "the guest did not boot:\n{}",
        libvirt.virsh(&["dominfo", "vnic-guest"])?
    );
    let addresses = vec![format!("{}/24", guest_ipv4(0))];
    agent.call(
        Command::Configure {
            interface: "eth0".to_owned(),
            addresses,
            mac: None,
            mtu: None,
            queue_pairs: None,
        },
        LIMIT,
    )?;
    let stats = || {
        let control = folder.path().join("control.sock");
        run(Program::new(binary("vnic")?)
            .arg("--control")
            .arg(control)
            .arg("stats"))
    };
    wait_for("answers from the guest", LIMIT, PACE, || {
        Ok((ping_from(&fabric.peer, &guest_ipv4(0), 1, 1400)? == 1).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", stats(), tail(daemon.process().log(), 30)))?;
    let _server = fabric.peer.run(|| Ok(BulkServer::start(9)?))?;
    let plan = BulkPlan {
        target: endpoint(PEER_IPV4, 9)?,
        bytes: 3_000_001,
        seed: 5,
    };
    let Reply::Bulk(report) = agent.call(Command::Bulk { plan }, Duration::from_secs(60))? else {
        panic!("another answer than a report");
    };
    assert!(report.intact, "{report:?}");

    libvirt.virsh(&["destroy", "vnic-guest"])?;
    daemon.wait_told("0 of 1 ports connected")?;
    Ok(())
}
