//! Host interfaces, looked at before they are driven.
//!
//! What sysfs shows is the network namespace that it was mounted in. `ip netns exec` mounts a fresh one; a process that only
//! called setns(2) sees another namespace's, which is detected by the interface's index and told.

use std::path::Path;

use nix::net::if_::{if_nameindex, if_nametoindex};
use vnic_lb::mac::Mac;

use super::channels;
use crate::config::NicConfig;

/// `IFF_UP` (linux/if.h).
pub(super) const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
/// `ARPHRD_ETHER` (linux/if_arp.h).
const ARPHRD_ETHER: u32 = 1;
/// `RTF_UP` and `RTF_REJECT` (linux/route.h).
const RTF_UP: u32 = 0x1;
const RTF_REJECT: u32 = 0x200;

/// A host interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in this network namespace.
    pub index: u32,
    /// Its own address.
    pub mac: Mac,
    /// Most bytes of a frame's payload (a frame has 14 more, and 4 a VLAN tag).
    pub mtu: u32,
    /// `IFF_*` as the administrator set them.
    pub flags: u32,
    /// Receive queues in use.
    pub rx_queues: u32,
    /// Transmit queues in use.
    pub tx_queues: u32,
    /// The driver's name; virtual interfaces such as veth have none.
    pub driver: Option<String>,
    /// Mb/s, where the driver knows.
    pub speed_mbps: Option<u32>,
    /// Bridge, bond or team that it is part of.
    pub master: Option<String>,
    /// The main table's default route, IPv4 or IPv6, leaves by it.
    pub default_route: bool,
}

/// Why an interface cannot be a NIC of vnicd.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text says what it and its fields are")]
pub enum HostError {
    #[error("NIC {ifname}: there is no such interface; these exist: {existing}")]
    Unknown { ifname: String, existing: String },
    #[error(
        "NIC {ifname}: sysfs shows another network namespace: start vnicd with `ip netns exec NAME vnicd ...`, which \
         mounts the right one"
    )]
    WrongSysfs { ifname: String },
    #[error("NIC {ifname}: cannot read {file}: {source}")]
    Sysfs {
        ifname: String,
        file: String,
        source: std::io::Error,
    },
    #[error("NIC {ifname}: `{text}` in {file} is not what the kernel writes there")]
    Malformed {
        ifname: String,
        file: String,
        text: String,
    },
    #[error("NIC {ifname}: is the loopback interface: choose an Ethernet interface")]
    Loopback { ifname: String },
    #[error("NIC {ifname}: is not an Ethernet interface: choose one that is")]
    NotEthernet { ifname: String },
    #[error("NIC {ifname}: is a {kind}, which AF_XDP cannot drive well: give its member interfaces instead")]
    Aggregate { ifname: String, kind: &'static str },
    #[error("NIC {ifname}: belongs to {master}: take it out with `ip link set dev {ifname} nomaster`")]
    Enslaved { ifname: String, master: String },
    #[error("NIC {ifname}: is down: bring it up with `ip link set dev {ifname} up`")]
    Down { ifname: String },
    #[error(
        "NIC {ifname}: carries the host's default route, and a mistake would cut the host off: choose another NIC, or \
         force it with --allow-default-route-nic"
    )]
    DefaultRoute { ifname: String },
    #[error(
        "NIC {ifname}: queues={asked} but the interface has {has}: give queues={has} or leave `queues` out, or add \
         queues with `{command}` (`set-channels=on` does that)"
    )]
    TooManyQueues {
        ifname: String,
        asked: u32,
        has: u32,
        command: String,
    },
    #[error(
        "NIC {ifname}: queues={asked} leaves some of its {has} receive queues uncovered, and the guests' frames that \
         arrive there would be lost: leave `queues` out, or reduce them with `{command}` (`set-channels=on` does that)"
    )]
    UncoveredQueues {
        ifname: String,
        asked: u32,
        has: u32,
        command: String,
    },
}

/// Looks an interface up.
pub fn lookup(ifname: &str) -> Result<Interface, HostError> {
    let Ok(index) = if_nametoindex(ifname) else {
        return Err(HostError::Unknown {
            ifname: ifname.to_owned(),
            existing: existing(),
        });
    };
    let sysfs = Sysfs { ifname };
    if sysfs.number("ifindex", 10).ok() != Some(index) {
        return Err(HostError::WrongSysfs {
            ifname: ifname.to_owned(),
        });
    }
    // Ethernet or not, an address of another length is told by its own error later.
    let mac = sysfs.text("address")?.parse().unwrap_or_default();
    Ok(Interface {
        name: ifname.to_owned(),
        index,
        mac,
        mtu: sysfs.number("mtu", 10)?,
        flags: sysfs.number("flags", 16)?,
        rx_queues: sysfs.queues("rx-")?,
        tx_queues: sysfs.queues("tx-")?,
        driver: sysfs.link("device/driver"),
        speed_mbps: link_speed(ifname),
        master: sysfs.link("master"),
        default_route: carries_default_route(ifname),
    })
}

