//! Topology `pinned`: which NIC a station's frames leave by, and which copies of received frames are taken.

use vnic_lb::MAX_NICS;
use vnic_lb::nics::NicIndex;
use vnic_lb::pinned::{Accept, Station, View};

use super::Context;
use crate::counters::DropReason;
use crate::engine::Event;
use crate::fabric::vlan::NO_VLAN;
use crate::fabric::{Fabric, Nic, Port};
use crate::memory::frames::Frame;
use crate::neighbour::{self, snoop};

impl Context {
    /// The stations as they are now, if they decide.
    pub(super) fn stations(&self) -> Option<View> {
        self.shared.stations.as_ref().map(|stations| stations.view())
    }

    /// The NIC of a frame that a guest sends to a group.
    pub(super) fn station_nic(&self, view: &View, port: &Port, head: &[u8]) -> Option<usize> {
        self.snoop(port, head);
        let station = neighbour::sender(head)?;
        self.nic_of(view, port, station).map(usize::from)
    }

    /// Chooses the NICs of the frames in `uplink`: one choice for a burst of one VLAN.
    pub(super) fn steer_stations(&mut self, view: &View, port: &Port) {
        self.choices.clear();
        let mut last: Option<(Station, Option<NicIndex>)> = None;
        let mut sent = [(0u64, 0u64); MAX_NICS];
        for frame in &self.uplink {
            let head = self.memory.head(frame);
            let nic = neighbour::sender(head).and_then(|station| match last {
                Some((before, nic)) if before == station => nic,
                _ => {
                    let nic = self.nic_of(view, port, station);
                    last = Some((station, nic));
                    nic
                }
            });
            self.snoop(port, head);
            if let Some((frames, bytes)) = nic.and_then(|nic| sent.get_mut(usize::from(nic))) {
                *frames += 1;
                *bytes += frame.len() as u64;
            }
            self.choices.push(nic);
        }
        for (nic, (frames, bytes)) in (0..).zip(sent).filter(|(_, (frames, _))| *frames > 0) {
            self.balancer.record_sent(self.index, nic, frames, bytes);
        }
    }

    fn nic_of(&self, view: &View, port: &Port, station: Station) -> Option<NicIndex> {
        let nic = view.steer(station);
        // An address that the port has yet to get is proposed as that first.
        let is_new = nic.is_some() && port.mac == Some(station.mac) && view.pin(station).is_none();
        if is_new && port.state.propose_station(station) {
            self.shared.report(Event::StationSeen {
                port: port.state.index,
                station,
            });
        }
        nic
    }

    fn snoop(&self, port: &Port, head: &[u8]) {
        if let Some(snooped) = snoop::from_guest(head)
            && port.mac == Some(snooped.station.mac)
        {
            port.state.snoop(snooped);
        }
    }

    /// Drops those frames of a burst that are taken from another NIC.
    pub(super) fn drop_flooded(&mut self, fabric: &Fabric, nic: &Nic, burst: &mut Vec<Frame>) {
        let Some(view) = self.stations() else { return };
        let now = self.now.millis;
        let drops = &nic.state.counters.of(self.index).drops;
        let memory = &self.memory;
        let is_flooded = |frame: &mut Frame| {
            let head = memory.head(frame);
            // What is shorter is dropped for that.
            let Some(receiver) = neighbour::receiver(head) else {
                return false;
            };
            if view.accept(nic.state.index, receiver, now) == Accept::OtherNic {
                return true;
            }
            if let Some(granted) = snoop::to_guest(head) {
                let Station { mac, vlan } = granted.station;
                let vlan = if fabric.vlan_aware { vlan } else { NO_VLAN };
                if let Some(port) = fabric.port_of(vlan, mac) {
                    fabric.ports[usize::from(port)].state.snoop(granted);
                }
            }
            false
        };
        for frame in burst.extract_if(.., is_flooded) {
            drops.add(DropReason::OtherNic, 1);
            self.stock.chunks.free(frame);
        }
    }
}
