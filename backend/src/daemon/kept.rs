//! What the keeper has done, and what follows from it.

use anyhow::Result;
use tracing::info;
use vnic_dataplane::neighbour::snoop::Snooped;
use vnic_lb::nics::NicIndex;
use vnic_lb::pinned::Move;

use super::Daemon;
use super::membership::Released;
use super::probes::HostAddress;
use super::spares::SpareError;
use super::uplinks::Opened;
use crate::config::NicConfig;
use crate::control::protocol::{CallError, Reply, Ticket};

/// What the keeper gives.
pub(super) enum Done {
    /// A NIC that an operator asked for was opened, or not.
    Added {
        ticket: Ticket,
        config: NicConfig,
        opened: Result<Box<Opened>>,
    },
    /// A NIC whose interface came back was opened, or not.
    Reopened {
        index: NicIndex,
        opened: Result<Box<Opened>>,
    },
    /// The balancer has let go of a NIC, or needs it.
    Released {
        ticket: Ticket,
        index: NicIndex,
        released: Result<Released, SpareError>,
    },
    /// What nobody waits for.
    Nothing,
    /// Addresses that guests may have.
    Snooped(Vec<Snooped>),
    /// Those of the host.
    Addresses(Vec<HostAddress>),
    /// Somebody waits for that.
    Answer {
        ticket: Ticket,
        answer: Result<Reply, CallError>,
        /// To be kept: NIC, kind, cause.
        event: Option<(Option<String>, &'static str, String)>,
        /// Stations that other NICs have now.
        moves: Vec<Move>,
    },
}

impl Daemon {
    /// Takes in what the keeper has done.
    pub(super) fn on_keeper(&mut self) {
        for done in self.keeper.done() {
            match done {
                Done::Added {
                    ticket,
                    config,
                    opened,
                } => self.added(ticket, config, opened),
                Done::Reopened { index, opened } => self.reopened(index, opened),
                Done::Released {
                    ticket,
                    index,
                    released,
                } => self.released(ticket, index, released),
                Done::Nothing => {}
                Done::Snooped(found) => self.snooped(found),
                Done::Addresses(all) => self.addresses_listed(all),
                Done::Answer {
                    ticket,
                    answer,
                    event,
                    moves,
                } => {
                    self.stations_moved(&moves);
                    if let Some((nic, kind, cause)) = event {
                        info!(nic, cause, "changed by an operator: {kind}");
                        self.journal.note(nic.as_deref(), kind, cause);
                    }
                    self.answer(ticket, answer);
                }
            }
        }
    }
}
