//! NICs that operators add and remove at run time.
//!
//! A NIC that is removed leaves in three steps: the balancer lets go of it, the workers do, and its sockets are closed.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use tracing::info;
use vnic_dataplane::fabric::NicState;
use vnic_lb::nics::{NicIndex, NicInfo};
use vnic_lb::pinned::Move;

use super::Daemon;
use super::health::Command;
use super::kept::Done;
use super::nic::{NicRuntime, Phase};
use super::spares::{self, SpareError};
use super::uplinks::{FAREWELL, Leaving, Opened, open};
use crate::config::NicConfig;
use crate::control::protocol::{CallError, ErrorCode, Reply, Ticket};
use crate::control::report::{NicAddedReport, NicSessionsReport};

/// What a NIC had that the balancer has let go of.
pub(super) struct Released {
    /// Or stations.
    sessions: u64,
    /// Stations that other NICs have now.
    moves: Vec<Move>,
}

impl Daemon {
    /// Begins to open a NIC that an operator asks for.
    pub(super) fn begin_adding(&mut self, ticket: Ticket, config: NicConfig) {
        let (needs_tags, queues) = (self.needs_tags(), self.driven_queues());
        let (allow, memory) = (self.config.allow_default_route_nic, Arc::clone(&self.memory));
        let (balancer, workers) = (Arc::clone(&self.balancer), self.engine.workers());
        self.adding.push(config.clone());
        self.keeper.run(move || {
            let mut index = None;
            let opened = open(&config, allow, needs_tags, queues, &memory, |interface| {
                spares::check_new(&balancer, &config.id, config.weight)?;
                let nic = balancer.add_nic(&NicInfo {
                    id: config.id.clone(),
                    weight: config.weight,
                })?;
                index = Some(nic);
                let _ = balancer.set_link_speed(nic, interface.speed_mbps);
                let id = config.id.clone();
                Ok(Arc::new(NicState::new(nic, id, workers, interface.mtu)))
            });
            if let (Err(_), Some(nic)) = (&opened, index) {
                // Just added, so it is there.
                let _ = balancer.remove_nic(nic);
            }
            Done::Added {
                ticket,
                config,
                opened,
            }
        });
    }

    /// Begins to remove a NIC: the balancer first, then the workers, then the sockets.
    pub(super) fn begin_removing(&mut self, ticket: Ticket, index: NicIndex) {
        let Some(nic) = self.nic_at(index) else { return };
        nic.leaves = true;
        let (balancer, clock) = (Arc::clone(&self.balancer), self.engine.watcher());
        let stations = self.stations();
        self.keeper.run(move || {
            let had = stations.as_ref().map(|all| all.per_nic()[usize::from(index)]);
            let released = spares::remove(&balancer, index).map(|sessions| Released {
                sessions: had.unwrap_or(sessions),
                moves: stations.map_or_else(Vec::new, |stations| stations.settle(clock.now())),
            });
            Done::Released {
                ticket,
                index,
                released,
            }
        });
    }

    /// The balancer has let go of a NIC, or needs it.
    pub(super) fn released(
        &mut self,
        ticket: Ticket,
        index: NicIndex,
        released: Result<Released, SpareError>,
    ) {
        let counted = self.counted();
        let Some(nic) = self.nic_at(index) else { return };
        nic.leaves = false;
        match released {
            Ok(Released { sessions, moves }) => {
                nic.phase = Phase::Removing {
                    close_at: Instant::now() + FAREWELL,
                };
                let id = nic.id().to_owned();
                let report = NicSessionsReport {
                    id,
                    sessions,
                    counted,
                };
                self.removals.push((ticket, report));
                self.health.tell(Command::Forget(index));
                self.stations_moved(&moves);
            }
            Err(error) => {
                let refused = CallError::new(ErrorCode::Refused, error.to_string());
                self.answer(ticket, Err(refused));
            }
        }
    }

    /// A NIC that an operator asked for was opened, or not.
    pub(super) fn added(&mut self, ticket: Ticket, config: NicConfig, opened: Result<Box<Opened>>) {
        self.adding.retain(|adding| adding.id != config.id);
        let opened = match opened {
            Ok(opened) => *opened,
            Err(error) => {
                let refused = CallError::new(ErrorCode::Refused, format!("{error:#}"));
                return self.answer(ticket, Err(refused));
            }
        };
        let Opened {
            interface,
            state,
            drive,
        } = opened;
        let (id, ifname) = (config.id.clone(), interface.name.clone());
        let nic = NicRuntime::new(config, interface, state, drive);
        let report = NicAddedReport {
            id: id.clone(),
            ifname: ifname.clone(),
            queues: nic.queues(),
            zero_copy: nic.drive.as_ref().is_some_and(|drive| drive.zero_copy),
        };
        self.nics.push(nic);
        self.nics.sort_by_key(NicRuntime::index);
        self.join();
        self.journal
            .note(Some(&id), "added", format!("interface {ifname}"));
        self.answer(ticket, Reply::report(&report));
    }

    /// Takes the NICs out whose farewell is over.
    pub(super) fn remove_due(&mut self, now: Instant) {
        let is_due =
            |nic: &mut NicRuntime| matches!(&nic.phase, Phase::Removing { close_at } if *close_at <= now);
        let removed: Vec<NicRuntime> = self.nics.extract_if(.., is_due).collect();
        for mut nic in removed {
            let at = self
                .removals
                .iter()
                .position(|(_, report)| report.id == nic.config.id);
            let removal = at.map(|at| self.removals.swap_remove(at));
            info!(nic = nic.config.id, "NIC removed");
            match nic.park() {
                Some(drive) => {
                    self.unpublished = true;
                    self.leaving.push(Leaving::new(drive, removal));
                }
                None => self.removed(removal),
            }
        }
    }

    fn removed(&mut self, removal: Option<(Ticket, NicSessionsReport)>) {
        if let Some((ticket, report)) = removal {
            let left = format!("{} {} go on by the others", report.sessions, report.counted);
            self.journal.note(Some(&report.id), "removed", left);
            self.answer(ticket, Reply::report(&report));
        }
    }
}
