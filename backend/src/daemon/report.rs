//! What operators ask for, gathered from all that runs.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vnic_dataplane::counters::{DropCounters, DropReason, PerWorker};
use vnic_dataplane::fabric::{NicQueue, VlanMode};
use vnic_dataplane::group::GroupCounters;
use vnic_dataplane::nic::{NicRxCounters, NicTxCounters};
use vnic_dataplane::program::ProgramCounters;
use vnic_lb::MAX_NICS;
use vnic_lb::balancer::SessionInfo;

use super::Daemon;
use super::drive::Drive;
use super::nic::NicRuntime;
use super::port::{MacOrigin, PortRuntime};
use crate::control::protocol::{CallError, Handler, Reply, Request, Ticket};
use crate::control::report::{
    BalancerReport, Drops, FrameMemoryReport, NicChange, NicQueueStats, NicReport, NicStats, NicSummary,
    NicsReport, PortReport, PortState, PortStats, PortSummary, PortsReport, ProbeReport, QueuePairStats,
    SessionEnd, SessionReport, StatsReport, StatusReport, Traffic, WorkerStats, WorkerSummary,
};
use crate::vhost::features;

impl Daemon {
    /// Answers what control clients asked, without waiting for any of them.
    pub(super) fn serve_control(&mut self) {
        // The server calls back into the daemon that owns it.
        if let Some(mut server) = self.control.take() {
            server.turn(Instant::now(), self);
            self.control = Some(server);
        }
    }

    fn cpu(&self, worker: usize) -> Option<usize> {
        (!self.config.cpus.is_empty()).then(|| self.config.cpus[worker % self.config.cpus.len()])
    }

