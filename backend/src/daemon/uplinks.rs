//! The life of the NICs: they come, go, vanish and return while everything else goes on.
//!
//! What takes long is the keeper's. A NIC's sockets are closed only after every worker has picked up a picture without them, and a
//! NIC is watched, and so taken for sessions, only after every worker knows it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tracing::{info, warn};
use vnic_dataplane::fabric::{Nic, NicState, VlanMode};
use vnic_dataplane::memory::frames::FrameMemory;
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::Daemon;
use super::drive::{Checked, Drive, locked_bytes};
use super::health::{Command, News};
use super::kept::Done;
use super::nic::{NicRuntime, Phase, removed_nic};
use crate::config::NicConfig;
use crate::control::protocol::{Reply, Ticket};
use crate::control::report::NicSessionsReport;
use crate::host::interface::{self, Interface};
use crate::host::netlink::link::Link;
use crate::host::privileges;

/// How long a NIC that goes keeps its sockets: the workers send what a lost one had in flight by others, or a removed one sends it itself.
pub(super) const FAREWELL: Duration = Duration::from_millis(50);

/// Time between two attempts to take up an interface that is there and cannot be opened.
const RETRY: Duration = Duration::from_secs(1);

/// Chunks that workers need beside a new NIC's fill rings.
const SPARE_CHUNKS: u32 = 1024;

/// A NIC that was opened.
pub(super) struct Opened {
    pub(super) interface: Interface,
    pub(super) state: Arc<NicState>,
    pub(super) drive: Drive,
}

/// Sockets that go when no worker uses them any more.
pub(super) struct Leaving {
    drive: Drive,
    /// The first generation without them; not known before it is published.
    generation: Option<u64>,
    /// Who waits for it, and what he is told.
    removal: Option<(Ticket, NicSessionsReport)>,
}

impl Leaving {
    /// Of a NIC that the next publication lacks.
    pub(super) fn new(drive: Drive, removal: Option<(Ticket, NicSessionsReport)>) -> Leaving {
        Leaving {
            drive,
            generation: None,
            removal,
        }
    }
}

/// Why an interface cannot be taken up.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    /// Its rings would starve the others.
    #[error(
        "NIC {ifname}: its {queues} receive queues need {needed} chunks of frame memory and {free} are free: give it fewer \
         queues (`ethtool -L`), or start vnicd with `--frames {frames}` or more"
    )]
    Memory {
        ifname: String,
        queues: u32,
        needed: u32,
        free: u32,
        frames: u32,
    },
}

/// Opens an interface as the NIC that `state` gives once it was found fit; called by the keeper.
pub(super) fn open(
    config: &NicConfig,
    allow_default_route: bool,
    needs_tags: bool,
    driven_queues: u64,
    memory: &Arc<FrameMemory>,
    state: impl FnOnce(&Interface) -> Result<Arc<NicState>>,
) -> Result<Box<Opened>> {
    let mut checked = Checked::new(config, allow_default_route)?;
    let queues = driven_queues + u64::from(checked.queues);
    privileges::check(locked_bytes(queues, memory.chunk_count()))?;
    let (free, needed) = (
        memory.census().free,
        (checked.ring_chunks() / 2).saturating_add(SPARE_CHUNKS),
    );
    if free < needed {
        return Err(OpenError::Memory {
            ifname: config.ifname.clone(),
            queues: checked.queues,
            needed,
            free,
            frames: memory.chunk_count().saturating_add(checked.ring_chunks()),
        }
        .into());
    }
    let channels = checked.set_channels(config)?;
    let state = state(&checked.interface)?;
    let drive = Drive::open(config, &checked, channels, Arc::clone(&state), needs_tags, memory)?;
    Ok(Box::new(Opened {
        interface: checked.interface,
        state,
        drive,
    }))
}

impl Daemon {
    /// The NICs by index, with absent ones in the gaps.
    pub(super) fn nic_views(&self) -> Vec<Arc<Nic>> {
        let count = self.nics.iter().map(|nic| usize::from(nic.index()) + 1).max();
        let mut views: Vec<Arc<Nic>> = self.vacant.iter().take(count.unwrap_or(0)).cloned().collect();
        for nic in &self.nics {
            views[usize::from(nic.index())] = nic.view();
        }
        views
    }

