//! A host NIC as the workers see it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::Shared;
use crate::counters::{NicCounters, PerWorker};
use crate::group::GroupTap;
use crate::memory::frames::{ChunkCache, Frame};
use crate::nic::{NicRx, NicTx};

/// Frames that wait for a TX ring that another worker holds.
const HAND_OFF: usize = 1024;

/// What of a NIC outlives its sockets: its identity and its counters.
#[derive(Debug)]
pub struct NicState {
    /// Position in the daemon's list of NICs.
    pub index: NicIndex,
    /// The stable id.
    pub id: String,
    /// Per-worker counters.
    pub counters: PerWorker<NicCounters>,
    /// Bytes of the largest payload, as it is now.
    pub mtu: AtomicU32,
}

impl NicState {
    /// The longest frame that can leave by it: addresses, type and up to two VLAN tags come before the payload.
    #[must_use]
    pub fn max_frame(&self) -> usize {
        const BEFORE_PAYLOAD: u32 = 14 + 2 * 4;
        self.mtu.load(Ordering::Relaxed).saturating_add(BEFORE_PAYLOAD) as usize
    }
}

/// The sending side of one queue, with room for the burst that is being sent.
pub struct NicSender {
    tx: Box<dyn NicTx>,
    burst: VecDeque<Frame>,
}

impl NicSender {
    fn new(tx: Box<dyn NicTx>) -> NicSender {
        NicSender {
            tx,
            burst: VecDeque::with_capacity(HAND_OFF),
        }
    }

    /// Sends what fits on the ring and frees the rest; returns how many frames that were. `frames` is empty afterwards.
    pub fn send(&mut self, chunks: &mut ChunkCache, frames: &mut Vec<Frame>) -> u64 {
        self.burst.extend(frames.drain(..));
        self.tx.send(&mut self.burst);
        self.tx.flush();
        if !self.burst.is_empty() && self.tx.reap(chunks) > 0 {
            self.tx.send(&mut self.burst);
            self.tx.flush();
        }
        let mut dropped = 0;
        for frame in self.burst.drain(..) {
            chunks.free(frame);
            dropped += 1;
        }
        dropped
    }

    /// Upkeep of a queue that has frames in flight: takes sent chunks back and reminds the kernel of the others.
    /// Returns whether any are still in flight.
    pub fn service(&mut self, chunks: &mut ChunkCache) -> bool {
        if self.tx.in_flight() == 0 {
            return false;
        }
        self.tx.reap(chunks);
        self.tx.flush();
        self.tx.in_flight() > 0
    }

    /// The driver side, for counters.
    #[must_use]
    pub fn tx(&self) -> &dyn NicTx {
        &*self.tx
    }
}

/// One queue of a NIC.
pub struct NicQueue {
    /// Receiving side. Only the worker whose share holds this queue takes it; the lock makes hand-overs between
    /// generations safe.
    pub rx: Mutex<Box<dyn NicRx>>,
    /// Sending side, for any worker.
    pub tx: Shared<NicSender>,
}

impl NicQueue {
    /// Joins the two sides.
    #[must_use]
    pub fn new(rx: Box<dyn NicRx>, tx: Box<dyn NicTx>) -> NicQueue {
        NicQueue {
            rx: Mutex::new(rx),
            tx: Shared::new(NicSender::new(tx), HAND_OFF),
        }
    }
}

/// A NIC with its open queues.
pub struct Nic {
    /// What outlives the sockets.
    pub state: Arc<NicState>,
    /// Its own address.
    pub mac: Mac,
    /// Its queues.
    pub queues: Box<[NicQueue]>,
    /// Copies of frames to groups, which the XDP program leaves to the host; `None` for a NIC whose queues receive these too.
    pub group: Option<Mutex<GroupTap>>,
    /// Senders behind it may leave checksums to a device that is not there (the other end of a veth is on this host): they are
    /// completed here.
    pub partial_checksums: bool,
}

impl Nic {
    /// The queue that `worker` sends by; `None` if there is none. Each worker keeps to one, so a session's frames stay in order
    /// and the lock is seldom contended.
    #[must_use]
    pub fn tx_queue(&self, worker: usize) -> Option<usize> {
        worker.checked_rem(self.queues.len())
    }
}
