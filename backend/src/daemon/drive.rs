//! A NIC's sockets, its XDP program and its settings on the host: what exists while it is driven, and goes as a whole.

use std::sync::{Arc, PoisonError};

use anyhow::Result;
use tracing::{info, warn};
use vnic_dataplane::fabric::{Nic, NicGroup, NicQueue, NicState};
use vnic_dataplane::group::GroupTap;
use vnic_dataplane::memory::frames::{CHUNK_SIZE, FrameMemory};
use vnic_dataplane::program::{self, Program};
use vnic_dataplane::xsk;
use vnic_lb::mac::Mac;

use super::probes::Expected;
use crate::config::{AttachMode, Config, NicConfig, ZeroCopy};
use crate::host::channels::{self, ChannelsGuard};
use crate::host::interface::{self, Interface, check_nic};
use crate::host::offload::Offloads;

/// Frames of at most this many payload bytes fit one chunk, behind the headroom that the kernel keeps for XDP.
const SINGLE_CHUNK_MTU: u32 = 3500;

/// An interface that was found fit, before anything is done to it.
pub(super) struct Checked {
    pub(super) interface: Interface,
    pub(super) queues: u32,
}

impl Checked {
    /// Looks at an interface without touching it.
    pub(super) fn new(config: &NicConfig, allow_default_route: bool) -> Result<Checked> {
        let interface = check_nic(config, allow_default_route)?;
        Ok(Checked {
            queues: config.queues.unwrap_or(interface.rx_queues),
            interface,
        })
    }

    /// Chunks that its rings hold when all are full.
    pub(super) fn ring_chunks(&self) -> u32 {
        let rings = xsk::XskConfig::new(self.interface.index, &self.interface.name, 0);
        self.queues.saturating_mul(rings.fill_ring + rings.tx_ring)
    }

    /// Gives the interface the queues that `set-channels=on` asks for, until the guard is dropped.
    pub(super) fn set_channels(&mut self, config: &NicConfig) -> Result<Option<ChannelsGuard>> {
        let Some(queues) = config.queues.filter(|_| config.set_channels) else {
            return Ok(None);
        };
        let guard = channels::set(self.interface.index, &self.interface.name, queues)?;
        if guard.is_some() {
            info!(nic = config.id, queues, "number of queues set while it is driven");
        }
        self.interface = interface::lookup(&self.interface.name)?;
        interface::check_queues(&self.interface, config.queues)?;
        Ok(guard)
    }
}

/// Looks at all NICs before any is touched.
pub(super) fn check_all(config: &Config) -> Result<Vec<Checked>> {
    let check = |nic| Checked::new(nic, config.allow_default_route_nic);
    config.nics.iter().map(check).collect()
}

/// Bytes that the kernel accounts as locked: frame memory is registered once for each queue.
pub(super) fn locked_bytes(queues: u64, frames: u32) -> u64 {
    queues
        .saturating_mul(u64::from(frames))
        .saturating_mul(CHUNK_SIZE as u64)
}

/// An open NIC. Dropping it closes the sockets, which may take milliseconds: not for a loop.
pub(super) struct Drive {
    pub(super) nic: Arc<Nic>,
    /// Detached, together with its maps, when this is dropped or the process dies.
    pub(super) program: Program,
    pub(super) zero_copy: bool,
    pub(super) multi_buffer: bool,
    /// What its program counts.
    pub(super) expected: Vec<Expected>,
    /// Put back when nothing is received any more, and the channels last of all.
    _offloads: Offloads,
    _channels: Option<ChannelsGuard>,
}

impl Drive {
    /// Opens a NIC. `needs_tags` says that some port has `vlan` or `trunk`.
    pub(super) fn open(
        config: &NicConfig,
        checked: &Checked,
        channels: Option<ChannelsGuard>,
        state: Arc<NicState>,
        needs_tags: bool,
        memory: &Arc<FrameMemory>,
    ) -> Result<Drive> {
        let Checked { interface, queues } = checked;
        let (name, queues) = (&interface.name, *queues);
        // First, so that a foreign program is found before anything else is done.
        let mode = match config.attach {
            AttachMode::Auto => program::AttachMode::Auto,
            AttachMode::Native => program::AttachMode::Native,
            AttachMode::Skb => program::AttachMode::Skb,
        };
        let mut program = Program::attach(interface.index, name, mode)?;
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
            let (rx, tx, info) = xsk::open_queue(&settings, memory, state.index)?;
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
            state,
            mac: interface.mac,
            queues: opened.into(),
            group: Some(NicGroup::new(group)),
            // Generic XDP serves interfaces of every kind, with whatever the host's own stack sends through them.
            partial_checksums: offloads.partial_checksums || program.mode() == program::AttachMode::Skb,
        });
        Ok(Drive {
            nic,
            program,
            zero_copy,
            multi_buffer,
            expected: Vec::new(),
            _offloads: offloads,
            _channels: channels,
        })
    }

    /// Takes frames to this address from now on: the NIC lets them in, and the XDP program gives them to the guests.
    pub(super) fn admit(&mut self, mac: Mac) -> Result<()> {
        if let Some(group) = &self.nic.group {
            group
                .tap
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .admit(mac)?;
        }
        Ok(self.program.allow_mac(mac)?)
    }

    /// Undoes [`Drive::admit`].
    pub(super) fn withdraw(&mut self, mac: Mac) -> Result<()> {
        if let Some(group) = &self.nic.group {
            group
                .tap
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .withdraw(mac)?;
        }
        Ok(self.program.forget_mac(mac)?)
    }

    pub(super) fn attach_word(&self) -> &'static str {
        attach_word(&self.program)
    }
}

fn attach_word(program: &Program) -> &'static str {
    match program.mode() {
        program::AttachMode::Skb => "skb",
        program::AttachMode::Native | program::AttachMode::Auto => "native",
    }
}