    fn status(&self) -> StatusReport {
        let balancer = self.balancer.stats();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            topology: self.config.topology.map(|topology| topology.to_string()),
            lb: self.balancer.algorithm().to_string(),
            poll: self.config.poll.to_string(),
            workers: (0..self.engine.workers())
                .map(|index| WorkerSummary {
                    index,
                    cpu: self.cpu(index),
                })
                .collect(),
            sessions: balancer.sessions,
            session_capacity: balancer.capacity,
            pinned: self.pinned_report(),
            ports: self
                .ports
                .iter()
                .map(|port| PortSummary {
                    name: port.state.name.clone(),
                    state: port_state(port),
                })
                .collect(),
            nics: self
                .nics
                .iter()
                .map(|nic| NicSummary {
                    id: nic.id().to_owned(),
                    ifname: nic.interface.name.clone(),
                    alive: self.is_alive(nic),
                })
                .collect(),
        }
    }

    fn stats(&self) -> StatsReport {
        let balancer = self.balancer.stats();
        let census = self.memory.census();
        let nics = self.nics.iter().map(nic_stats).collect();
        StatsReport {
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            ports: self.ports.iter().map(port_stats).collect(),
            nics,
            workers: (0..self.engine.workers())
                .map(|index| self.worker_stats(index))
                .collect(),
            balancer: BalancerReport {
                sessions: balancer.sessions,
                capacity: balancer.capacity,
                created: balancer.created,
                expired: balancer.expired,
                repinned: balancer.repinned,
                moved: balancer.moved,
                table_full: balancer.table_full,
                half_open: balancer.half_open,
                fragments: balancer.fragments,
                half_open_full: balancer.half_open_full,
                one_way_full: balancer.one_way_full,
                new_capped: balancer.new_capped,
                fragments_full: balancer.fragments_full,
            },
            frame_memory: FrameMemoryReport {
                free: census.free,
                held: census.held,
                fill: census.fill,
                tx: census.tx,
                quarantined: census.quarantined,
                state_errors: self.memory.state_errors(),
            },
        }
    }

    fn worker_stats(&self, index: usize) -> WorkerStats {
        let counters = self.engine.worker_counters().of(index);
        WorkerStats {
            index,
            cpu: self.cpu(index),
            turns: counters.turns.get(),
            busy_turns: counters.busy_turns.get(),
            sleeps: counters.sleeps.get(),
            handoffs: counters.handed_off_frames.get(),
            contention: counters.contended_bursts.get(),
        }
    }

    fn nics(&self) -> NicsReport {
        let sessions = match self.stations() {
            Some(stations) => stations.per_nic(),
            None => self.balancer.sessions_per_nic(),
        };
        let planned = self.balancer.nics();
        let report = |nic: &NicRuntime| {
            let in_balancer = planned.iter().find(|known| known.nic == nic.index());
            let drive = nic.drive.as_ref();
            NicReport {
                id: nic.id().to_owned(),
                ifname: nic.interface.name.clone(),
                mac: nic.mac().to_string(),
                driver: nic.interface.driver.clone(),
                mtu: nic.interface.mtu,
                queues: nic.queues(),
                attach: drive.map_or("-", |drive| drive.attach_word()).to_owned(),
                zero_copy: drive.is_some_and(|drive| drive.zero_copy),
                multi_buffer: drive.is_some_and(|drive| drive.multi_buffer),
                weight: in_balancer.map_or(0, |nic| nic.weight),
                drained: in_balancer.is_some_and(|nic| nic.drained),
                present: drive.is_some(),
                alive: self.is_alive(nic),
                carrier: drive.is_some() && nic.link.has_carrier(),
                probe: probe_report(nic),
                sessions: sessions.get(usize::from(nic.index())).copied().unwrap_or(0),
                last_change: nic.last_change.as_ref().map(|change| NicChange {
                    ago_ms: u64::try_from(change.at.elapsed().as_millis()).unwrap_or(u64::MAX),
                    alive: change.alive,
                    cause: change.cause.clone(),
                }),
                changes: nic.changes,
                concerns: nic.concerns(),
            }
        };
        NicsReport {
            nics: self.nics.iter().map(report).collect(),
            counted: self.counted(),
        }
    }

    fn is_alive(&self, nic: &NicRuntime) -> bool {
        self.balancer.alive().contains(nic.index())
    }

    fn sessions(&self, limit: usize) -> Reply {
        let ids: Vec<String> = (0..).take(MAX_NICS).map(|index| self.nic_id(index)).collect();
        let sessions = self.balancer.sessions(self.engine.now(), limit);
        let report = move |session: SessionInfo| session_report(&session, &ids);
        Reply::Sessions {
            total: self.balancer.stats().sessions,
            sessions: Box::new(sessions.map(move |found| found.map(&report))),
        }
    }
}

impl Handler for Daemon {
    fn call(&mut self, ticket: Ticket, request: &Request) -> Result<Reply, CallError> {
        match request {
            Request::Status => Reply::report(&self.status()),
            Request::Stats => Reply::report(&self.stats()),
            Request::Sessions { limit } => Ok(self.sessions(*limit)),
            Request::Nics => Reply::report(&self.nics()),
            Request::Ports => Reply::report(&PortsReport {
                ports: self.ports.iter().map(port_report).collect(),
            }),
            Request::Events { after, wait_s } => self.events_after(ticket, *after, *wait_s),
            Request::Explain { flow } => self.explain(flow),
            Request::LbSet { algorithm } => self.set_algorithm(ticket, algorithm),
            Request::NicAdd { nic } => self.add_nic(ticket, nic),
            Request::NicRemove { nic } => self.remove_nic(ticket, nic),
            Request::NicSet { nic, weight } => self.set_weight(ticket, nic, *weight),
            Request::NicProbe { nic, target } => self.set_probe(nic, target.as_deref()),
            Request::NicDrain { nic } => self.set_drained(ticket, nic, true),
            Request::NicUndrain { nic } => self.set_drained(ticket, nic, false),
        }
    }
}

fn probe_report(nic: &NicRuntime) -> Option<ProbeReport> {
    let view = &nic.link.probes;
    Some(ProbeReport {
        target: nic.config.probe?.to_string(),
        sent: view.sent.load(Ordering::Relaxed),
        answered: view.answered.load(Ordering::Relaxed),
        rtt_us: view.rtt_us.load(Ordering::Relaxed),
    })
}

