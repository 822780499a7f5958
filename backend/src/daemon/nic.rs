//! One host NIC at run time: its sockets, its XDP program, and whether it can carry frames.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tracing::{info, warn};
use vnic_dataplane::counters::PerWorker;
use vnic_dataplane::fabric::{Nic, NicQueue, NicState, VlanMode};
use vnic_dataplane::group::GroupTap;
use vnic_dataplane::memory::frames::{CHUNK_SIZE, FrameMemory};
use vnic_dataplane::program::{self, Program};
use vnic_dataplane::xsk;
use vnic_lb::mac::Mac;
use vnic_lb::nics::{AliveSet, NicIndex};

use crate::config::{AttachMode, Config, NicConfig, ZeroCopy};
use crate::host::carrier::{CarrierWatch, Cause};
use crate::host::interface::{Interface, check_nic};
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
    /// Put back last of all, when nothing is received any more.
    _offloads: Offloads,
}

/// The last time that a NIC died or came back.
pub(super) struct LastChange {
    pub(super) at: Instant,
    pub(super) alive: bool,
    pub(super) cause: Cause,
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
            state: Arc::new(NicState {
                index,
                id: config.id.clone(),
                counters: PerWorker::new(daemon.workers),
            }),
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
            _offloads: offloads,
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.config.id
    }

    pub(super) fn mac(&self) -> Mac {
        self.interface.mac
    }

    pub(super) fn weight(&self) -> u32 {
        self.config.weight
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
        let Some(change) = self.carrier.poll() else { return };
        if alive.set(self.nic.state.index, change.up) {
            self.last_change = Some(LastChange {
                at: Instant::now(),
                alive: change.up,
                cause: change.cause,
            });
        }
        let (nic, cause) = (&self.config.id, change.cause.as_str());
        if change.up {
            info!(nic, cause, "NIC alive: it takes new sessions");
        } else {
            warn!(nic, cause, "NIC lost: its sessions go on by the others");
        }
    }
}

fn attach_word(program: &Program) -> &'static str {
    match program.mode() {
        program::AttachMode::Skb => "skb",
        program::AttachMode::Native | program::AttachMode::Auto => "native",
    }
}
