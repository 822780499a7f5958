//! What operators change at run time, and ask about single flows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vnic_lb::MAX_NICS;
use vnic_lb::balancer::Explanation;
use vnic_lb::nics::NicIndex;
use vnic_lb::parse::parse;
use vnic_lb::pinned::Move;
use vnic_lb::policy::Algorithm;

use super::Daemon;
use super::kept::Done;
use super::nic::{NicRuntime, Phase, removed_nic};
use super::spares;
use crate::config;
use crate::control::flow;
use crate::control::protocol::{CallError, ErrorCode, MAX_WAIT_S, Reply, Ticket};
use crate::control::report::{
    AlgorithmReport, ExplainReport, ExplainedNic, NicSessionsReport, NicWeightReport,
};

/// Why an operator's wish is not granted. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("there is no NIC `{id}`: those that there are: {known}")]
    NoSuchNic { id: String, known: String },
    #[error("NIC {ifname}: the daemon has it already, as `{id}`")]
    HasInterface { ifname: String, id: String },
    #[error("there is a NIC with the id `{id}` already ({ifname}): give the new one another `id=`")]
    HasId { id: String, ifname: String },
    #[error("the daemon has {MAX_NICS} NICs, which is the most: remove one first with `vnic nic remove NIC`")]
    TooMany,
    #[error(
        "a second NIC needs a topology, since what they are plugged into decides what may be balanced: start vnicd with \
         `--topology lag` if both links belong to one link aggregation group of the switch, or with `--topology pinned` if \
         they are plugged into independent switch ports"
    )]
    NoTopology,
    #[error("NIC {id} is being opened or removed now: try again in a moment")]
    Busy { id: String },
    #[error(
        "NIC {id} is probed as before: NIC {by} cannot take the answers, so that they would count as lost ({cause}): fix that, \
         or leave out the probe"
    )]
    Probe { id: String, by: String, cause: String },
    #[error("weight {weight} is out of range: give 0 to {max}")]
    Weight { weight: u32, max: u32 },
    #[error("wait_s {wait_s} is out of range: give 0 to {MAX_WAIT_S}")]
    Wait { wait_s: u64 },
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> CallError {
        let code = match refusal {
            Refusal::NoSuchNic { .. } => ErrorCode::NotFound,
            Refusal::Weight { .. } | Refusal::Wait { .. } => ErrorCode::BadParams,
            _ => ErrorCode::Refused,
        };
        CallError::new(code, refusal.to_string())
    }
}

fn bad_params(error: impl std::fmt::Display) -> CallError {
    CallError::new(ErrorCode::BadParams, error.to_string())
}

/// A client that waits for events.
pub(super) struct Listener {
    ticket: Ticket,
    after: u64,
    until: Instant,
}

impl Daemon {
    pub(super) fn answer(&mut self, ticket: Ticket, answer: Result<Reply, CallError>) {
        if let Some(control) = &mut self.control {
            control.answer(ticket, answer, Instant::now());
        }
    }