fn port_state(port: &PortRuntime) -> PortState {
    if port.is_running() {
        PortState::Running
    } else if port.is_connected() {
        PortState::Connected
    } else {
        PortState::Listening
    }
}

fn port_report(port: &PortRuntime) -> PortReport {
    let view = port.view();
    let usable = view
        .pairs
        .iter()
        .filter(|pair| pair.rx.is_some() && pair.tx.is_some() && pair.tx_enabled)
        .count();
    let memory: u64 = port
        .device()
        .memory()
        .iter()
        .map(|region| region.size)
        .fold(0, u64::saturating_add);
    PortReport {
        name: port.state.name.clone(),
        socket: port.socket.clone(),
        state: port_state(port),
        mac: port.mac.map(|(mac, _)| mac.to_string()),
        mac_configured: port
            .mac
            .is_some_and(|(_, origin)| origin == MacOrigin::Configured),
        vlan: match &port.vlan {
            VlanMode::Transparent => "any".to_owned(),
            VlanMode::Access(id) => format!("access {id}"),
            VlanMode::Trunk(listed) => format!("trunk {listed}"),
        },
        max_queue_pairs: u16::try_from(view.pairs.len()).unwrap_or(u16::MAX),
        queue_pairs: u16::try_from(usable).unwrap_or(u16::MAX),
        features: features::names(port.device().features()),
        memory_mib: memory.div_ceil(1 << 20),
    }
}

/// Drops of all workers, by reason; those that never happened are left out.
fn drops<T: Default>(counters: &PerWorker<T>, of: impl Fn(&T) -> &DropCounters) -> Drops {
    DropReason::ALL
        .iter()
        .map(|reason| {
            (
                reason.name().to_owned(),
                counters.sum(|copy| of(copy).get(*reason)),
            )
        })
        .filter(|(_, count)| *count > 0)
        .collect()
}

fn add(sum: Traffic, part: Traffic) -> Traffic {
    Traffic {
        frames: sum.frames + part.frames,
        bytes: sum.bytes + part.bytes,
    }
}

fn port_stats(port: &PortRuntime) -> PortStats {
    let pair =
        |(index, counters): (usize, &PerWorker<vnic_dataplane::counters::PairCounters>)| QueuePairStats {
            index,
            guest_tx: Traffic {
                frames: counters.sum(|pair| pair.guest_tx_frames.get()),
                bytes: counters.sum(|pair| pair.guest_tx_bytes.get()),
            },
            guest_rx: Traffic {
                frames: counters.sum(|pair| pair.guest_rx_frames.get()),
                bytes: counters.sum(|pair| pair.guest_rx_bytes.get()),
            },
            notifications: counters.sum(|pair| pair.notifications.get()),
        };
    let queue_pairs: Vec<QueuePairStats> = port.state.pairs.iter().enumerate().map(pair).collect();
    PortStats {
        name: port.state.name.clone(),
        guest_tx: queue_pairs
            .iter()
            .map(|pair| pair.guest_tx)
            .fold(Traffic::default(), add),
        guest_rx: queue_pairs
            .iter()
            .map(|pair| pair.guest_rx)
            .fold(Traffic::default(), add),
        drops: drops(&port.state.counters, |counters| &counters.drops),
        broken_rings: port.broken_rings(),
        rarp: port.rarp_stats,
        queue_pairs,
    }
}

