//! The vhost-user conversation of a front-end that starts rings and keeps them running.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::SharedMemory;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER.
pub const IN_ORDER: u64 = 1 << 35;
/// VIRTIO_NET_F_MRG_RXBUF.
pub const MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_MQ.
pub const MQ: u64 = 1 << 22;

/// The base of a packed ring that has never run: both wrap counters are 1.
const PACKED_START: u32 = 0x8000_8000;
/// SET_VRING_BASE.
const SET_VRING_BASE: u32 = 10;
/// SEND_RARP.
const SEND_RARP: u32 = 19;
/// The header's flags: version 1, no reply.
const VERSION: u32 = 1;
/// The header's flag that asks whether a request was carried out.
const NEED_REPLY: u32 = 1 << 3;

/// Where a ring is: guest addresses.
#[derive(Debug, Clone, Copy)]
pub struct RingPlace {
    /// Descriptors.
    pub size: u16,
    /// The descriptor table or a packed ring.
    pub descriptors: u64,
    /// The available ring, or the driver's event suppression area.
    pub avail: u64,
    /// The used ring, or the device's event suppression area.
    pub used: u64,
}

/// The eventfds of a ring.
pub struct RingEvents {
    /// Written by the driver.
    pub kick: EventFd,
    /// Written by the device.
    pub call: EventFd,
    /// Written by the device when it finds the ring broken.
    pub error: EventFd,
}

/// A connection to a device; the device stops when this is dropped.
pub struct Link {
    frontend: Frontend,
    /// The same socket, for what `vhost` cannot say.
    stream: UnixStream,
    features: u64,
}

impl Link {
    /// Connects and negotiates. `needed` and those of `liked` that are offered are the features of the device.
    ///
    /// # Errors
    /// The socket's, or what the backend lacks.
    pub fn connect(socket: &Path, pairs: usize, needed: u64, liked: u64) -> Result<Link> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        let queues = u64::try_from(2 * pairs)?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, queues);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let mut needed = needed | VERSION_1 | protocol;
        if pairs > 1 {
            needed |= MQ;
        }
        ensure!(
            offered & needed == needed,
            "the backend offers {offered:#x} and lacks {:#x}",
            needed & !offered
        );
        let offered_protocol = frontend.get_protocol_features()?;
        frontend.set_protocol_features(
            offered_protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK),
        )?;
        ensure!(
            pairs == 1 || frontend.get_queue_num()? >= u64::try_from(pairs)?,
            "the port has fewer than {pairs} queue pairs"
        );
        let features = needed | (offered & liked);
        frontend.set_features(features)?;
        Ok(Link {
            frontend,
            stream,
            features: features & !protocol,
        })
    }

    /// What was negotiated, as the driver sees it.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Makes `memory` the guest's memory.
    ///
    /// # Errors
    /// If the backend refuses it.
    pub fn share(&mut self, memory: &SharedMemory) -> Result<()> {
        self.frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.bytes(),
            userspace_addr: memory.user_address(0)?,
            mmap_offset: 0,
            mmap_handle: memory.raw_fd(),
        }])?;
        Ok(())
    }

    /// Starts a ring that has never run; what it offers must be there already.
    ///
    /// # Errors
    /// If the backend refuses it.
    pub fn start(&mut self, memory: &SharedMemory, index: usize, place: &RingPlace) -> Result<RingEvents> {
        let events = RingEvents {
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            error: EventFd::new(EFD_NONBLOCK)?,
        };
        self.frontend.set_vring_num(index, place.size)?;
        self.set_base(index)?;
        self.frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: place.size,
                queue_size: place.size,
                flags: 0,
                desc_table_addr: memory.user_address(place.descriptors)?,
                used_ring_addr: memory.user_address(place.used)?,
                avail_ring_addr: memory.user_address(place.avail)?,
                log_addr: None,
            },
        )?;
        self.frontend.set_vring_call(index, &events.call)?;
        self.frontend.set_vring_err(index, &events.error)?;
        self.frontend.set_vring_kick(index, &events.kick)?;
        Ok(events)
    }

    /// `vhost` has no room for the upper half of a packed ring's base.
    fn set_base(&mut self, index: usize) -> Result<()> {
        let base = if self.features & RING_PACKED == 0 {
            0
        } else {
            PACKED_START
        };
        let words = [SET_VRING_BASE, VERSION, 8, u32::try_from(index)?, base];
        let message: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        self.stream.write_all(&message).context("sending SET_VRING_BASE")
    }

    /// Asks for the guest with this address to be announced; whether the backend takes the request.
    ///
    /// # Errors
    /// If the backend hangs up, or does not offer it.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<bool> {
        let offered = self.frontend.get_protocol_features()?;
        ensure!(offered.contains(VhostUserProtocolFeatures::RARP), "{offered:?}");
        let [a, b, c, d, e, f] = mac;
        let payload = [[a, b, c, d], [e, f, 0, 0]].map(u32::from_ne_bytes);
        let words = [[SEND_RARP, VERSION | NEED_REPLY, 8].as_slice(), &payload].concat();
        let message: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        self.stream.write_all(&message).context("sending SEND_RARP")?;
        let mut reply = [0; 20];
        self.stream
            .read_exact(&mut reply)
            .context("reading the answer to SEND_RARP")?;
        Ok(reply[12..] == [0; 8])
    }

    /// Enables the rings of `pairs` queue pairs, and returns when the backend has done so.
    ///
    /// # Errors
    /// If the backend refuses.
    pub fn enable(&mut self, pairs: usize) -> Result<()> {
        for index in 0..2 * pairs {
            self.frontend.set_vring_enable(index, true)?;
        }
        // Answered in order: what is sent before a ring is enabled would be dropped.
        self.frontend.get_features()?;
        Ok(())
    }
}
