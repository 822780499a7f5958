//! One virtio-net device of vnicd, driven from this process.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{BUFFER, FOOTPRINT, Ring, SIZE};

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_NET_F_MQ.
const MQ: u64 = 1 << 22;

struct Queue {
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    /// Written by the device when it finds the ring broken.
    error: EventFd,
    /// Buffers that the device does not have.
    free: Vec<u16>,
}

/// A device whose rings run.
pub struct Device {
    memory: GuestMemoryMmap,
    /// Receiving and sending queues in turn.
    queues: Vec<Queue>,
    /// Waits for the calls of the receiving queues.
    calls: Epoll,
    /// Ends the connection when dropped.
    _frontend: Frontend,
}

impl Device {
    /// Connects, shares memory, and starts `pairs` queue pairs.
    ///
    /// # Errors
    /// The socket's, or the request that the backend refused.
    pub fn connect(socket: &Path, pairs: usize) -> Result<Device> {
        let queue_count = u64::try_from(2 * pairs)?;
        let mut frontend = Frontend::connect(socket, queue_count)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let mut wanted = VERSION_1 | protocol;
        if pairs > 1 {
            wanted |= MQ;
        }
        ensure!(
            offered & wanted == wanted,
            "the backend offers {offered:#x} and lacks {:#x}",
            wanted & !offered
        );
        let offered = frontend.get_protocol_features()?;
        frontend.set_protocol_features(
            offered & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK),
        )?;
        ensure!(
            frontend.get_queue_num()? >= u64::try_from(pairs)?,
            "the port has fewer than {pairs} queue pairs"
        );
        frontend.set_features(wanted)?;

        let bytes = FOOTPRINT * queue_count;
        let memory = shared_memory(bytes)?;
        let region = memory.iter().next().context("no memory")?;
        let file = region.file_offset().context("no memfd")?;
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: bytes,
            userspace_addr: userspace(&memory, GuestAddress(0))?,
            mmap_offset: 0,
            mmap_handle: file.file().as_raw_fd(),
        }])?;
        let mut queues = Vec::new();
        for index in 0..2 * pairs {
            queues.push(start(&mut frontend, &memory, index)?);
        }
        for index in 0..2 * pairs {
            frontend.set_vring_enable(index, true)?;
        }
        // Answered in order: what is sent before a ring is enabled would be dropped.
        frontend.get_features()?;
        let calls = Epoll::new()?;
        for queue in queues.iter().step_by(2) {
            let fd = queue.call.as_raw_fd();
            calls.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Device {
            memory,
            queues,
            calls,
            _frontend: frontend,
        })
    }

    /// Sends a frame, or returns false when the ring is full.
    ///
    /// # Errors
    /// If the device returned nonsense.
    pub fn send(&mut self, pair: usize, frame: &[u8]) -> Result<bool> {
        let queue = &mut self.queues[2 * pair + 1];
        while let Some((id, _)) = queue.ring.take(&self.memory)? {
            queue.free.push(id);
        }
        let Some(id) = queue.free.pop() else {
            return Ok(false);
        };
        let mut bytes = vec![0; HEADER];
        bytes.extend(frame);
        self.memory.write_slice(&bytes, queue.ring.buffer(id))?;
        queue.ring.offer(&self.memory, id, u32::try_from(bytes.len())?)?;
        queue.kick.write(1)?;
        Ok(true)
    }

    /// The next frame of a queue pair, if one is there.
    ///
    /// # Errors
    /// If the device returned nonsense.
    pub fn receive(&mut self, pair: usize) -> Result<Option<Vec<u8>>> {
        let queue = &mut self.queues[2 * pair];
        let Some((id, length)) = queue.ring.take(&self.memory)? else {
            return Ok(None);
        };
        let mut bytes = vec![0; usize::try_from(length)?];
        self.memory.read_slice(&mut bytes, queue.ring.buffer(id))?;
        ensure!(
            bytes.len() >= HEADER,
            "a received buffer of {length} bytes has no header"
        );
        queue.ring.offer(&self.memory, id, u32::try_from(BUFFER)?)?;
        queue.kick.write(1)?;
        Ok(Some(bytes.split_off(HEADER)))
    }

    /// Claims to have made more buffers available than the sending ring of a queue pair has.
    ///
    /// # Errors
    /// Those of eventfds.
    pub fn break_sending_ring(&mut self, pair: usize) -> Result<()> {
        let queue = &mut self.queues[2 * pair + 1];
        queue.ring.claim_too_many(&self.memory)?;
        Ok(queue.kick.write(1)?)
    }

    /// Whether the device has said that the sending ring of a queue pair is broken.
    #[must_use]
    pub fn was_told_of_broken_ring(&self, pair: usize) -> bool {
        self.queues[2 * pair + 1].error.read().is_ok()
    }

    /// Sleeps until a receiving ring may have frames, or the time is over.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn wait(&self, limit_ms: i32) -> Result<()> {
        let mut events = [EpollEvent::default(); 1];
        self.calls.wait(limit_ms, &mut events)?;
        for queue in &self.queues {
            // Fails when there was none.
            let _ = queue.call.read();
        }
        Ok(())
    }
}

fn shared_memory(bytes: u64) -> Result<GuestMemoryMmap> {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).context("memfd_create")?);
    file.set_len(bytes)?;
    let range = (
        GuestAddress(0),
        usize::try_from(bytes)?,
        Some(FileOffset::from_arc(Arc::new(file), 0)),
    );
    GuestMemoryMmap::from_ranges_with_files([range]).context("mapping guest memory")
}

/// Ring addresses in vhost-user are the front-end's own.
fn userspace(memory: &GuestMemoryMmap, address: GuestAddress) -> Result<u64> {
    let pointer = memory
        .get_host_address(address)
        .context("an address outside guest memory")?;
    Ok(u64::try_from(pointer as usize)?)
}

fn start(frontend: &mut Frontend, memory: &GuestMemoryMmap, index: usize) -> Result<Queue> {
    let receives = index.is_multiple_of(2);
    let mut queue = Queue {
        ring: Ring::new(GuestAddress(FOOTPRINT * u64::try_from(index)?), receives),
        kick: EventFd::new(EFD_NONBLOCK)?,
        call: EventFd::new(EFD_NONBLOCK)?,
        error: EventFd::new(EFD_NONBLOCK)?,
        free: Vec::new(),
    };
    for id in 0..SIZE {
        if receives {
            queue.ring.offer(memory, id, u32::try_from(BUFFER)?)?;
        } else {
            queue.free.push(id);
        }
    }
    frontend.set_vring_num(index, SIZE)?;
    frontend.set_vring_base(index, 0)?;
    frontend.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: userspace(memory, queue.ring.descriptors())?,
            used_ring_addr: userspace(memory, queue.ring.used())?,
            avail_ring_addr: userspace(memory, queue.ring.avail())?,
            log_addr: None,
        },
    )?;
    frontend.set_vring_call(index, &queue.call)?;
    frontend.set_vring_err(index, &queue.error)?;
    frontend.set_vring_kick(index, &queue.kick)?;
    Ok(queue)
}