    /// The NIC with this index: the newest, if one that is being removed still had it.
    pub(super) fn nic_at(&mut self, index: NicIndex) -> Option<&mut NicRuntime> {
        self.nics.iter_mut().rev().find(|nic| nic.index() == index)
    }

    /// Its id, or what it is called by that index alone once it is removed.
    pub(super) fn nic_id(&self, index: NicIndex) -> String {
        let found = self.nics.iter().rev().find(|nic| nic.index() == index);
        found.map_or_else(|| removed_nic(index), |nic| nic.id().to_owned())
    }

    pub(super) fn needs_tags(&self) -> bool {
        self.config
            .ports
            .iter()
            .any(|port| port.vlan != VlanMode::Transparent)
    }

    pub(super) fn driven_queues(&self) -> u64 {
        self.nics.iter().map(|nic| u64::from(nic.queues())).sum()
    }

    /// Has every NIC take frames to this address for the guests.
    pub(super) fn admit(&mut self, mac: Mac) {
        for nic in &mut self.nics {
            let Some(drive) = &mut nic.drive else { continue };
            if let Err(error) = drive.admit(mac) {
                warn!(
                    nic = nic.config.id,
                    "cannot take frames to {mac} for the guest: {error}"
                );
            }
        }
    }

    /// Has every NIC leave frames to this address to the host again, unless another port, of other VLANs, has it too.
    pub(super) fn withdraw(&mut self, mac: Mac) {
        if self
            .ports
            .iter()
            .any(|port| port.mac.is_some_and(|(own, _)| own == mac))
        {
            return;
        }
        for nic in &mut self.nics {
            let Some(drive) = &mut nic.drive else { continue };
            if let Err(error) = drive.withdraw(mac) {
                warn!(
                    nic = nic.config.id,
                    "frames to {mac} are still taken, which no guest has any more: {error}"
                );
            }
        }
    }

    /// Takes in what the health thread has found.
    pub(super) fn on_health(&mut self) {
        for news in self.health.news() {
            match news {
                News::Vanished(index) => self.vanished(index),
                News::Moved(moves) => self.stations_moved(&moves),
                News::Turned { event, at } => {
                    let Some(nic) = self.nic_at(event.nic) else {
                        continue;
                    };
                    let cause = nic.turned(&event, at);
                    let id = nic.id().to_owned();
                    let kind = if event.alive { "alive" } else { "lost" };
                    self.journal.note_at(at, Some(&id), kind, cause);
                    if event.alive {
                        self.read_speed(event.nic);
                        self.nic_returned(event.nic);
                    }
                }
            }
        }
    }

    /// Has the keeper tell the balancer how fast a NIC's link is: it may have been negotiated anew, or for the first time.
    fn read_speed(&mut self, index: NicIndex) {
        let balancer = Arc::clone(&self.balancer);
        let Some(nic) = self.nic_at(index) else { return };
        let (id, ifname) = (nic.id().to_owned(), nic.interface.name.clone());
        self.keeper.run(move || {
            // Unknown while it is down again, or if the driver does not tell: then what was known is the best guess.
            if let Some(mbps) = interface::link_speed(&ifname)
                && balancer.set_link_speed(index, Some(mbps)) == Ok(true)
            {
                info!(nic = id, mbps, "link speed");
            }
            Done::Nothing
        });
    }

    /// A NIC's interface is gone; said by the health thread, netlink, or both.
    fn vanished(&mut self, index: NicIndex) {
        let close_at = Instant::now() + FAREWELL;
        let Some(nic) = self.nic_at(index) else { return };
        if matches!(nic.phase, Phase::Driven | Phase::Joining { .. }) {
            nic.phase = Phase::Vanished { close_at };
            nic.note("vanished".to_owned());
            let id = nic.id().to_owned();
            warn!(
                nic = id,
                "its interface is gone; it is taken up again when it is back"
            );
            self.journal.note(Some(&id), "link", "vanished");
        }
    }

