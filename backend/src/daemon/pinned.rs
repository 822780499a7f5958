//! Topology `pinned`: guests' stations get NICs, and move, and the network is told.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use tracing::{info, warn};
use vnic_dataplane::fabric::VlanMode;
use vnic_dataplane::neighbour::announce::{self, Announcement};
use vnic_dataplane::neighbour::snoop::Snooped;
use vnic_lb::nics::NicIndex;
use vnic_lb::pinned::{MAX_STATIONS, Move, Pin, Station, Stations};

use super::Daemon;
use super::announcer::Announcer;
use super::kept::Done;
use super::port::PortRuntime;
use crate::control::protocol::{CallError, ErrorCode, Reply};
use crate::control::report::{Counted, PinnedReport, StationReport};
use crate::control::station;

/// Stations of one port: a guest on a trunk makes one for each VLAN that it speaks in. Further ones go by their slots.
const PORT_STATIONS: usize = 256;
const _: () = assert!(PORT_STATIONS * vnic_dataplane::fabric::MAX_PORTS <= MAX_STATIONS);

/// Stations listed in a report.
const LISTED: usize = 64;

/// Moves of one NIC's loss that are told one by one.
const TOLD: usize = 16;

/// What there is to topology `pinned`.
pub(super) struct Pinning {
    pub(super) stations: Arc<Stations>,
    announcer: Announcer,
    ports: Vec<PortStations>,
    /// Frames sent, and those for which a NIC had no room.
    announced: u64,
    unsent: u64,
    /// The keeper is at it.
    examining: bool,
}

/// A port's stations.
#[derive(Default)]
struct PortStations {
    running: bool,
    stations: Vec<Station>,
}

impl Pinning {
    pub(super) fn new(stations: Arc<Stations>) -> Pinning {
        Pinning {
            stations,
            announcer: Announcer::default(),
            ports: Vec::new(),
            announced: 0,
            unsent: 0,
            examining: false,
        }
    }

    fn port_of(&self, station: Station) -> Option<usize> {
        self.ports
            .iter()
            .position(|port| port.stations.contains(&station))
    }
}

/// The VLAN of a station that a port has whatever its guest sends.
fn home_vlan(vlan: &VlanMode) -> Option<u16> {
    match vlan {
        VlanMode::Access(id) => Some(*id),
        VlanMode::Transparent => Some(0),
        VlanMode::Trunk(_) => None,
    }
}

fn home(port: &PortRuntime) -> Option<Station> {
    let (mac, _) = port.mac?;
    let vlan = home_vlan(&port.vlan)?;
    Some(Station { mac, vlan })
}

impl Daemon {
    /// Those that decide, in this topology.
    pub(super) fn stations(&self) -> Option<Arc<Stations>> {
        let pinning = self.pinned.as_ref()?;
        Some(Arc::clone(&pinning.stations))
    }

    /// What NICs have, as reports count it.
    pub(super) fn counted(&self) -> Counted {
        match self.pinned {
            Some(_) => Counted::Stations,
            None => Counted::Sessions,
        }
    }

    /// Gives the stations of guests that have started their NICs, and forgets those of guests that are gone: nobody may announce
    /// a guest that lives elsewhere now.
    pub(super) fn sync_stations(&mut self) {
        let Some(pinning) = &mut self.pinned else { return };
        pinning.ports.resize_with(self.ports.len(), PortStations::default);
        let mut started = Vec::new();
        for (at, (port, known)) in self.ports.iter().zip(&mut pinning.ports).enumerate() {
            // While its rings are taken back for a moment, nothing of that is known.
            if port.is_quiescing() || port.is_running() == known.running {
                continue;
            }
            known.running = port.is_running();
            if known.running {
                started.extend(home(port).map(|station| (at, station)));
                continue;
            }
            pinning.stations.forget(&known.stations);
            for station in known.stations.drain(..) {
                pinning.announcer.forget(station);
            }
            port.state.settle_station();
        }
        for (at, station) in started {
            self.add_station(at, station);
        }
    }

