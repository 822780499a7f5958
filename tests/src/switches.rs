//! NICs plugged into independent switches that learn addresses: bridges of the kernel, one for each NIC, and behind them a third that
//! they and a peer are plugged into.

use anyhow::{Context, Result};

use crate::fabric::{PEER_INTERFACE, PEER_IPV4, PEER_IPV6};
use crate::netns::Netns;

/// A host namespace with NICs `up0` and `up1`, each on a switch of its own, and a peer in the same network.
pub struct Switches {
    /// Where vnicd runs.
    pub host: Netns,
    /// Where the peer's programs run.
    pub peer: Netns,
    /// Where the switches are.
    pub switches: Netns,
}

/// NICs, and switches that they are plugged into.
const NICS: usize = 2;
/// The switch in the middle.
const CORE: &str = "core";

impl Switches {
    /// Builds it.
    ///
    /// # Errors
    /// If namespaces or interfaces cannot be made.
    pub fn new() -> Result<Switches> {
        let (host, peer) = (Netns::create("host")?, Netns::create("peer")?);
        let switches = Netns::create("switches")?;
        // The kernels of the host and of the switches must stay silent.
        for silent in [&host, &switches] {
            silent.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        }
        let all = Switches { host, peer, switches };
        all.add_switch(CORE)?;
        for nic in 0..NICS {
            let (switch, port) = (format!("switch{nic}"), format!("sw{nic}"));
            let (up, down) = (format!("to-core{nic}"), format!("core{nic}"));
            all.add_switch(&switch)?;
            all.host.add_veth(&format!("up{nic}"), &all.switches, &port, 1)?;
            all.switches.add_veth(&up, &all.switches, &down, 1)?;
            for (end, switch) in [(&port, switch.as_str()), (&up, &switch), (&down, CORE)] {
                all.switches.ip(&["link", "set", end, "master", switch])?;
            }
        }
        all.switches.add_veth("to-peer", &all.peer, PEER_INTERFACE, 1)?;
        all.switches.ip(&["link", "set", "to-peer", "master", CORE])?;
        all.peer.add_address(PEER_INTERFACE, &format!("{PEER_IPV4}/24"))?;
        all.peer.add_address(PEER_INTERFACE, &format!("{PEER_IPV6}/64"))?;
        Ok(all)
    }

    fn add_switch(&self, name: &str) -> Result<()> {
        let options = ["stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"];
        let add = [&["link", "add", name, "type", "bridge"][..], &options].concat();
        self.switches.ip(&add)?;
        self.switches.ip(&["link", "set", name, "up"])?;
        Ok(())
    }

    /// The names of the NICs, for vnicd's `--nic`.
    #[must_use]
    pub fn nics(&self) -> Vec<String> {
        (0..NICS).map(|nic| format!("up{nic}")).collect()
    }

    /// The NIC on whose side the switch in the middle has learned an address; `None`: it knows nothing of it.
    ///
    /// # Errors
    /// With what `bridge` said.
    pub fn learned(&self, mac: &str) -> Result<Option<usize>> {
        let mut bridge = self.switches.command("bridge");
        let shown = crate::process::run(bridge.args(["-json", "fdb", "show", "br", CORE]))?;
        let entries: serde_json::Value = serde_json::from_str(&shown)?;
        let entries = entries.as_array().context("no list of entries")?;
        let found = entries.iter().find(|entry| entry["mac"] == mac);
        let port = found.and_then(|entry| entry["ifname"].as_str());
        Ok((0..NICS).find(|nic| port == Some(&format!("core{nic}"))))
    }

    /// Takes a NIC's port down at its switch, or up again.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn set_port(&self, nic: usize, state: &str) -> Result<()> {
        let port = format!("sw{nic}");
        self.switches.ip(&["link", "set", &port, state]).map(drop)
    }

    /// Cuts a NIC's switch off from all others, or mends that; the NIC's link stays up.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn set_uplink(&self, nic: usize, state: &str) -> Result<()> {
        let port = format!("to-core{nic}");
        self.switches.ip(&["link", "set", &port, state]).map(drop)
    }
}
