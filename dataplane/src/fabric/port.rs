//! A guest's port as the workers see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_queue::ArrayQueue;
use vmm_sys_util::eventfd::EventFd;
use vnic_lb::mac::Mac;
use vnic_lb::pinned::Station;

use super::{PortIndex, Shared, VlanMode};
use crate::counters::{PairCounters, PerWorker, PortCounters};
use crate::neighbour::snoop::Snooped;
use crate::virtq;

/// Frames that wait for a ring that another worker holds. A burst is 64, so this is several of them.
const HAND_OFF: usize = 512;

/// Snooped addresses that wait for the control thread; of more, the oldest are given up.
const SNOOPED: usize = 16;

/// What became of a proposed address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proposal {
    /// It is the first: tell the control thread.
    First,
    /// The control thread was told already.
    Pending,
    /// Another one is pending.
    Refused,
}

/// What of a port outlives its rings: its identity and its counters.
#[derive(Debug)]
pub struct PortState {
    /// Position in the daemon's list of ports.
    pub index: PortIndex,
    /// The operator's name for it.
    pub name: String,
    /// Per-worker counters of the port.
    pub counters: PerWorker<PortCounters>,
    /// Per-worker counters of each queue pair.
    pub pairs: Box<[PerWorker<PairCounters>]>,
    /// A source MAC that a worker proposed and the control thread has not answered yet; 0: none.
    candidate: AtomicU64,
    /// A station that a worker proposed and the control thread has not answered yet; 0: none.
    station: AtomicU64,
    /// Addresses that the guest was seen to have.
    snooped: ArrayQueue<Snooped>,
}

impl PortState {
    /// A new port with zeroed counters.
    #[must_use]
    pub fn new(index: PortIndex, name: String, queue_pairs: usize, workers: usize) -> PortState {
        PortState {
            index,
            name,
            counters: PerWorker::new(workers),
            pairs: (0..queue_pairs).map(|_| PerWorker::new(workers)).collect(),
            candidate: AtomicU64::new(0),
            station: AtomicU64::new(0),
            snooped: ArrayQueue::new(SNOOPED),
        }
    }

    /// Proposes `mac` as this port's own address.
    pub fn propose_mac(&self, mac: Mac) -> Proposal {
        match self
            .candidate
            .compare_exchange(0, mac.to_u64(), Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Proposal::First,
            Err(pending) if pending == mac.to_u64() => Proposal::Pending,
            Err(_) => Proposal::Refused,
        }
    }

    /// Ends a pending proposal, once the answer is in the published fabric.
    pub fn settle_mac(&self) {
        self.candidate.store(0, Ordering::Release);
    }