/// What a NIC's sockets, tap and program count now; they begin with 0 each time it is opened.
pub(super) fn socket_counters(drive: &Drive) -> SocketCounters {
    let queue = |(index, queue): (usize, &NicQueue)| {
        let rx: NicRxCounters = queue.rx_reader.counters();
        // A worker holds it for a burst at a time, far less than an operator notices.
        let tx: NicTxCounters = queue.tx.lock().tx().counters();
        NicQueueStats {
            index,
            rx: Traffic {
                frames: rx.frames,
                bytes: rx.bytes,
            },
            tx: Traffic {
                frames: tx.frames,
                bytes: tx.bytes,
            },
            kernel_dropped: rx.kernel_dropped,
            kernel_invalid: tx.kernel_invalid,
            kicks: tx.kicks,
            kick_errors: tx.kick_errors,
        }
    };
    let group = drive.nic.group.as_ref();
    SocketCounters {
        queues: drive.nic.queues.iter().enumerate().map(queue).collect(),
        group: group.map_or_else(GroupCounters::default, |group| {
            group
                .tap
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .counters()
        }),
        program: drive.program.counters().unwrap_or_default(),
    }
}

/// See [`socket_counters`].
#[derive(Debug, Default, Clone)]
pub(super) struct SocketCounters {
    queues: Vec<NicQueueStats>,
    group: GroupCounters,
    program: ProgramCounters,
}

impl SocketCounters {
    /// Both together: of earlier sockets, and of later ones.
    pub(super) fn plus(mut self, later: &SocketCounters) -> SocketCounters {
        for queue in &later.queues {
            let Some(sum) = self.queues.get_mut(queue.index) else {
                self.queues.push(*queue);
                continue;
            };
            sum.rx = add(sum.rx, queue.rx);
            sum.tx = add(sum.tx, queue.tx);
            sum.kernel_dropped += queue.kernel_dropped;
            sum.kernel_invalid += queue.kernel_invalid;
            sum.kicks += queue.kicks;
            sum.kick_errors += queue.kick_errors;
        }
        self.group.frames += later.group.frames;
        self.group.bytes += later.group.bytes;
        self.group.kernel_dropped += later.group.kernel_dropped;
        self.group.no_chunk += later.group.no_chunk;
        self.group.malformed += later.group.malformed;
        self.program.redirected += later.program.redirected;
        self.program.passed += later.program.passed;
        self
    }
}

fn nic_stats(nic: &NicRuntime) -> NicStats {
    let now = nic.drive.as_ref().map(socket_counters).unwrap_or_default();
    let SocketCounters {
        queues,
        group,
        program,
    } = nic.before.clone().plus(&now);
    let counters = &nic.state.counters;
    let mut drops = drops(counters, |counters| &counters.drops);
    for (reason, count) in [
        ("group_ring_full", group.kernel_dropped),
        ("group_no_chunk", group.no_chunk),
        ("group_malformed", group.malformed),
    ] {
        if count > 0 {
            drops.insert(reason.to_owned(), count);
        }
    }
    NicStats {
        id: nic.id().to_owned(),
        ifname: nic.interface.name.clone(),
        rx: queues.iter().map(|queue| queue.rx).fold(Traffic::default(), add),
        tx: queues.iter().map(|queue| queue.tx).fold(Traffic::default(), add),
        group_copies: Traffic {
            frames: group.frames,
            bytes: group.bytes,
        },
        redriven: counters.sum(|counters| counters.redriven.get()),
        xdp_redirected: program.redirected,
        xdp_passed: program.passed,
        drops,
        queues,
    }
}

fn session_report(session: &SessionInfo, nic_ids: &[String]) -> SessionReport {
    let key = &session.key;
    let has_ports = key.flow_id().is_none();
    let end = |(address, port): (std::net::IpAddr, u16)| SessionEnd {
        address: address.to_string(),
        port: has_ports.then_some(port),
    };
    SessionReport {
        key: key.to_string(),
        vlans: key.vlans().into_iter().filter(|vlan| *vlan != 0).collect(),
        protocol: match key.protocol_name() {
            "ip" => key.protocol().to_string(),
            name => name.to_owned(),
        },
        ends: [end(key.a()), end(key.b())],
        nic: nic_ids.get(usize::from(session.nic)).cloned().unwrap_or_default(),
        age_ms: u64::from(session.age_ms),
        idle_ms: u64::from(session.idle_ms),
        frames: session.frames,
        bytes: session.bytes,
    }
}
