//! The daemon: one thread that sets everything up, then waits for front-ends, operators, workers, carriers and signals, and never
//! for one of them alone.

mod announcer;
mod cursors;
mod drive;
mod events;
mod guarded;
mod health;
mod journal;
mod keeper;
mod kept;
mod links;
mod log_budget;
mod membership;
mod nic;
mod operator;
mod pinned;
mod port;
mod probes;
mod rarp;
mod report;
mod spares;
mod stall;
mod start;
mod uplinks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use tracing::{info, warn};
use vnic_dataplane::engine::{Engine, Event};
use vnic_dataplane::fabric::Nic;
use vnic_dataplane::memory::frames::{ChunkCache, FrameMemory};
use vnic_dataplane::memory::guest;
use vnic_lb::balancer::Balancer;
use vnic_lb::mac::Mac;

use crate::config::{Config, NicConfig};
use crate::control::protocol::Ticket;
use crate::control::report::NicSessionsReport;
use crate::control::server::Server;
use crate::host::notify::Notifier;
use events::{Events, Source};
use health::HealthThread;
use journal::Journal;
use keeper::Keeper;
use kept::Done;
use links::HostLinks;
use nic::NicRuntime;
use operator::Listener;
use pinned::Pinning;
use port::{MacOrigin, Outcome, PortRuntime};
use probes::Addresses;
use rarp::Rarps;
use stall::StallWatch;
use uplinks::Leaving;

/// How often timeouts of the control socket are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Everything that runs.
pub struct Daemon {
    config: Config,
    started: Instant,
    // The workers stop (on drop) before what they work on goes away: fields are dropped in this order.
    engine: Engine,
    health: HealthThread,
    ports: Vec<PortRuntime>,
    /// By index, with gaps where one was removed.
    nics: Vec<NicRuntime>,
    /// For the workers in those gaps.
    vacant: Vec<Arc<Nic>>,
    /// Sockets on their way out.
    leaving: Vec<Leaving>,
    /// NICs that are being opened for the first time.
    adding: Vec<NicConfig>,
    /// Who waits for the removal of a NIC.
    removals: Vec<(Ticket, NicSessionsReport)>,
    keeper: Keeper<Done>,
    stalls: StallWatch,
    journal: Journal,
    listeners: Vec<Listener>,
    /// The host's interfaces; `None` without NICs.
    links: Option<HostLinks>,
    balancer: Arc<Balancer>,
    /// In topology `pinned`.
    pinned: Option<Pinning>,
    rarps: Rarps,
    /// For probes.
    addresses: Addresses,
    memory: Arc<FrameMemory>,
    /// For announcements, and for frames that are left on hand-off rings of queues that are gone.
    chunks: ChunkCache,
    /// Taken out while it is served, since it calls back.
    control: Option<Server>,
    events: Events,
    signals: SignalFd,
    /// What the workers see is not what the ports and NICs are.
    unpublished: bool,
    /// The newest generation published.
    generation: u64,
    /// A worker's panic.
    failure: Option<String>,
}

impl Daemon {
    /// Serves until SIGTERM or SIGINT (or until the only front-end, on a connection handed over, has gone).
    pub fn run(mut self) -> Result<()> {
        info!(
            ports = self.ports.len(),
            nics = self.nics.len(),
            workers = self.engine.workers(),
            "ready"
        );
        let mut notifier = Notifier::from_environment();
        notifier.ready(self.status_line());
        let mut next_housekeeping = Instant::now() + HOUSEKEEPING;
        loop {
            self.sync_stations();
            let due = [
                self.turn_uplinks(),
                self.tell_listeners(),
                self.watch_stalls(),
                self.announce(),
                self.send_rarps(),
            ];
            let next = due.into_iter().flatten().fold(next_housekeeping, Instant::min);
            let timeout = match self.may_publish() {
                true => Duration::ZERO,
                false => next.saturating_duration_since(Instant::now()),
            };
            for source in self.events.wait(timeout).context("cannot wait for events")? {
                match source {
                    Source::Signals => {
                        if let Ok(Some(signal)) = self.signals.read_signal() {
                            let name = i32::try_from(signal.ssi_signo)
                                .ok()
                                .and_then(|number| Signal::try_from(number).ok());
                            info!("stopping on {}", name.map_or("a signal", Signal::as_str));
                            notifier.stopping();
                            return Ok(());
                        }
                    }
                    Source::Engine => self.on_engine(),
                    Source::Memory => self.on_memory_lost(),
                    Source::Links => self.on_links(),
                    Source::Health => self.on_health(),
                    Source::Keeper => self.on_keeper(),
                    Source::Listener(at) => {
                        let outcome = self.ports[at].accept();
                        self.after(at, outcome);
                    }
                    Source::FrontEnd(at) => {
                        let outcome = self.ports[at].on_ready();
                        self.after(at, outcome);
                    }
                    Source::Control => self.serve_control(),
                }
            }
            let failed = self.health.failure().or(self.keeper.failure());
            if let Some(failure) = self.failure.take().or(failed.map(str::to_owned)) {
                bail!("{failure}; this is a bug of vnicd: please report it with the lines above");
            }
            if Instant::now() >= next_housekeeping {
                // The control clients' timeouts.
                self.serve_control();
                for at in 0..self.ports.len() {
                    let outcome = self.ports[at].accept_again();
                    self.after(at, outcome);
                }
                notifier.alive();
                notifier.status(self.status_line());
                self.check_queues();
                self.take_snooped();
                self.list_addresses();
                next_housekeeping = Instant::now() + HOUSEKEEPING;
            }
            // One publication at a time: a front-end that changes its rings without end costs the workers, and so the other
            // guests, one reload a turn at most.
            if self.may_publish() {
                self.publish();
            }
            if self.ports.iter().all(PortRuntime::is_finished) {
                info!("stopping: the front-end of the only connection has gone");
                notifier.stopping();
                return Ok(());
            }
        }
    }