    /// The NIC with this id, if it can be changed.
    pub(super) fn nic_called(&self, id: &str) -> Result<&NicRuntime, Refusal> {
        let Some(nic) = self.nics.iter().find(|nic| nic.id() == id) else {
            let known: Vec<&str> = self.nics.iter().map(NicRuntime::id).collect();
            return Err(Refusal::NoSuchNic {
                id: id.chars().take(64).collect(),
                known: if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                },
            });
        };
        match nic.phase {
            _ if nic.leaves => Err(Refusal::Busy { id: id.to_owned() }),
            Phase::Opening | Phase::Removing { .. } => Err(Refusal::Busy { id: id.to_owned() }),
            _ => Ok(nic),
        }
    }

    /// `nic_add`
    pub(super) fn add_nic(&mut self, ticket: Ticket, text: &str) -> Result<Reply, CallError> {
        let new = config::nic_of(text).map_err(bad_params)?;
        let there = self
            .nics
            .iter()
            .map(|nic| (&nic.config, nic.interface.name.as_str()));
        let adding = self.adding.iter().map(|config| (config, config.ifname.as_str()));
        for (config, ifname) in there.chain(adding) {
            let (id, ifname) = (config.id.clone(), ifname.to_owned());
            if ifname == new.ifname {
                return Err(Refusal::HasInterface { ifname, id }.into());
            }
            if id == new.id {
                return Err(Refusal::HasId { id, ifname }.into());
            }
        }
        let count = self.nics.len() + self.adding.len();
        if count >= MAX_NICS {
            return Err(Refusal::TooMany.into());
        }
        if count > 0 && self.config.topology.is_none() {
            return Err(Refusal::NoTopology.into());
        }
        self.begin_adding(ticket, new);
        Ok(Reply::Later)
    }

    /// `nic_remove`
    pub(super) fn remove_nic(&mut self, ticket: Ticket, id: &str) -> Result<Reply, CallError> {
        let index = self.nic_called(id)?.index();
        self.begin_removing(ticket, index);
        Ok(Reply::Later)
    }

    /// `nic_set`
    pub(super) fn set_weight(
        &mut self,
        ticket: Ticket,
        id: &str,
        weight: Option<u32>,
    ) -> Result<Reply, CallError> {
        let index = self.nic_called(id)?.index();
        let max = config::MAX_WEIGHT;
        if let Some(weight) = weight.filter(|weight| *weight > max) {
            return Err(Refusal::Weight { weight, max }.into());
        }
        let (balancer, id) = (Arc::clone(&self.balancer), id.to_owned());
        let (stations, clock) = (self.stations(), self.engine.watcher());
        self.keeper.run(move || {
            let in_force = || {
                balancer
                    .nics()
                    .iter()
                    .find(|nic| nic.nic == index)
                    .map_or(0, |nic| nic.weight)
            };
            let before = in_force();
            let set = match weight {
                Some(0) => spares::check(&balancer, index),
                _ => Ok(()),
            };
            let set = set.and_then(|()| Ok(balancer.set_weight(index, weight)?));
            let moves = match stations {
                // As with a drain, or it would never be without any.
                Some(stations) if set.is_ok() && weight == Some(0) => stations.evacuate(index, clock.now()),
                _ => Vec::new(),
            };
            let report = NicWeightReport {
                id: id.clone(),
                weight: in_force(),
                before,
            };
            let cause = format!("{before} to {}", report.weight);
            answered(ticket, set, Some(id), "weight", cause, &report, moves)
        });
        Ok(Reply::Later)
    }

    /// `nic_drain` and `nic_undrain`
    pub(super) fn set_drained(
        &mut self,
        ticket: Ticket,
        id: &str,
        drained: bool,
    ) -> Result<Reply, CallError> {
        let index = self.nic_called(id)?.index();
        let (balancer, id) = (Arc::clone(&self.balancer), id.to_owned());
        let (stations, counted, clock) = (self.stations(), self.counted(), self.engine.watcher());
        self.keeper.run(move || {
            let (set, kind) = match drained {
                true => (spares::drain(&balancer, index), "drained"),
                false => (balancer.undrain(index).map_err(Into::into), "undrained"),
            };
            let mut sessions = *set.as_ref().unwrap_or(&0);
            let mut moves = Vec::new();
            if let Some(stations) = stations.filter(|_| set.is_ok()) {
                // A station never ends by itself, as a session does.
                if drained {
                    moves = stations.evacuate(index, clock.now());
                }
                sessions = stations.per_nic()[usize::from(index)];
            }
            let report = NicSessionsReport {
                id: id.clone(),
                sessions,
                counted,
            };
            let cause = format!("{sessions} {counted} left");
            answered(ticket, set, Some(id), kind, cause, &report, moves)
        });
        Ok(Reply::Later)
    }

    /// `lb_set`
    pub(super) fn set_algorithm(&mut self, ticket: Ticket, word: &str) -> Result<Reply, CallError> {
        let algorithm: Algorithm = word.parse().map_err(bad_params)?;
        let balancer = Arc::clone(&self.balancer);
        self.keeper.run(move || {
            let report = AlgorithmReport {
                before: balancer.set_policy(algorithm).to_string(),
                algorithm: algorithm.to_string(),
            };
            let cause = format!("{} to {algorithm}", report.before);
            let set = Ok::<(), CallError>(());
            answered(ticket, set, None, "algorithm", cause, &report, Vec::new())
        });
        Ok(Reply::Later)
    }

    /// `events`
    pub(super) fn events_after(
        &mut self,
        ticket: Ticket,
        after: u64,
        wait_s: u64,
    ) -> Result<Reply, CallError> {
        if wait_s > MAX_WAIT_S {
            return Err(Refusal::Wait { wait_s }.into());
        }
        if wait_s == 0 || self.journal.last() > after {
            return Reply::report(&self.journal.after(after));
        }
        self.listeners.push(Listener {
            ticket,
            after,
            until: Instant::now() + Duration::from_secs(wait_s),
        });
        Ok(Reply::Later)
    }

    /// Answers those who wait for events; returns when to come back at the latest.
    pub(super) fn tell_listeners(&mut self) -> Option<Instant> {
        let (now, last) = (Instant::now(), self.journal.last());
        let is_due = |listener: &mut Listener| listener.until <= now || last > listener.after;
        let due: Vec<Listener> = self.listeners.extract_if(.., is_due).collect();
        for Listener { ticket, after, .. } in due {
            let answer = Reply::report(&self.journal.after(after));
            self.answer(ticket, answer);
        }
        self.listeners.iter().map(|listener| listener.until).min()
    }

    /// `explain`
    pub(super) fn explain(&self, text: &str) -> Result<Reply, CallError> {
        if let Some(stations) = self.stations() {
            return self.explain_station(&stations, text);
        }
        let frame = flow::frame(text).map_err(bad_params)?;
        let explained = self.balancer.explain(self.engine.now(), &parse(&frame));
        Reply::report(&explain_report(&explained, explained.key.to_string()))
    }
}