    /// A worker met a station that has no NIC of its own.
    pub(super) fn station_seen(&mut self, at: usize, station: Station) {
        let Some(port) = self.ports.get(at) else { return };
        let is_own = port.mac.is_some_and(|(mac, _)| mac == station.mac);
        let state = Arc::clone(&port.state);
        // With no room for another one the proposal stays pending, so that no further one comes.
        if !is_own || self.add_station(at, station) {
            state.settle_station();
        }
    }

    /// A port has its address, perhaps since now.
    pub(super) fn port_learned(&mut self, at: usize) {
        if let Some(station) = self.ports.get(at).and_then(home) {
            self.add_station(at, station);
        }
    }

    /// Gives a station a NIC and announces it there; `false`: its port has as many as it may.
    fn add_station(&mut self, at: usize, station: Station) -> bool {
        let (now, clock) = (Instant::now(), self.engine.now());
        let Some(pinning) = &mut self.pinned else {
            return true;
        };
        let Some(known) = pinning.ports.get_mut(at).filter(|port| port.running) else {
            return true;
        };
        if known.stations.contains(&station) {
            return true;
        }
        if known.stations.len() >= PORT_STATIONS {
            let port = &mut self.ports[at];
            let Some(withheld) = port.may_log() else {
                return false;
            };
            warn!(
                port = port.state.name,
                withheld,
                "its guest sends in more than {PORT_STATIONS} VLANs: in the others its frames leave by the NIC that hashing \
                 gives, and are not announced when that changes"
            );
            return false;
        }
        if pinning.stations.assign(station, clock).is_some() {
            known.stations.push(station);
            pinning.announcer.begin(station, now);
        }
        true
    }

    /// A NIC is alive again: the switch has forgotten what was behind its port. Guests that started while none was alive get
    /// NICs.
    pub(super) fn nic_returned(&mut self, nic: NicIndex) {
        (0..self.ports.len()).for_each(|at| self.port_learned(at));
        let Some(pinning) = &mut self.pinned else { return };
        let now = Instant::now();
        let pins = pinning.stations.list();
        for pin in pins.iter().filter(|pin| pin.nic == nic) {
            pinning.announcer.begin(pin.station, now);
        }
    }

    /// Stations are other NICs' now.
    pub(super) fn stations_moved(&mut self, moves: &[Move]) {
        if moves.is_empty() {
            return;
        }
        // The later rounds have what was heard in the last second.
        self.take_snooped();
        let now = Instant::now();
        if let Some(pinning) = &mut self.pinned {
            for one in moves {
                pinning.announcer.begin(one.station, now);
            }
        }
        for one in moves.iter().take(TOLD) {
            let (to, from) = (self.nic_id(one.to), self.nic_id(one.from));
            let moved = format!("{} from {from}", self.station_text(one.station));
            self.journal.note_at(now, Some(&to), "moved", moved);
        }
        if let (Some(one), more @ 1..) = (moves.first(), moves.len().saturating_sub(TOLD)) {
            let from = self.nic_id(one.from);
            self.journal
                .note_at(now, None, "moved", format!("{more} more stations from {from}"));
        }
        if let Some(one) = moves.first() {
            let (nic, stations) = (self.nic_id(one.from), moves.len());
            info!(nic, stations, "stations moved to other NICs; announcing them");
        }
    }

    /// Sends the announcements that are due; returns when to come back.
    pub(super) fn announce(&mut self) -> Option<Instant> {
        let due = self.pinned.as_mut()?.announcer.due(Instant::now());
        let (mut announced, mut unsent) = (0, 0);
        for (station, told) in due {
            for one in told {
                let Some(sent) = self.announce_by_nic(station, one) else {
                    break;
                };
                (announced, unsent) = (announced + u64::from(sent), unsent + u64::from(!sent));
            }
        }
        if announced + unsent > 0 {
            self.engine.wake();
        }
        let pinning = self.pinned.as_mut()?;
        pinning.announced += announced;
        pinning.unsent += unsent;
        pinning.announcer.next()
    }

