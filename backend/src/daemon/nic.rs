//! One host NIC at run time: what is known of its interface, whether it is driven, and what happened to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, Result};
use tracing::{info, warn};
use vnic_dataplane::fabric::{Nic, NicState};
use vnic_lb::health::{Cause, Event};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::drive::Drive;
use super::health::{LinkView, ProbePlan, Watched, words};
use super::report::{SocketCounters, socket_counters};
use crate::config::NicConfig;
use crate::host::carrier::CarrierWatch;
use crate::host::channels;
use crate::host::interface::Interface;
use crate::host::netlink::link::Link;

/// What reports call a NIC that is removed and has sessions still.
pub(super) fn removed_nic(index: NicIndex) -> String {
    format!("removed NIC {index}")
}

/// How far a NIC is.
pub(super) enum Phase {
    /// Driven, and watched by the health thread.
    Driven,
    /// Driven, and to be watched once all workers know it.
    Joining {
        /// That generation; not known before it is published.
        generation: Option<u64>,
        /// Its interface was gone before.
        returned: bool,
    },
    /// Its interface is gone; its sockets go when the workers have had time to send what it had in flight by others.
    Vanished {
        /// When.
        close_at: Instant,
    },
    /// Without sockets, until the interface is back.
    Absent {
        /// When to try; `None`: netlink will tell when it is there.
        retry_at: Option<Instant>,
    },
    /// Being opened again.
    Opening,
    /// An operator has it removed; as for [`Phase::Vanished`].
    Removing {
        /// When.
        close_at: Instant,
    },
}

/// A NIC that is configured.
pub(super) struct NicRuntime {
    pub(super) config: NicConfig,
    /// As it was last seen.
    pub(super) interface: Interface,
    pub(super) state: Arc<NicState>,
    pub(super) drive: Option<Drive>,
    pub(super) phase: Phase,
    /// An operator wants it removed, which the keeper has yet to find possible.
    pub(super) leaves: bool,
    pub(super) link: Arc<LinkView>,
    /// What the health thread was told to probe.
    pub(super) probing: Option<ProbePlan>,
    /// What its earlier sockets had counted.
    pub(super) before: SocketCounters,
    /// Why it could not be taken up again, while that is so.
    pub(super) failed: Option<String>,
    pub(super) last_change: Option<LastChange>,
    pub(super) changes: u64,
    /// The cause of the last event of its health.
    health: Option<Cause>,
    alive: bool,
    /// Bridge, bond, ... that it belongs to now: its index and name.
    master: Option<(u32, String)>,
    /// For the workers while it has no sockets.
    absent: Arc<Nic>,
}

/// The last time that something of a NIC changed.
pub(super) struct LastChange {
    pub(super) at: Instant,
    pub(super) alive: bool,
    pub(super) cause: String,
}