/// A change of the balancer, done or refused.
fn answered<T, E: std::fmt::Display>(
    ticket: Ticket,
    outcome: Result<T, E>,
    nic: Option<String>,
    kind: &'static str,
    cause: String,
    report: &impl serde::Serialize,
    moves: Vec<Move>,
) -> Done {
    let (answer, event) = match outcome {
        Ok(_) => (Reply::report(report), Some((nic, kind, cause))),
        Err(error) => (Err(CallError::new(ErrorCode::Refused, error.to_string())), None),
    };
    Done::Answer {
        ticket,
        answer,
        event,
        moves,
    }
}

/// `key`: what was asked about.
pub(super) fn explain_report(explained: &Explanation, key: String) -> ExplainReport {
    let id = |index: NicIndex| {
        let found = explained.nics.iter().find(|nic| nic.state.nic == index);
        found.map_or_else(|| removed_nic(index), |nic| nic.state.info.id.clone())
    };
    let nics = explained.nics.iter().map(|nic| ExplainedNic {
        id: nic.state.info.id.clone(),
        alive: nic.alive,
        drained: nic.state.drained,
        slow_start: nic.warming,
        weight: nic.state.weight,
        speed_mbps: nic.state.speed_mbps,
        sessions: nic.sessions,
        half_open: nic.half_open,
        rtt_us: nic.figures.rtt_us,
        utilisation: nic.figures.utilisation,
        cost: nic.figures.cost,
    });
    ExplainReport {
        key,
        algorithm: explained.algorithm.to_string(),
        slot: explained.slot,
        order: explained.order.iter().map(|nic| id(*nic)).collect(),
        pinned: explained.pinned.map(id),
        pinned_ms: explained.pinned_ms.map(u64::from),
        has_moved: explained.has_moved,
        moves_to: explained.moves_to.map(id),
        choice: explained.choice.map(id),
        reason: explained.reason.to_string(),
        nics: nics.collect(),
    }
}