/// The speed of an interface's link in Mb/s, as it was negotiated last. Waits for the RTNL, and perhaps for the NIC's firmware.
#[must_use]
pub fn link_speed(ifname: &str) -> Option<u32> {
    // -1, or an error while the link is down, where the speed is not known.
    Sysfs { ifname }.number("speed", 10).ok()
}

/// Looks a NIC up and refuses it if it cannot or should not be driven; `force_default_route` allows the NIC of the default
/// route.
pub fn check_nic(nic: &NicConfig, force_default_route: bool) -> Result<Interface, HostError> {
    let interface = lookup(&nic.ifname)?;
    let ifname = nic.ifname.clone();
    let sysfs = Sysfs { ifname: &nic.ifname };
    if interface.flags & IFF_LOOPBACK != 0 {
        return Err(HostError::Loopback { ifname });
    }
    if sysfs.number("type", 10)? != ARPHRD_ETHER {
        return Err(HostError::NotEthernet { ifname });
    }
    for (folder, kind) in [("bridge", "bridge"), ("bonding", "bond")] {
        if sysfs.exists(folder) {
            return Err(HostError::Aggregate { ifname, kind });
        }
    }
    if let Some(master) = interface.master {
        return Err(HostError::Enslaved { ifname, master });
    }
    if interface.flags & IFF_UP == 0 {
        return Err(HostError::Down { ifname });
    }
    if interface.default_route && !force_default_route {
        return Err(HostError::DefaultRoute { ifname });
    }
    if !nic.set_channels {
        check_queues(&interface, nic.queues)?;
    }
    Ok(interface)
}

/// Refuses a number of queues that would leave receive queues without a socket, or sockets without a queue.
pub fn check_queues(interface: &Interface, asked: Option<u32>) -> Result<(), HostError> {
    let has = interface.rx_queues;
    let Some(asked) = asked.filter(|asked| *asked != has) else {
        return Ok(());
    };
    let ifname = interface.name.clone();
    let command = channels::command_for(interface.index, &ifname, asked);
    Err(match asked > has {
        true => HostError::TooManyQueues {
            ifname,
            asked,
            has,
            command,
        },
        false => HostError::UncoveredQueues {
            ifname,
            asked,
            has,
            command,
        },
    })
}

fn existing() -> String {
    let Ok(all) = if_nameindex() else {
        return "unknown".to_owned();
    };
    let names: Vec<String> = all
        .iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .collect();
    names.join(", ")
}

struct Sysfs<'a> {
    ifname: &'a str,
}

impl Sysfs<'_> {
    fn path(&self, file: &str) -> String {
        format!("/sys/class/net/{}/{file}", self.ifname)
    }

    fn exists(&self, file: &str) -> bool {
        Path::new(&self.path(file)).exists()
    }

    fn text(&self, file: &str) -> Result<String, HostError> {
        let path = self.path(file);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(source) => Err(HostError::Sysfs {
                ifname: self.ifname.to_owned(),
                file: path,
                source,
            }),
        }
    }

    fn number(&self, file: &str, radix: u32) -> Result<u32, HostError> {
        let text = self.text(file)?;
        let digits = if radix == 16 {
            text.trim_start_matches("0x")
        } else {
            &text
        };
        u32::from_str_radix(digits, radix).map_err(|_| HostError::Malformed {
            ifname: self.ifname.to_owned(),
            file: self.path(file),
            text: text.clone(),
        })
    }

    fn queues(&self, prefix: &str) -> Result<u32, HostError> {
        let path = self.path("queues");
        let folder = std::fs::read_dir(&path).map_err(|source| HostError::Sysfs {
            ifname: self.ifname.to_owned(),
            file: path,
            source,
        })?;
        let matching = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(prefix);
        Ok(u32::try_from(folder.flatten().filter(matching).count()).unwrap_or(u32::MAX))
    }

    fn link(&self, file: &str) -> Option<String> {
        let target = std::fs::read_link(self.path(file)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }
}

/// `thread-self`, as a thread may be in another network namespace than its process.
fn carries_default_route(ifname: &str) -> bool {
    let read =
        |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    default_route_v4(&read("route"), ifname) || default_route_v6(&read("ipv6_route"), ifname)
}

/// Columns: interface, destination, gateway, flags, refcount, use, metric, mask, ... (numbers in hexadecimal).
fn default_route_v4(table: &str, ifname: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [name, destination, _, flags, _, _, _, mask, ..] = columns[..] else {
            return false;
        };
        name == ifname && destination == "00000000" && mask == "00000000" && usable(flags)
    })
}

/// Columns: destination, its prefix length, source, its prefix length, next hop, metric, refcount, use, flags, interface.
fn default_route_v6(table: &str, ifname: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [destination, length, _, _, _, _, _, _, flags, name] = columns[..] else {
            return false;
        };
        name == ifname && length == "00" && destination.bytes().all(|digit| digit == b'0') && usable(flags)
    })
}

fn usable(flags: &str) -> bool {
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & RTF_UP != 0 && flags & RTF_REJECT == 0)
}

#[cfg(test)]
#[path = "interface_tests.rs"]
mod tests;
