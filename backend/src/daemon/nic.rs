//! One host NIC at run time: its sockets, its XDP program, and whether it can carry frames.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tracing::{info, warn};
use vnic_dataplane::fabric::{Nic, NicQueue, NicState, VlanMode};
use vnic_dataplane::group::GroupTap;
use vnic_dataplane::memory::frames::{CHUNK_SIZE, FrameMemory};
use vnic_dataplane::program::{self, Program};
use vnic_dataplane::xsk;
use vnic_lb::mac::Mac;
use vnic_lb::nics::{AliveSet, NicIndex};

use crate::config::{AttachMode, Config, NicConfig, ZeroCopy};
use crate::host::carrier::{CarrierWatch, Cause, Change};
use crate::host::channels::{self, ChannelsGuard};
use crate::host::interface::{self, Interface, check_nic};
use crate::host::netlink::link::Link;
use crate::host::offload::Offloads;

/// Frames of at most this many payload bytes fit one chunk, behind the headroom that the kernel keeps for XDP.
const SINGLE_CHUNK_MTU: u32 = 3500;

/// An interface that was found fit, before anything is done to it.
pub(super) struct Checked {
    interface: Interface,
    queues: u32,
}

impl Checked {
    /// Chunks that its rings hold when all are full.
    pub(super) fn ring_chunks(&self) -> u32 {
        let rings = xsk::XskConfig::new(self.interface.index, &self.interface.name, 0);
        self.queues.saturating_mul(rings.fill_ring + rings.tx_ring)
    }
}

/// Looks at all NICs before any is touched.
pub(super) fn check_all(config: &Config) -> Result<Vec<Checked>> {
    let check = |nic: &NicConfig| {
        let interface = check_nic(nic, config.allow_default_route_nic)?;
        Ok(Checked {
            queues: nic.queues.unwrap_or(interface.rx_queues),
            interface,
        })
    };
    config.nics.iter().map(check).collect()
}

/// Gives the interfaces the queues that `set-channels=on` asks for, until the guards are dropped.
pub(super) fn set_channels(config: &Config, checked: &mut [Checked]) -> Result<Vec<ChannelsGuard>> {
    let mut guards = Vec::new();
    for (nic, checked) in config.nics.iter().zip(checked) {
        let Some(queues) = nic.queues.filter(|_| nic.set_channels) else {
            continue;
        };
        let found = &mut checked.interface;
        if let Some(guard) = channels::set(found.index, &found.name, queues)? {
            info!(nic = nic.id, queues, "number of queues set until vnicd ends");
            guards.push(guard);
        }
        *found = interface::lookup(&found.name)?;
        interface::check_queues(found, nic.queues)?;
    }
    Ok(guards)
}

/// Bytes that the kernel accounts as locked: frame memory is registered once for each queue.
pub(super) fn locked_bytes(checked: &[Checked], frames: u32) -> u64 {
    let queues: u64 = checked.iter().map(|nic| u64::from(nic.queues)).sum();
    queues * u64::from(frames) * CHUNK_SIZE as u64
}

/// A NIC that is driven.
pub(super) struct NicRuntime {
    config: NicConfig,
    pub(super) interface: Interface,
    nic: Arc<Nic>,
    /// Detached, together with its maps, when this is dropped or the process dies.
    program: Program,
    carrier: CarrierWatch,
    pub(super) zero_copy: bool,
    pub(super) multi_buffer: bool,
    pub(super) last_change: Option<LastChange>,
    pub(super) changes: u64,
    /// Bridge, bond, ... that it belongs to now: its index and name.
    master: Option<(u32, String)>,
    /// Put back last of all, when nothing is received any more.
    _offloads: Offloads,
}

/// The last time that something of a NIC changed.
pub(super) struct LastChange {
    pub(super) at: Instant,
    pub(super) alive: bool,
    pub(super) cause: String,
}

/// Opens every checked NIC.
pub(super) fn open_all(
    config: &Config,
    checked: Vec<Checked>,
    memory: &Arc<FrameMemory>,
) -> Result<Vec<NicRuntime>> {
    let numbered = config.nics.iter().zip(checked).enumerate();
    numbered
        .map(|(index, (nic, checked))| {
            let index = NicIndex::try_from(index).context("too many NICs")?;
            NicRuntime::open(nic, checked, index, config, memory)
        })
        .collect()
}

