//! The network around the daemon under test: its NICs, the LAG switch behind them, and the peer behind the switch.

use anyhow::Result;

use crate::lag::{Distribution, LagSwitch, LinkCounters};
use crate::netns::Netns;

/// The peer's addresses (with prefix length) and its interface.
pub const PEER_IPV4: &str = "10.77.0.1";
/// The peer's IPv6 address.
pub const PEER_IPV6: &str = "fd77::1";
/// The first guest's IPv4 address.
pub const GUEST_IPV4: &str = "10.77.0.2";
/// The first guest's IPv6 address.
pub const GUEST_IPV6: &str = "fd77::2";
/// The peer's interface.
pub const PEER_INTERFACE: &str = "peer0";

/// A host namespace with NICs `up0`, `up1`, ..., whose other ends `sw0`, `sw1`, ... meet in a LAG switch; behind the
/// switch a peer namespace with one interface.
pub struct Fabric {
    // Dropped first: the switch holds sockets in the namespaces.
    switch: Option<LagSwitch>,
    /// Where vnicd runs.
    pub host: Netns,
    /// Where the peer's programs run.
    pub peer: Netns,
    switch_side: Netns,
    nics: usize,
}

impl Fabric {
    /// Builds a fabric with `nics` NICs of `queues` queues each; with 0 NICs there is only the host namespace of use.
    ///
    /// # Errors
    /// If namespaces or interfaces cannot be made.
    pub fn new(nics: usize, queues: u32, distribution: Distribution) -> Result<Fabric> {
        let host = Netns::create("host")?;
        let peer = Netns::create("peer")?;
        let switch_side = Netns::create("switch")?;
        switch_side.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        let mut links = Vec::new();
        for index in 0..nics {
            let link = format!("sw{index}");
            host.add_veth(&format!("up{index}"), &switch_side, &link, queues)?;
            links.push(link);
        }
        let mut fabric = Fabric {
            switch: None,
            host,
            peer,
            switch_side,
            nics,
        };
        if nics > 0 {
            fabric.switch = Some(LagSwitch::start(
                &fabric.switch_side,
                &links,
                &fabric.peer,
                PEER_INTERFACE,
                distribution,
            )?);
            fabric
                .peer
                .add_address(PEER_INTERFACE, &format!("{PEER_IPV4}/24"))?;
            fabric
                .peer
                .add_address(PEER_INTERFACE, &format!("{PEER_IPV6}/64"))?;
        }
        Ok(fabric)
    }

    /// The names of the NICs, for vnicd's `--nic`.
    #[must_use]
    pub fn nics(&self) -> Vec<String> {
        (0..self.nics).map(|index| format!("up{index}")).collect()
    }

    /// Takes a link down at the switch: the NIC loses its carrier.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_down(&self, index: usize) -> Result<()> {
        self.switch_side
            .ip(&["link", "set", &format!("sw{index}"), "down"])
            .map(drop)
    }

    /// Takes a link up again.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_up(&self, index: usize) -> Result<()> {
        self.switch_side
            .ip(&["link", "set", &format!("sw{index}"), "up"])
            .map(drop)
    }

    /// Has the switch throw away what the NIC sends, while the link stays up; or no more.
    pub fn black_hole(&self, index: usize, on: bool) {
        if let Some(switch) = &self.switch {
            switch.black_hole(index, on);
        }
    }

    /// The switch's counters, link by link.
    #[must_use]
    pub fn counters(&self) -> Vec<LinkCounters> {
        self.switch.as_ref().map(LagSwitch::counters).unwrap_or_default()
    }

    /// Frames that each link has carried, both directions added, since `earlier`.
    #[must_use]
    pub fn frames_since(&self, earlier: &[LinkCounters]) -> Vec<u64> {
        let total = |counters: &LinkCounters| counters.to_peer + counters.from_peer;
        self.counters()
            .iter()
            .zip(earlier)
            .map(|(now, then)| total(now) - total(then))
            .collect()
    }
}