    /// For `systemctl status`.
    fn status_line(&self) -> String {
        let connected = self.ports.iter().filter(|port| port.is_connected()).count();
        let on = self.balancer.alive();
        let alive = self.nics.iter().filter(|nic| on.contains(nic.index())).count();
        let (ports, nics) = (self.ports.len(), self.nics.len());
        format!("{connected} of {ports} ports connected, {alive} of {nics} NICs alive")
    }

    fn after(&mut self, at: usize, outcome: Outcome) {
        self.unpublished |= outcome.publish;
        if let Some(mac) = self.ports[at].take_former() {
            self.withdraw(mac);
        }
        if let Some(mac) = self.ports[at].take_rarp() {
            self.rarps.ask(at, mac);
        }
        if !outcome.rewatch {
            return;
        }
        let port = &self.ports[at];
        let watched = self
            .events
            .watch(Source::FrontEnd(at), port.interest())
            .and_then(|()| self.events.watch(Source::Listener(at), port.listener_interest()));
        if let Err(error) = watched {
            warn!(port = port.state.name, "cannot watch for the front-end: {error}");
        }
    }

    fn on_engine(&mut self) {
        self.engine.clear_notify();
        while let Some(event) = self.engine.next_event() {
            match event {
                Event::MacSeen { port, mac } => self.learn(usize::from(port), mac),
                Event::StationSeen { port, station } => self.station_seen(usize::from(port), station),
                Event::RingBroken { port, ring, error } => {
                    if let Some(port) = self.ports.get_mut(usize::from(port)) {
                        port.ring_broken(ring, &error.to_string());
                    }
                }
                Event::WorkerFailed { worker, cause } => {
                    // Its queues stand still and no ring can be taken from it: a supervisor's restart is worth more.
                    self.failure = Some(format!("worker {worker} panicked: {cause}"));
                }
            }
        }
        let settled = self.engine.settled();
        for at in 0..self.ports.len() {
            let outcome = self.ports[at].settle(settled, &mut self.chunks);
            self.after(at, outcome);
        }
        self.nics_settled(settled);
    }

    /// A guest's memory was cut short: its front-end goes, and so does what was put in the memory's place.
    fn on_memory_lost(&mut self) {
        if let Ok(event) = guest::loss_event() {
            let _ = event.read();
        }
        for at in 0..self.ports.len() {
            let outcome = self.ports[at].check_memory();
            self.after(at, outcome);
        }
    }

    /// Decides on the first source address of a port without a configured one. Two ports may have proposed the same in
    /// different workers: the first to come here has it.
    fn learn(&mut self, at: usize, mac: Mac) {
        let Some(vlan) = self.ports.get(at).map(|port| &port.vlan) else {
            return;
        };
        let taken =
            self.ports.iter().any(|port| {
                port.mac.is_some_and(|(owned, _)| owned == mac) && !port.vlan.is_apart_from(vlan)
            }) || self.nics.iter().any(|nic| nic.mac() == mac)
                || self
                    .links
                    .as_ref()
                    .is_some_and(|links| links.with_mac(mac).is_some());
        let port = &mut self.ports[at];
        if port.mac.is_none() && !taken {
            info!(port = port.state.name, "learned the guest's address {mac}");
            port.mac = Some((mac, MacOrigin::Learned));
            self.admit(mac);
            self.port_learned(at);
            // With the address in the fabric nobody proposes one any more, so the proposal need not be settled.
            self.unpublished = true;
        } else {
            port.state.settle_mac();
        }
    }

    fn may_publish(&self) -> bool {
        self.unpublished && self.engine.settled() == self.generation
    }

    fn publish(&mut self) {
        let ports = self.ports.iter().map(PortRuntime::view).collect();
        let generation = self.engine.publish(ports, self.nic_views());
        self.ports.iter_mut().for_each(|port| port.published(generation));
        self.nics_published(generation);
        self.generation = generation;
        self.unpublished = false;
    }
}