impl NicRuntime {
    fn open(
        config: &NicConfig,
        checked: Checked,
        index: NicIndex,
        daemon: &Config,
        memory: &Arc<FrameMemory>,
    ) -> Result<NicRuntime> {
        let Checked { interface, queues } = checked;
        let name = &interface.name;
        let carrier = CarrierWatch::new(name).with_context(|| {
            format!("NIC {name}: cannot watch its carrier in /sys/class/net (is sysfs mounted?)")
        })?;
        // First, so that a foreign program is found before anything else is done.
        let mode = match config.attach {
            AttachMode::Auto => program::AttachMode::Auto,
            AttachMode::Native => program::AttachMode::Native,
            AttachMode::Skb => program::AttachMode::Skb,
        };
        let mut program = Program::attach(interface.index, name, mode)?;
        let needs_tags = daemon.ports.iter().any(|port| port.vlan != VlanMode::Transparent);
        let offloads = Offloads::prepare(name, needs_tags)?;
        let (mut zero_copy, mut multi_buffer) = (true, true);
        let mut opened = Vec::new();
        for queue in 0..queues {
            let settings = xsk::XskConfig {
                zerocopy: match config.zerocopy {
                    ZeroCopy::Auto => xsk::ZeroCopy::Auto,
                    ZeroCopy::Require => xsk::ZeroCopy::Require,
                    ZeroCopy::Off => xsk::ZeroCopy::Off,
                },
                ..xsk::XskConfig::new(interface.index, name, queue)
            };
            let (rx, tx, info) = xsk::open_queue(&settings, memory, index)?;
            program.set_socket(queue, &rx)?;
            zero_copy &= info.zerocopy;
            multi_buffer &= info.multi_buffer;
            opened.push(NicQueue::new(Box::new(rx), Box::new(tx)));
        }
        let group = GroupTap::open(interface.index, name)?;
        if offloads.filters_vlans && needs_tags {
            group.admit_everything()?;
        } else if offloads.filters_vlans {
            warn!(
                nic = config.id,
                "the NIC drops tagged frames of VLANs that the host has not joined: give the ports `vlan` or `trunk` if \
                 their guests use tags"
            );
        }
        info!(
            nic = config.id,
            interface = name,
            queues,
            attach = attach_word(&program),
            zero_copy,
            multi_buffer,
            "NIC opened"
        );
        if interface.mtu > SINGLE_CHUNK_MTU && !multi_buffer {
            warn!(
                nic = config.id,
                "frames above {SINGLE_CHUNK_MTU} bytes cannot pass: this kernel or driver has no multi-buffer AF_XDP"
            );
        }
        let nic = Arc::new(Nic {
            state: Arc::new(NicState::new(
                index,
                config.id.clone(),
                daemon.workers,
                interface.mtu,
            )),
            mac: interface.mac,
            queues: opened.into(),
            group: Some(Mutex::new(group)),
            // Generic XDP serves interfaces of every kind, with whatever the host's own stack sends through them.
            partial_checksums: offloads.partial_checksums || program.mode() == program::AttachMode::Skb,
        });
        let config = config.clone();
        Ok(NicRuntime {
            config,
            interface,
            nic,
            program,
            carrier,
            zero_copy,
            multi_buffer,
            last_change: None,
            changes: 0,
            master: None,
            _offloads: offloads,
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.config.id
    }

    pub(super) fn mac(&self) -> Mac {
        self.interface.mac
    }

    pub(super) fn attach_mode(&self) -> &'static str {
        attach_word(&self.program)
    }

    pub(super) fn program(&self) -> &Program {
        &self.program
    }

    pub(super) fn has_carrier(&self) -> bool {
        self.carrier.up()
    }

    pub(super) fn view(&self) -> Arc<Nic> {
        Arc::clone(&self.nic)
    }

    /// Takes frames to this address from now on: the NIC lets them in, and the XDP program gives them to the guests.
    pub(super) fn admit(&mut self, mac: Mac) -> Result<()> {
        if let Some(group) = &self.nic.group {
            group.lock().unwrap_or_else(PoisonError::into_inner).admit(mac)?;
        }
        Ok(self.program.allow_mac(mac)?)
    }

    /// Takes the first look: the NIC is alive if it has a carrier now.
    pub(super) fn init_alive(&self, alive: &AliveSet) {
        let up = self.carrier.up();
        alive.set(self.nic.state.index, up);
        if !up {
            warn!(
                nic = self.config.id,
                "no carrier yet: sessions use the other NICs until it has one"
            );
        }
    }

    /// Looks for a change of the carrier, and lets the balancer know at once.
    pub(super) fn poll_carrier(&mut self, alive: &AliveSet) {
        if let Some(change) = self.carrier.poll() {
            self.carrier_changed(change, alive);
        }
    }

    /// The interface was deleted, or moved to another network namespace.
    pub(super) fn left(&mut self, alive: &AliveSet) {
        if let Some(change) = self.carrier.left() {
            self.carrier_changed(change, alive);
        }
    }

    fn carrier_changed(&mut self, change: Change, alive: &AliveSet) {
        alive.set(self.nic.state.index, change.up);
        let cause = change.cause.as_str();
        self.note(change.up, cause.to_owned());
        let nic = &self.config.id;
        if change.up {
            info!(nic, cause, "NIC alive: it takes new sessions");
        } else if change.cause == Cause::Vanished {
            warn!(
                nic,
                cause, "NIC lost for good: its sessions go on by the others; {RESTART}"
            );
        } else {
            warn!(nic, cause, "NIC lost: its sessions go on by the others");
        }
    }

    /// Takes in what the kernel says of the interface now; `master` is the name of what it belongs to. Nothing here stops the
    /// NIC: sockets and program are bound to its index.
    pub(super) fn link_changed(&mut self, link: &Link, master: Option<String>) {
        let nic = self.config.id.clone();
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
            self.note(self.carrier.up(), cause);
        }
        if link.mtu != self.interface.mtu {
            let cause = format!("MTU changed from {} to {}", self.interface.mtu, link.mtu);
            self.interface.mtu = link.mtu;
            self.nic.state.mtu.store(link.mtu, Ordering::Relaxed);
            warn!(
                nic,
                "{cause}: longer frames of the guests are dropped and counted as too_long"
            );
            self.note(self.carrier.up(), cause);
        }
        let index = |master: &Option<(u32, String)>| master.as_ref().map(|(index, _)| *index);
        let now = link.master.zip(master);
        if index(&now) != index(&self.master) {
            let before = std::mem::replace(&mut self.master, now);
            let cause = match (&self.master, &before) {
                (Some((_, name)), _) => format!("enslaved to {name}"),
                (None, Some((_, name))) => format!("released by {name}"),
                (None, None) => return,
            };
            match self.concern_of_master() {
                Some(concern) => warn!(nic, "{cause}: {concern}"),
                None => info!(nic, "{cause}"),
            }
            self.note(self.carrier.up(), cause);
        }
    }