    /// netlink: the interface with this index is gone.
    pub(super) fn interface_left(&mut self, ifindex: u32) {
        let driven = |nic: &&NicRuntime| nic.drive.is_some() && nic.interface.index == ifindex;
        if let Some(index) = self.nics.iter().find(driven).map(NicRuntime::index) {
            self.health.tell(Command::Left(index));
            self.vanished(index);
        }
    }

    /// netlink: an interface is there, or changed.
    pub(super) fn interface_is(&mut self, link: &Link, master: Option<String>) {
        let driven = |nic: &&mut NicRuntime| nic.drive.is_some() && nic.interface.index == link.index;
        if let Some(nic) = self.nics.iter_mut().find(driven) {
            let (told, id) = (nic.link_changed(link, master), nic.id().to_owned());
            for cause in told {
                self.journal.note(Some(&id), "link", cause);
            }
            self.health.tell(Command::Look);
        } else if let Some(nic) = self.nics.iter_mut().find(|nic| nic.misses(link))
            && let Phase::Absent { retry_at } = &mut nic.phase
        {
            *retry_at = Some(Instant::now());
        }
    }

    /// Looks at the NICs' numbers of queues, of which no netlink message tells.
    pub(super) fn check_queues(&mut self) {
        for nic in &mut self.nics {
            if let Some(cause) = nic.check_queues() {
                self.journal.note(Some(nic.id()), "link", cause);
            }
        }
    }

    /// Opens, closes and retries what is due; returns when to come back at the latest.
    pub(super) fn turn_uplinks(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut due = Vec::new();
        for nic in &mut self.nics {
            match &mut nic.phase {
                Phase::Vanished { close_at } if *close_at <= now => {
                    nic.phase = Phase::Absent { retry_at: Some(now) };
                    if let Some(drive) = nic.park() {
                        self.unpublished = true;
                        self.leaving.push(Leaving::new(drive, None));
                    }
                }
                Phase::Absent { retry_at } if retry_at.is_some_and(|at| at <= now) => {
                    *retry_at = None;
                    due.push(nic.index());
                }
                _ => {}
            }
        }
        due.into_iter().for_each(|index| self.reopen(index));
        self.remove_due(now);
        let deadline = |nic: &NicRuntime| match &nic.phase {
            Phase::Vanished { close_at } | Phase::Removing { close_at } => Some(*close_at),
            Phase::Absent { retry_at } => *retry_at,
            Phase::Driven | Phase::Joining { .. } | Phase::Opening => None,
        };
        self.nics.iter().filter_map(deadline).min()
    }

    /// Opens a NIC again whose interface is there again.
    fn reopen(&mut self, index: NicIndex) {
        let (needs_tags, queues) = (self.needs_tags(), self.driven_queues());
        let (allow, memory) = (self.config.allow_default_route_nic, Arc::clone(&self.memory));
        let Some(at) = self.nics.iter().position(|nic| nic.index() == index) else {
            return;
        };
        let nic = &self.nics[at];
        // Under the name that it was configured with, or was renamed to.
        let names = [&nic.config.ifname, &nic.interface.name];
        let links = self.links.as_ref();
        let there = |name: &&&String| links.is_some_and(|links| links.with_name(name).is_some());
        let Some(ifname) = names.iter().find(there).map(|name| (*name).clone()) else {
            // netlink will tell when one of them is there.
            return;
        };
        let mut config = nic.config.clone();
        config.ifname = ifname;
        let state = Arc::clone(&nic.state);
        self.nics[at].phase = Phase::Opening;
        self.keeper.run(move || Done::Reopened {
            index,
            opened: open(&config, allow, needs_tags, queues, &memory, |_| Ok(state)),
        });
    }

