//! What happens to the host's interfaces while the daemon runs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use tracing::warn;
use vnic_lb::mac::Mac;

use super::Daemon;
use crate::config::PortConfig;
use crate::host::netlink::link::{self, Link, LinkEvent, LinkWatch};

/// Changes taken in one turn: a host that makes thousands of interfaces must not hold the loop.
const CHANGES: usize = 64;

/// A port was given an address that is not the guest's to have.
#[derive(Debug, thiserror::Error)]
#[error(
    "port {port}: mac={mac} is the address of the host's interface {ifname}, whose frames would go to the guest: give \
     the guest an address of its own"
)]
pub(super) struct HostsAddress {
    port: String,
    mac: Mac,
    ifname: String,
}

/// The host's interfaces, as far as they are known.
pub(super) struct HostLinks {
    watch: LinkWatch,
    known: BTreeMap<u32, Link>,
}

impl HostLinks {
    /// Lists them, and hears of every change from then on.
    pub(super) fn open() -> io::Result<HostLinks> {
        // The watch first: what changes while the list is made is then told twice rather than not at all.
        let watch = LinkWatch::open()?;
        let known = link::all()?.into_iter().map(|link| (link.index, link)).collect();
        Ok(HostLinks { watch, known })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.watch.as_fd().as_raw_fd()
    }

    /// The interface with this address.
    pub(super) fn with_mac(&self, mac: Mac) -> Option<&Link> {
        self.known.values().find(|link| link.mac == Some(mac))
    }

    /// Addresses of all interfaces.
    pub(super) fn macs(&self) -> Vec<Mac> {
        let macs = self.known.values().filter_map(|link| link.mac);
        macs.filter(|mac| !mac.is_zero()).collect()
    }

    /// Refuses configured addresses that are the host's.
    pub(super) fn check(&self, ports: &[PortConfig]) -> Result<(), HostsAddress> {
        for port in ports {
            if let Some(mac) = port.mac
                && let Some(link) = self.with_mac(mac)
            {
                return Err(HostsAddress {
                    port: port.name.clone(),
                    mac,
                    ifname: link.name.clone(),
                });
            }
        }
        Ok(())
    }

    /// The interface with this name.
    pub(super) fn with_name(&self, name: &str) -> Option<&Link> {
        self.known.values().find(|link| link.name == name)
    }

    fn name(&self, index: u32) -> String {
        let found = self.known.get(&index);
        found.map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }
}

impl Daemon {
    /// Takes in what the kernel says of the host's interfaces.
    pub(super) fn on_links(&mut self) {
        let Some(links) = &mut self.links else { return };
        let mut events = Vec::new();
        if let Err(error) = links.watch.drain(CHANGES, &mut events) {
            warn!("cannot hear of changes of the host's interfaces: {error}");
        }
        let before = links.macs();
        for event in events {
            match event {
                LinkEvent::Now(link) => self.link_is(link),
                LinkEvent::Gone(index) => self.link_left(index),
                LinkEvent::Missed => self.list_links(),
            }
        }
        if let Some(links) = &self.links {
            let now = links.macs();
            if now != before {
                self.engine.reserve_macs(now);
                self.unpublished = true;
            }
        }
    }

    /// There were more changes than the socket held.
    fn list_links(&mut self) {
        let all = match link::all() {
            Ok(all) => all,
            Err(error) => return warn!("cannot list the host's interfaces: {error}"),
        };
        let known = self.links.iter().flat_map(|links| links.known.keys().copied());
        let gone: Vec<u32> = known
            .filter(|index| !all.iter().any(|link| link.index == *index))
            .collect();
        gone.into_iter().for_each(|index| self.link_left(index));
        all.into_iter().for_each(|link| self.link_is(link));
    }

    fn link_is(&mut self, link: Link) {
        let Some(links) = &mut self.links else { return };
        let before = links.known.insert(link.index, link.clone());
        let master = link.master.map(|index| links.name(index));
        self.interface_is(&link, master);
        let Some(mac) = link
            .mac
            .filter(|mac| before.is_none_or(|before| before.mac != Some(*mac)))
        else {
            return;
        };
        let owner = |port: &&super::PortRuntime| port.mac.is_some_and(|(owned, _)| owned == mac);
        if let Some(port) = self.ports.iter().find(owner) {
            warn!(
                port = port.state.name,
                "interface {} now has the guest's address {mac}, and the host's frames to it go to the guest: give one \
                 of them another address",
                link.name
            );
        }
    }

    fn link_left(&mut self, index: u32) {
        if let Some(links) = &mut self.links {
            links.known.remove(&index);
        }
        self.interface_left(index);
    }
}