    /// Counts the interface's receive queues again.
    pub(super) fn check_queues(&mut self) {
        let Some(now) = channels::rx_queues(&self.interface.name) else {
            return;
        };
        let before = std::mem::replace(&mut self.interface.rx_queues, now);
        if now == before {
            return;
        }
        let cause = format!("receive queues changed from {before} to {now}");
        let nic = &self.config.id;
        match self.concern_of_queues() {
            Some(concern) => warn!(nic, "{cause}: {concern}"),
            None => info!(nic, "{cause}"),
        }
        self.note(self.carrier.up(), cause);
    }

    /// What is wrong with it now, and what to do.
    pub(super) fn concerns(&self) -> Vec<String> {
        if self.carrier.vanished() {
            return vec![format!("the interface is gone: {RESTART}")];
        }
        let mut concerns: Vec<String> = self.concern_of_queues().into_iter().collect();
        concerns.extend(self.concern_of_master());
        concerns
    }

    fn concern_of_queues(&self) -> Option<String> {
        let driven = u32::try_from(self.nic.queues.len()).unwrap_or(u32::MAX);
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

    fn note(&mut self, alive: bool, cause: String) {
        self.changes += 1;
        self.last_change = Some(LastChange {
            at: Instant::now(),
            alive,
            cause,
        });
    }
}

/// What brings an interface back that was gone.
const RESTART: &str = "restart vnicd to drive it again, should it return";

fn attach_word(program: &Program) -> &'static str {
    match program.mode() {
        program::AttachMode::Skb => "skb",
        program::AttachMode::Native | program::AttachMode::Auto => "native",
    }
}
