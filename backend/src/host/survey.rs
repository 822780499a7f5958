//! Everything about a host that decides how well vnicd will run on it, gathered without changing anything.

use std::path::Path;

use super::interface::{self, IFF_UP};
use super::memory::field_kib;
use super::netlink::ethtool::{Channels, Ethtool};
use super::netlink::link::{self, AttachedXdp, Link};
use super::netlink::netdev::{DeviceFeatures, Netdev};
use super::{channels, kernel, privileges};

const IFF_LOOPBACK: u32 = 0x8;
const IFF_LOWER_UP: u32 = 0x1_0000;
const ARPHRD_ETHER: u16 = 1;

/// The host but its NICs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// `uname -r`
    pub kernel_release: String,
    /// Major and minor number of the kernel; `None` if the release cannot be read.
    pub kernel_version: Option<(u32, u32)>,
    /// The kernel was built with CONFIG_XDP_SOCKETS.
    pub af_xdp: bool,
    /// BPF programs are compiled (`net.core.bpf_jit_enable`); `None` if not known.
    pub bpf_jit: Option<bool>,
    /// Capabilities that driving a NIC takes and that this process lacks.
    pub missing_capabilities: Vec<String>,
    /// Locked memory is not limited for this process, whatever the limit says.
    pub may_lock_memory: bool,
    /// RLIMIT_MEMLOCK in bytes; `None`: unlimited.
    pub memlock: Option<u64>,
    /// RLIMIT_NOFILE; `None`: unlimited.
    pub open_files: Option<u64>,
    /// Huge pages of the default size: all, and free ones.
    pub huge_pages: (u64, u64),
    /// The default size in KiB.
    pub huge_page_kib: u64,
    /// CPUs that are online.
    pub cpus: usize,
    /// `isolcpus=`, as a list.
    pub isolated: String,
    /// `nohz_full=`, as a list.
    pub nohz_full: String,
    /// Frequency governors of all CPUs, each once.
    pub governors: Vec<String>,
    /// irqbalance runs.
    pub irqbalance: bool,
}

/// One NIC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NicFacts {
    /// Its name.
    pub name: String,
    /// An interface of this name exists; if not, nothing else here means anything.
    pub exists: bool,
    /// It is an Ethernet interface, and not the loopback.
    pub ethernet: bool,
    /// The driver, or the kind of virtual interface.
    pub driver: Option<String>,
    /// What kind of virtual interface it is; `None` for a real NIC.
    pub kind: Option<String>,
    /// It is set up.
    pub up: bool,
    /// It has a carrier.
    pub carrier: bool,
    /// Bytes of the largest payload.
    pub mtu: u32,
    /// Receive queues in use.
    pub rx_queues: u32,
    /// Transmit queues in use.
    pub tx_queues: u32,
    /// Channels, if the driver has such a notion.
    pub channels: Option<Channels>,
    /// What the driver can do for XDP; `None`: the kernel (before 6.3) does not tell.
    pub features: Option<DeviceFeatures>,
    /// Offloads that are on, by the kernel's names.
    pub offloads: Vec<String>,
    /// How many ask for promiscuity.
    pub promiscuity: u32,
    /// An XDP program is attached.
    pub xdp: Option<AttachedXdp>,
    /// Bridge, bond or team that it is part of.
    pub master: Option<String>,
    /// The host's default route leaves by it.
    pub default_route: bool,
}

/// Looks at the host.
#[must_use]
pub fn host() -> HostFacts {
    let meminfo = read("/proc/meminfo");
    let pages = |name| field_kib(&meminfo, name).unwrap_or(0);
    let release = read("/proc/sys/kernel/osrelease").trim().to_owned();
    HostFacts {
        kernel_version: version(&release),
        kernel_release: release,
        af_xdp: kernel::check_af_xdp().is_ok(),
        bpf_jit: read("/proc/sys/net/core/bpf_jit_enable")
            .trim()
            .parse()
            .ok()
            .map(|enabled: u32| enabled > 0),
        missing_capabilities: privileges::missing(),
        may_lock_memory: privileges::may_lock_memory(),
        memlock: privileges::limit("Max locked memory"),
        open_files: privileges::limit("Max open files"),
        huge_pages: (pages("HugePages_Total"), pages("HugePages_Free")),
        huge_page_kib: pages("Hugepagesize"),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        isolated: read("/sys/devices/system/cpu/isolated").trim().to_owned(),
        nohz_full: cpu_list(&read("/sys/devices/system/cpu/nohz_full")),
        governors: governors(),
        irqbalance: runs("irqbalance"),
    }
}

