//! What the workers see: an immutable picture of the ports, NICs and addresses, replaced as a whole by pointer swap.
//!
//! The control thread builds a [`Fabric`] and publishes it; each worker picks it up between two turns and from then on holds
//! nothing of the older one. That acknowledgement is the quiesce: once every worker has seen a fabric without a ring, the ring can be
//! stopped and its guest's memory unmapped.

mod mac_table;
mod nic;
mod port;
mod slot;
pub mod vlan;

pub use mac_table::MacTable;
pub use nic::{Nic, NicGroup, NicQueue, NicSender, NicState, Serviced};
pub use port::{Port, PortState, Proposal, QueuePair, Ring};
pub use slot::{PutOutcome, Shared, Stock};
pub use vlan::{VlanMode, VlanSet};

use std::sync::Arc;

use vnic_lb::mac::Mac;

/// Position of a port in the daemon's list.
pub type PortIndex = u8;

/// The most ports of one daemon.
pub const MAX_PORTS: usize = 64;

/// The most queue pairs of one port.
pub const MAX_QUEUE_PAIRS: usize = 8;

/// One generation of the picture.
pub struct Fabric {
    /// Counts up with every publication.
    pub generation: u64,
    /// Ports by [`PortIndex`].
    pub ports: Box<[Port]>,
    /// NICs by [`vnic_lb::nics::NicIndex`].
    pub nics: Box<[Arc<Nic>]>,
    /// Addresses of the ports.
    pub macs: MacTable,
    /// Whether any port is not transparent: without one, nobody looks at tags.
    pub vlan_aware: bool,
    /// Addresses of the NICs, which no port may take.
    pub nic_macs: Box<[Mac]>,
    /// Addresses of the host's other interfaces, which no port may learn.
    pub host_macs: Arc<[Mac]>,
    /// For each worker, what it polls.
    pub shares: Box<[Share]>,
}

/// What one worker polls.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Share {
    /// Guest TX rings: (position in [`Fabric::ports`], queue pair).
    pub guest_tx: Vec<(usize, usize)>,
    /// NIC queues: (position in [`Fabric::nics`], queue).
    pub nic_queues: Vec<(usize, usize)>,
    /// NIC queues that it sends by and does not poll, whose sent frames it looks after all the same: the worker that polls
    /// such a queue may be asleep.
    pub nic_tx: Vec<(usize, usize)>,
    /// NICs whose group copies it takes.
    pub groups: Vec<usize>,
}

impl Fabric {
    /// Nothing at all: what workers start with.
    #[must_use]
    pub fn empty(workers: usize) -> Fabric {
        Fabric::new(0, Vec::new(), Vec::new(), workers)
    }

    /// Builds the tables and deals the queues out to `workers`, round robin in a fixed order, so that a queue stays with its worker
    /// when something else changes.
    #[must_use]
    pub fn new(generation: u64, ports: Vec<Port>, nics: Vec<Arc<Nic>>, workers: usize) -> Fabric {
        let mut shares = vec![Share::default(); workers];
        for (port_at, port) in ports.iter().enumerate() {
            for (pair_at, pair) in port.pairs.iter().enumerate() {
                if pair.tx.is_some() {
                    shares[(port_at + pair_at) % workers]
                        .guest_tx
                        .push((port_at, pair_at));
                }
            }
        }
        for (nic_at, nic) in nics.iter().enumerate() {
            for queue_at in 0..nic.queues.len() {
                shares[(nic_at + queue_at) % workers]
                    .nic_queues
                    .push((nic_at, queue_at));
            }
            if nic.group.is_some() {
                shares[nic_at % workers].groups.push(nic_at);
            }
            for (worker, share) in shares.iter_mut().enumerate() {
                if let Some(queue_at) = nic.tx_queue(worker)
                    && !share.nic_queues.contains(&(nic_at, queue_at))
                {
                    share.nic_tx.push((nic_at, queue_at));
                }
            }
        }
        let macs = MacTable::new(
            ports
                .iter()
                .filter_map(|port| Some((port.vlan.table_vlan(), port.mac?, port.state.index))),
        );
        let vlan_aware = ports.iter().any(|port| port.vlan != VlanMode::Transparent);
        let nic_macs = nics.iter().map(|nic| nic.mac).collect();
        Fabric {
            generation,
            ports: ports.into(),
            nics: nics.into(),
            macs,
            vlan_aware,
            nic_macs,
            host_macs: Arc::default(),
            shares: shares.into(),
        }
    }

    /// The same, with addresses that no port may learn.
    #[must_use]
    pub fn with_host_macs(self, host_macs: Arc<[Mac]>) -> Fabric {
        Fabric { host_macs, ..self }
    }

    /// The port with this address that frames of `vlan` may reach.
    #[must_use]
    pub fn port_of(&self, vlan: u16, mac: Mac) -> Option<PortIndex> {
        if !self.vlan_aware {
            return self.macs.get(mac_table::ANY_VLAN, mac);
        }
        self.macs.get(vlan, mac).or_else(|| {
            let port = self.macs.get(mac_table::ANY_VLAN, mac)?;
            self.ports
                .get(usize::from(port))?
                .vlan
                .admits(vlan)
                .then_some(port)
        })
    }

    /// Whether the guest of `port` may take `mac` as its own: a unicast address that no interface of the host has, and no other
    /// port that it could meet.
    #[must_use]
    pub fn may_learn(&self, port: &Port, mac: Mac) -> bool {
        let taken = |other: &Port| other.mac == Some(mac) && !other.vlan.is_apart_from(&port.vlan);
        !mac.is_group()
            && !mac.is_zero()
            && !self.nic_macs.contains(&mac)
            && !self.host_macs.contains(&mac)
            && !self.ports.iter().any(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unowned_unicast_address_may_be_learned() {
        let mac = |last| Mac([2, 0, 0, 0, 0, last]);
        let port = |index, mac| {
            let state = Arc::new(PortState::new(index, "a".into(), 1, 1));
            Port::new(state, mac, Vec::new())
        };
        let ports = vec![port(0, Some(mac(1))), port(1, None)];
        let fabric = Fabric::new(1, ports, Vec::new(), 1).with_host_macs([mac(2)].into());
        let learner = &fabric.ports[1];
        assert!(!fabric.may_learn(learner, mac(1)), "another port's");
        assert!(!fabric.may_learn(learner, mac(2)), "the host's");
        assert!(!fabric.may_learn(learner, Mac([3, 0, 0, 0, 0, 3])), "a group");
        assert!(!fabric.may_learn(learner, Mac::default()));
        assert!(fabric.may_learn(learner, mac(3)));
    }
}