    /// An interface that was back is open again, or not.
    pub(super) fn reopened(&mut self, index: NicIndex, opened: Result<Box<Opened>>) {
        let Some(nic) = self.nic_at(index) else { return };
        if !matches!(nic.phase, Phase::Opening) {
            // Removed meanwhile; what was opened is closed off the loop.
            if let Ok(opened) = opened {
                self.keeper.close(opened.drive, || Done::Nothing);
            }
            return;
        }
        match opened {
            Ok(opened) => {
                nic.rejoin(opened.interface, opened.drive);
                let id = nic.id().to_owned();
                info!(nic = id, "its interface is back");
                self.journal.note(Some(&id), "returned", "its interface is back");
                self.join();
            }
            Err(error) => {
                let failed = format!("{error:#}");
                if nic.failed.as_ref() != Some(&failed) {
                    info!(
                        nic = nic.config.id,
                        "its interface cannot be taken up again yet: {failed}"
                    );
                }
                nic.failed = Some(failed);
                nic.phase = Phase::Absent {
                    retry_at: Some(Instant::now() + RETRY),
                };
            }
        }
    }

    /// A NIC has sockets now: they take what is for the guests, and the workers are told.
    pub(super) fn join(&mut self) {
        let macs: Vec<Mac> = self.ports.iter().filter_map(|port| Some(port.mac?.0)).collect();
        macs.into_iter().for_each(|mac| self.admit(mac));
        self.unpublished = true;
    }

    /// The NICs' part of a publication.
    pub(super) fn nics_published(&mut self, published: u64) {
        for nic in &mut self.nics {
            if let Phase::Joining { generation, .. } = &mut nic.phase {
                generation.get_or_insert(published);
            }
        }
        for leaving in &mut self.leaving {
            leaving.generation.get_or_insert(published);
        }
    }

    /// All workers have picked up `settled`: watches NICs that they know, closes those that they do not use any more.
    pub(super) fn nics_settled(&mut self, settled: u64) {
        let mut failed = Vec::new();
        // Whether it had returned, of one that is due.
        let due = |nic: &NicRuntime| match nic.phase {
            Phase::Joining {
                generation: Some(at),
                returned,
            } if at <= settled => Some(returned),
            _ => None,
        };
        if self.nics.iter().any(|nic| due(nic) == Some(true)) {
            // Before anybody asks, or what is answered at first would count as lost.
            self.count_answers();
        }
        for nic in &mut self.nics {
            let Some(returned) = due(nic) else { continue };
            match nic.watched() {
                Ok(watched) => {
                    nic.phase = Phase::Driven;
                    self.health.tell(if returned {
                        nic.probing = nic.probe_plan(&self.addresses);
                        Command::WatchAgain(nic.index(), watched, nic.probing)
                    } else {
                        Command::Watch(nic.index(), watched)
                    });
                }
                Err(error) => {
                    warn!(nic = nic.config.id, "{error:#}");
                    failed.push(nic.index());
                }
            }
        }
        self.arm_probes();
        // Gone again.
        failed.into_iter().for_each(|index| self.vanished(index));
        let free = |leaving: &mut Leaving| leaving.generation.is_some_and(|at| at <= settled);
        let leaving: Vec<Leaving> = self.leaving.extract_if(.., free).collect();
        for Leaving { drive, removal, .. } in leaving {
            drive.nic.clear(&mut self.chunks);
            match removal {
                None => self.keeper.close(drive, || Done::Nothing),
                Some((ticket, report)) => {
                    let left = format!("{} {} go on by the others", report.sessions, report.counted);
                    let event = Some((Some(report.id.clone()), "removed", left));
                    self.keeper.close(drive, move || Done::Answer {
                        ticket,
                        answer: Reply::report(&report),
                        event,
                        moves: Vec::new(),
                    });
                }
            }
        }
    }
}

/// Watches the NICs of the start, which the workers are told of before anything else.
pub(super) fn first_watch(nics: &[NicRuntime]) -> Result<Vec<(NicIndex, super::health::Watched)>> {
    let watch = |nic: &NicRuntime| Ok((nic.index(), nic.watched()?));
    nics.iter()
        .map(watch)
        .collect::<Result<_>>()
        .context("cannot watch the NICs")
}