/// Looks at the named interfaces, or without names at all that could be NICs: Ethernet, up, not the loopback, and not made of
/// other interfaces.
///
/// # Errors
/// If the kernel does not list its interfaces.
pub fn nics(names: &[String]) -> std::io::Result<Vec<NicFacts>> {
    let links = link::all()?;
    let mut ethtool = Ethtool::open().ok();
    let mut netdev = Netdev::open().ok();
    let mut facts = |link: &Link| nic(link, &links, ethtool.as_mut(), netdev.as_mut());
    if names.is_empty() {
        return Ok(links
            .iter()
            .filter(|link| is_candidate(link))
            .map(facts)
            .collect());
    }
    let named = |name: &String| match links.iter().find(|link| link.name == *name) {
        Some(link) => facts(link),
        None => NicFacts {
            name: name.clone(),
            ..NicFacts::default()
        },
    };
    Ok(names.iter().map(named).collect())
}

fn is_candidate(link: &Link) -> bool {
    let made_of_others = [
        "bridge", "bond", "team", "vlan", "macvlan", "ipvlan", "tun", "dummy",
    ];
    is_ethernet(link)
        && link.flags & IFF_UP != 0
        && link
            .kind
            .as_deref()
            .is_none_or(|kind| !made_of_others.contains(&kind))
}

fn is_ethernet(link: &Link) -> bool {
    link.arphrd == ARPHRD_ETHER && link.flags & IFF_LOOPBACK == 0
}

fn nic(link: &Link, all: &[Link], ethtool: Option<&mut Ethtool>, netdev: Option<&mut Netdev>) -> NicFacts {
    let master = link.master.map(|index| {
        let found = all.iter().find(|other| other.index == index);
        found.map_or_else(|| format!("interface {index}"), |found| found.name.clone())
    });
    let (channels, offloads) = match ethtool {
        Some(ethtool) => (
            ethtool.channels(link.index).ok().flatten(),
            ethtool.active_features(link.index).unwrap_or_default(),
        ),
        None => (None, Vec::new()),
    };
    let looked_up = interface::lookup(&link.name).ok();
    NicFacts {
        name: link.name.clone(),
        exists: true,
        ethernet: is_ethernet(link),
        driver: looked_up
            .as_ref()
            .and_then(|found| found.driver.clone())
            .or_else(|| link.kind.clone()),
        kind: link.kind.clone(),
        up: link.flags & IFF_UP != 0,
        carrier: link.flags & IFF_LOWER_UP != 0,
        mtu: link.mtu,
        rx_queues: channels::rx_queues(&link.name)
            .or(looked_up.as_ref().map(|found| found.rx_queues))
            .unwrap_or(0),
        tx_queues: looked_up.as_ref().map_or(0, |found| found.tx_queues),
        channels,
        features: netdev.and_then(|netdev| netdev.features(link.index).ok()),
        offloads,
        promiscuity: link.promiscuity,
        xdp: link.xdp,
        master,
        default_route: looked_up.is_some_and(|found| found.default_route),
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Major and minor number.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|byte: char| !byte.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The kernel writes ` (null)` for a list that was never set.
fn cpu_list(text: &str) -> String {
    let text = text.trim();
    match text.starts_with(|first: char| first.is_ascii_digit()) {
        true => text.to_owned(),
        false => String::new(),
    }
}

fn governors() -> Vec<String> {
    let mut found: Vec<String> = entries("/sys/devices/system/cpu")
        .filter_map(|path| std::fs::read_to_string(path.join("cpufreq/scaling_governor")).ok())
        .map(|text| text.trim().to_owned())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn runs(name: &str) -> bool {
    entries("/proc")
        .any(|path| std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name))
}

fn entries(folder: impl AsRef<Path>) -> impl Iterator<Item = std::path::PathBuf> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_and_lists_are_read() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("6.1.0-13-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("odd"), None);
        assert_eq!(cpu_list("  (null)\n"), "");
        assert_eq!(cpu_list("2-3,5\n"), "2-3,5");
    }

    #[test]
    fn this_host_is_surveyed() {
        let host = host();
        assert!(host.kernel_version.is_some() && host.cpus > 0, "{host:?}");
        let nics = nics(&["lo".to_owned(), "nosuchnic0".to_owned()]).unwrap();
        assert!(nics[0].exists && !nics[0].ethernet && nics[0].up, "{nics:?}");
        assert!(!nics[1].exists, "{nics:?}");
    }
}
