//! One virtio-net device of vnicd, driven from this process.

use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Result, ensure};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::link::{Link, RingEvents, RingPlace};
use super::memory::{Pages, SharedMemory};
use super::ring::{BUFFER, FOOTPRINT, Ring, SIZE};

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;

struct Queue {
    ring: Ring,
    events: RingEvents,
    /// Buffers that the device does not have.
    free: Vec<u16>,
}

/// A device whose rings run.
pub struct Device {
    memory: SharedMemory,
    /// Receiving and sending queues in turn.
    queues: Vec<Queue>,
    /// Waits for the calls of the receiving queues.
    calls: Epoll,
    /// Ends the connection when dropped.
    _link: Link,
}

impl Device {
    /// Connects, shares memory, and starts `pairs` queue pairs.
    ///
    /// # Errors
    /// The socket's, or the request that the backend refused.
    pub fn connect(socket: &Path, pairs: usize) -> Result<Device> {
        let mut link = Link::connect(socket, pairs, 0, 0)?;
        let memory = SharedMemory::new(FOOTPRINT * u64::try_from(2 * pairs)?, Pages::Ordinary)?;
        link.share(&memory)?;
        let mut queues = Vec::new();
        for index in 0..2 * pairs {
            queues.push(start(&mut link, &memory, index)?);
        }
        link.enable(pairs)?;
        let calls = Epoll::new()?;
        for queue in queues.iter().step_by(2) {
            let fd = queue.events.call.as_raw_fd();
            calls.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Device {
            memory,
            queues,
            calls,
            _link: link,
        })
    }

    /// Sends a frame, or returns false when the ring is full.
    ///
    /// # Errors
    /// If the device returned nonsense.
    pub fn send(&mut self, pair: usize, frame: &[u8]) -> Result<bool> {
        self.unsent(pair)?;
        let queue = &mut self.queues[2 * pair + 1];
        let Some(id) = queue.free.pop() else {
            return Ok(false);
        };
        let mut bytes = vec![0; HEADER];
        bytes.extend(frame);
        self.memory.guest().write_slice(&bytes, queue.ring.buffer(id))?;
        queue
            .ring
            .offer(self.memory.guest(), id, u32::try_from(bytes.len())?)?;
        queue.events.kick.write(1)?;
        Ok(true)
    }

    /// Frames that the device has not taken from a sending ring.
    ///
    /// # Errors
    /// If the device returned nonsense.
    pub fn unsent(&mut self, pair: usize) -> Result<usize> {
        let queue = &mut self.queues[2 * pair + 1];
        while let Some((id, _)) = queue.ring.take(self.memory.guest())? {
            queue.free.push(id);
        }
        Ok(usize::from(SIZE) - queue.free.len())
    }

    /// The next frame of a queue pair, if one is there.
    ///
    /// # Errors
    /// If the device returned nonsense.
    pub fn receive(&mut self, pair: usize) -> Result<Option<Vec<u8>>> {
        let queue = &mut self.queues[2 * pair];
        let Some((id, length)) = queue.ring.take(self.memory.guest())? else {
            return Ok(None);
        };
        let mut bytes = vec![0; usize::try_from(length)?];
        self.memory
            .guest()
            .read_slice(&mut bytes, queue.ring.buffer(id))?;
        ensure!(
            bytes.len() >= HEADER,
            "a received buffer of {length} bytes has no header"
        );
        queue
            .ring
            .offer(self.memory.guest(), id, u32::try_from(BUFFER)?)?;
        queue.events.kick.write(1)?;
        Ok(Some(bytes.split_off(HEADER)))
    }

    /// Claims to have made more buffers available than the sending ring of a queue pair has.
    ///
    /// # Errors
    /// Those of eventfds.
    pub fn break_sending_ring(&mut self, pair: usize) -> Result<()> {
        let queue = &mut self.queues[2 * pair + 1];
        queue.ring.claim_too_many(self.memory.guest())?;
        Ok(queue.events.kick.write(1)?)
    }

    /// Whether the device has said that the sending ring of a queue pair is broken.
    #[must_use]
    pub fn was_told_of_broken_ring(&self, pair: usize) -> bool {
        self.queues[2 * pair + 1].events.error.read().is_ok()
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
            let _ = queue.events.call.read();
        }
        Ok(())
    }
}

fn start(link: &mut Link, memory: &SharedMemory, index: usize) -> Result<Queue> {
    let receives = index.is_multiple_of(2);
    let mut ring = Ring::new(GuestAddress(FOOTPRINT * u64::try_from(index)?), receives);
    let mut free = Vec::new();
    for id in 0..SIZE {
        if receives {
            ring.offer(memory.guest(), id, u32::try_from(BUFFER)?)?;
        } else {
            free.push(id);
        }
    }
    let place = RingPlace {
        size: SIZE,
        descriptors: ring.descriptors().0,
        avail: ring.avail().0,
        used: ring.used().0,
    };
    let events = link.start(memory, index, &place)?;
    Ok(Queue { ring, events, free })
}