impl NicRuntime {
    pub(super) fn new(
        config: NicConfig,
        interface: Interface,
        state: Arc<NicState>,
        drive: Drive,
    ) -> NicRuntime {
        NicRuntime {
            absent: Arc::new(Nic::absent(Arc::clone(&state), interface.mac)),
            config,
            interface,
            state,
            drive: Some(drive),
            phase: Phase::Joining {
                generation: None,
                returned: false,
            },
            leaves: false,
            link: Arc::default(),
            probing: None,
            before: SocketCounters::default(),
            failed: None,
            last_change: None,
            changes: 0,
            health: None,
            alive: false,
            master: None,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.config.id
    }

    pub(super) fn index(&self) -> NicIndex {
        self.state.index
    }

    pub(super) fn mac(&self) -> Mac {
        self.interface.mac
    }

    /// Queues driven.
    pub(super) fn queues(&self) -> u32 {
        let queues = self.drive.as_ref().map_or(0, |drive| drive.nic.queues.len());
        u32::try_from(queues).unwrap_or(u32::MAX)
    }

    /// The NIC as the workers are to see it.
    pub(super) fn view(&self) -> Arc<Nic> {
        Arc::clone(self.drive.as_ref().map_or(&self.absent, |drive| &drive.nic))
    }

    /// Takes its sockets out, which the workers do not see from the next publication on.
    pub(super) fn park(&mut self) -> Option<Drive> {
        let drive = self.drive.take()?;
        self.before = std::mem::take(&mut self.before).plus(&socket_counters(&drive));
        Some(drive)
    }

    /// What the health thread needs to watch it.
    pub(super) fn watched(&self) -> Result<Watched> {
        let drive = self.drive.as_ref().context("it has no sockets")?;
        let name = &self.interface.name;
        let carrier = CarrierWatch::new(name).with_context(|| {
            format!("NIC {name}: cannot watch its carrier in /sys/class/net (is sysfs mounted?)")
        })?;
        Ok(Watched::new(
            carrier,
            Arc::clone(&self.state),
            Arc::clone(&self.link),
            &drive.nic,
            drive.program.answers(),
            drive.zero_copy,
        ))
    }

    /// Whether this interface, new or back, is the one that it lacks.
    pub(super) fn misses(&self, link: &Link) -> bool {
        let named = link.name == self.config.ifname || link.name == self.interface.name;
        named && matches!(self.phase, Phase::Absent { .. })
    }

    /// Takes an interface that came back.
    pub(super) fn rejoin(&mut self, interface: Interface, drive: Drive) {
        self.state.mtu.store(interface.mtu, Ordering::Relaxed);
        self.absent = Arc::new(Nic::absent(Arc::clone(&self.state), interface.mac));
        self.interface = interface;
        (self.master, self.failed, self.probing) = (None, None, None);
        self.drive = Some(drive);
        self.phase = Phase::Joining {
            generation: None,
            returned: true,
        };
        self.note("returned".to_owned());
    }

    /// Takes in what the health thread says; returns the cause in words.
    pub(super) fn turned(&mut self, event: &Event, at: Instant) -> String {
        let vanished = matches!(self.phase, Phase::Vanished { .. } | Phase::Absent { .. });
        let cause = words(event.cause, vanished, self.health.replace(event.cause));
        let (nic, told) = (&self.config.id, &cause);
        if event.alive {
            info!(nic, cause = told, "NIC alive: it takes new sessions");
        } else {
            warn!(nic, cause = told, "NIC lost: its sessions go on by the others");
        }
        self.alive = event.alive;
        self.note_at(at, event.alive, cause.clone());
        cause
    }

    /// Takes in the first look, which is no change.
    pub(super) fn begin(&mut self, alive: bool) {
        self.phase = Phase::Driven;
        self.alive = alive;
        self.health = Some(if alive { Cause::Fit } else { Cause::CarrierLost });
        if !alive {
            warn!(
                nic = self.config.id,
                "no carrier yet: sessions use the other NICs until it has one"
            );
        }
    }

    /// Takes in what the kernel says of the interface now; `master` is the name of what it belongs to. Nothing here stops the
    /// NIC: sockets and program are bound to its index. Returns what changed, in words.
    pub(super) fn link_changed(&mut self, link: &Link, master: Option<String>) -> Vec<String> {
        let nic = self.config.id.clone();
        let mut told = Vec::new();
        let mut changes = Vec::new();
        if link.name != self.interface.name {
            changes.push(format!("renamed from {} to {}", self.interface.name, link.name));
            self.interface.name.clone_from(&link.name);
        }
        if let Some(mac) = link.mac.filter(|mac| *mac != self.interface.mac) {
            changes.push(format!("address changed from {} to {mac}", self.interface.mac));
            self.interface.mac = mac;
        }
        for cause in changes {
            info!(nic, "{cause}");
            told.push(cause.clone());
            self.note(cause);
        }
        if link.mtu != self.interface.mtu {
            let cause = format!("MTU changed from {} to {}", self.interface.mtu, link.mtu);
            self.interface.mtu = link.mtu;
            self.state.mtu.store(link.mtu, Ordering::Relaxed);
            warn!(
                nic,
                "{cause}: longer frames of the guests are dropped and counted as too_long"
            );
            told.push(cause.clone());
            self.note(cause);
        }
        let index = |master: &Option<(u32, String)>| master.as_ref().map(|(index, _)| *index);
        let now = link.master.zip(master);
        if index(&now) != index(&self.master) {
            let before = std::mem::replace(&mut self.master, now);
            let cause = match (&self.master, &before) {
                (Some((_, name)), _) => format!("enslaved to {name}"),
                (None, Some((_, name))) => format!("released by {name}"),
                (None, None) => return told,
            };
            match self.concern_of_master() {
                Some(concern) => warn!(nic, "{cause}: {concern}"),
                None => info!(nic, "{cause}"),
            }
            told.push(cause.clone());
            self.note(cause);
        }
        told
    }

    /// Counts the interface's receive queues again; returns what has changed in words.
    pub(super) fn check_queues(&mut self) -> Option<String> {
        self.drive.as_ref()?;
        let now = channels::rx_queues(&self.interface.name)?;
        let before = std::mem::replace(&mut self.interface.rx_queues, now);
        if now == before {
            return None;
        }
        let cause = format!("receive queues changed from {before} to {now}");
        let nic = &self.config.id;
        match self.concern_of_queues() {
            Some(concern) => warn!(nic, "{cause}: {concern}"),
            None => info!(nic, "{cause}"),
        }
        self.note(cause.clone());
        Some(cause)
    }

    /// What is wrong with it now, and what to do.
    pub(super) fn concerns(&self) -> Vec<String> {
        if let Phase::Vanished { .. } | Phase::Absent { .. } | Phase::Opening = self.phase {
            return vec![self.failed.as_ref().map_or_else(
                || "the interface is gone: it is taken up again when it is back".to_owned(),
                |failed| format!("the interface cannot be taken up again yet: {failed}"),
            )];
        }
        let mut concerns: Vec<String> = self.concern_of_queues().into_iter().collect();
        concerns.extend(self.concern_of_master());
        concerns
    }

    fn concern_of_queues(&self) -> Option<String> {
        let driven = self.queues();
        let (name, now) = (&self.interface.name, self.interface.rx_queues);
        if now == driven {
            return None;
        }
        let command = channels::command_for(self.interface.index, name, driven);
        Some(match now > driven {
            true => format!(
                "{driven} of {now} receive queues are driven, and the guests' frames that arrive on the others are lost: \
                 `{command}`, or restart vnicd"
            ),
            false => format!(
                "only {now} of the {driven} receive queues that are driven are left: `{command}`, or restart vnicd"
            ),
        })
    }

    fn concern_of_master(&self) -> Option<String> {
        let (_, master) = self.master.as_ref()?;
        let name = &self.interface.name;
        Some(format!(
            "belongs to {master}, which takes the host's frames and may change its address and state: \
             `ip link set dev {name} nomaster`"
        ))
    }

    /// Something of it has changed.
    pub(super) fn note(&mut self, cause: String) {
        self.note_at(Instant::now(), self.alive, cause);
    }

    fn note_at(&mut self, at: Instant, alive: bool, cause: String) {
        self.changes += 1;
        self.last_change = Some(LastChange { at, alive, cause });
    }
}