    /// Proposes a station of this port that has no NIC of its own yet; `true`: it is the only one, so tell the control thread.
    pub fn propose_station(&self, station: Station) -> bool {
        let number = u64::from(station.vlan) << 48 | station.mac.to_u64();
        self.station
            .compare_exchange(0, number, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Ends a pending proposal, so that the next one may come.
    pub fn settle_station(&self) {
        self.station.store(0, Ordering::Release);
    }

    /// Keeps an address that the guest was seen to have.
    pub fn snoop(&self, snooped: Snooped) {
        let _oldest = self.snooped.force_push(snooped);
    }

    /// Takes what was kept, oldest first.
    pub fn take_snooped(&self) -> impl Iterator<Item = Snooped> {
        // No more than there can be at once: a guest that goes on talking must not hold the caller.
        (0..SNOOPED).map_while(|_| self.snooped.pop())
    }
}

/// A running ring, until it stops.
pub struct Ring {
    /// The engine, filled or emptied by whichever worker holds it.
    pub engine: Shared<virtq::Ring>,
    broken: AtomicBool,
}

impl Ring {
    /// A ring that starts.
    #[must_use]
    pub fn new(engine: virtq::Ring) -> Ring {
        Ring {
            engine: Shared::new(engine, HAND_OFF),
            broken: AtomicBool::new(false),
        }
    }

    /// The driver broke a rule: nobody touches the ring any more. `true` for the caller that marked it.
    pub fn mark_broken(&self) -> bool {
        !self.broken.swap(true, Ordering::AcqRel)
    }

    /// Whether it was marked broken.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

/// The rings of one queue pair that are started.
#[derive(Clone, Default)]
pub struct QueuePair {
    /// Guest TX, if started.
    pub tx: Option<Arc<Ring>>,
    /// Written by the driver when it has made guest TX buffers available; `None` with a started ring: poll it.
    pub tx_kick: Option<Arc<EventFd>>,
    /// Guest TX is enabled; if not, its frames are consumed and discarded.
    pub tx_enabled: bool,
    /// Guest RX, if started and enabled.
    pub rx: Option<Arc<Ring>>,
}

/// One generation of a port.
#[derive(Clone)]
pub struct Port {
    /// What outlives the generation.
    pub state: Arc<PortState>,
    /// Its address, once configured or learned.
    pub mac: Option<Mac>,
    /// The VLANs that it takes part in.
    pub vlan: VlanMode,
    /// Queue pairs, as many as the port may have.
    pub pairs: Box<[QueuePair]>,
    /// Positions in `pairs` whose `rx` is set: received frames are spread over these.
    rx_ready: Box<[usize]>,
}

impl Port {
    /// A port with the given running rings, transparent to VLANs.
    #[must_use]
    pub fn new(state: Arc<PortState>, mac: Option<Mac>, pairs: Vec<QueuePair>) -> Port {
        let rx_ready = pairs
            .iter()
            .enumerate()
            .filter(|(_, pair)| pair.rx.is_some())
            .map(|(at, _)| at)
            .collect();
        Port {
            state,
            mac,
            vlan: VlanMode::default(),
            pairs: pairs.into(),
            rx_ready,
        }
    }

    /// The same port on these VLANs.
    #[must_use]
    pub fn on_vlans(self, vlan: VlanMode) -> Port {
        Port { vlan, ..self }
    }

    /// The queue pair that a received frame of this flow goes to; `None` if no RX ring runs.
    #[must_use]
    pub fn rx_pair(&self, flow_hash: u32) -> Option<usize> {
        match &*self.rx_ready {
            [] => None,
            [only] => Some(*only),
            several => Some(several[flow_hash as usize % several.len()]),
        }
    }

    /// Whether the choice of [`Port::rx_pair`] depends on the flow.
    #[must_use]
    pub fn has_several_rx(&self) -> bool {
        self.rx_ready.len() > 1
    }

    /// Whether the guest takes part now: a frame from outside with its address is then a loop.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.rx_ready.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mac_is_proposed_at_a_time() {
        let state = PortState::new(0, "a".into(), 1, 1);
        let (first, second) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        assert_eq!(state.propose_mac(first), Proposal::First);
        assert_eq!(state.propose_mac(first), Proposal::Pending);
        assert_eq!(state.propose_mac(second), Proposal::Refused);
        state.settle_mac();
        assert_eq!(state.propose_mac(second), Proposal::First);
    }

    #[test]
    fn one_station_is_proposed_at_a_time_and_the_last_addresses_are_kept() {
        let state = PortState::new(0, "a".into(), 1, 1);
        let station = |vlan| Station {
            mac: Mac([2, 0, 0, 0, 0, 1]),
            vlan,
        };
        assert!(state.propose_station(station(1)));
        assert!(!state.propose_station(station(1)) && !state.propose_station(station(2)));
        state.settle_station();
        assert!(state.propose_station(station(2)));
        let snooped = |last: u8| Snooped {
            station: station(0),
            address: [10, 0, 0, last].into(),
            router: false,
        };
        (0..20).for_each(|last| state.snoop(snooped(last)));
        let kept: Vec<_> = state.take_snooped().collect();
        assert_eq!(kept, (4..20).map(snooped).collect::<Vec<_>>());
        assert_eq!(state.take_snooped().next(), None);
    }
}