    /// Hands a frame that tells of a station to the workers, for the NIC that the station is behind; the caller wakes them. Whether
    /// it had room, or `None`: there is no such NIC that is alive.
    pub(super) fn announce_by_nic(&mut self, station: Station, told: Announcement) -> Option<bool> {
        let alive = self.balancer.alive();
        let index = match &self.pinned {
            Some(pinning) => pinning.stations.view().pin(station)?.nic,
            // Any link of an aggregate would do.
            None => self.balancer.designated()?,
        };
        let mut newest_first = self.nics.iter().rev();
        let nic = newest_first.find(|nic| nic.index() == index && alive.contains(index))?;
        let view = nic.view();
        Some(view.hand_over(&mut self.chunks, &announce::frame(station, told)))
    }

    /// The first VLAN from `from` on in which the guest of a port has a station.
    pub(super) fn station_vlan(&self, at: usize, from: u16) -> Option<u16> {
        let stations = &self.pinned.as_ref()?.ports.get(at)?.stations;
        stations
            .iter()
            .map(|station| station.vlan)
            .filter(|vlan| *vlan >= from)
            .min()
    }

    /// Takes what the workers have snooped. What is new is examined off the loop: the kernel may take its time to list the
    /// host's addresses, which no guest can have.
    pub(super) fn take_snooped(&mut self) {
        let Some(pinning) = self.pinned.as_mut().filter(|pinning| !pinning.examining) else {
            return;
        };
        let now = Instant::now();
        let mut news = Vec::new();
        for port in &self.ports {
            news.extend(pinning.announcer.hear(port.state.take_snooped(), now));
        }
        news.retain(|one| pinning.port_of(one.station).is_some());
        if news.is_empty() {
            return;
        }
        pinning.examining = true;
        self.keeper.run(move || {
            let own = host_addresses();
            news.retain(|one| !own.contains(&one.address));
            Done::Snooped(news)
        });
    }

    /// Addresses that guests have.
    pub(super) fn snooped(&mut self, found: Vec<Snooped>) {
        let Some(pinning) = &mut self.pinned else { return };
        pinning.examining = false;
        let now = Instant::now();
        for one in found {
            // Unless the guest has gone meanwhile.
            if pinning.port_of(one.station).is_some() {
                pinning.announcer.learn(one, now);
            }
        }
    }

    /// For `status`.
    pub(super) fn pinned_report(&self) -> Option<PinnedReport> {
        let pinning = self.pinned.as_ref()?;
        let pins = pinning.stations.list();
        let (now, clock) = (Instant::now(), self.engine.now());
        let report = |pin: &Pin| StationReport {
            mac: pin.station.mac.to_string(),
            vlan: pin.station.vlan,
            port: pinning
                .port_of(pin.station)
                .map(|at| self.ports[at].state.name.clone()),
            nic: self.nic_id(pin.nic),
            since_ms: pin.age_ms(clock).into(),
            from: pin.from.map(|nic| self.nic_id(nic)),
            addresses: pinning
                .announcer
                .addresses(pin.station, now)
                .iter()
                .map(|(address, _)| address.to_string())
                .collect(),
        };
        Some(PinnedReport {
            stations: pins.len().try_into().unwrap_or(u64::MAX),
            capacity: MAX_STATIONS.try_into().unwrap_or(u64::MAX),
            designated: pinning.stations.view().designated().map(|nic| self.nic_id(nic)),
            announced: pinning.announced,
            unsent: pinning.unsent,
            listed: pins.iter().take(LISTED).map(report).collect(),
        })
    }

    /// `explain` in this topology.
    pub(super) fn explain_station(&self, stations: &Stations, text: &str) -> Result<Reply, CallError> {
        let bad = |error: station::StationError| CallError::new(ErrorCode::BadParams, error.to_string());
        let station = station::parse(text).map_err(bad)?;
        let explained = stations.explain(station, self.engine.now());
        let report = super::operator::explain_report(&explained, station::text(station));
        Reply::report(&report)
    }

    fn station_text(&self, station: Station) -> String {
        let port = self.pinned.as_ref().and_then(|pinning| pinning.port_of(station));
        let text = station::text(station);
        port.map_or_else(
            || text.clone(),
            |at| format!("{text} of port {}", self.ports[at].state.name),
        )
    }
}

/// Addresses of the host's interfaces; none if the kernel does not tell.
fn host_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    interfaces.filter_map(address).collect()
}
