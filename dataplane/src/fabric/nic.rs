//! A host NIC as the workers see it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vnic_lb::Millis;
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::Shared;
use crate::counters::{NicCounters, PerWorker};
use crate::group::GroupTap;
use crate::memory::frames::{ChunkCache, Frame};
use crate::nic::{NicRx, NicRxReader, NicTx};

/// Frames that wait for a TX ring that another worker holds.
const HAND_OFF: usize = 1024;

/// Frames that the kernel refused, kept until it is known whether their NIC is lost.
const MAX_REFUSED: usize = 512;

/// How long refused frames are kept: several times what finding out takes.
const VERDICT_MS: Millis = 5;

/// Calls of [`NicSender::service`] between two kicks of a lost NIC, whose kernel side may answer nothing but errors.
const LOST_KICK_EVERY: u32 = 16;

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
    /// The NIC died: whoever looks after its queues sends copies of the frames in flight by other NICs. Set after the NIC was
    /// taken out of the balancer's alive set, and cleared before it goes back there.
    pub lost: AtomicBool,
    /// The kernel has refused frames since somebody last looked at the NIC's link.
    pub suspect: AtomicBool,
}

impl NicState {
    /// A NIC that is not lost.
    #[must_use]
    pub fn new(index: NicIndex, id: String, workers: usize, mtu: u32) -> NicState {
        NicState {
            index,
            id,
            counters: PerWorker::new(workers),
            mtu: AtomicU32::new(mtu),
            lost: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
        }
    }

    /// The longest frame that can leave by it: addresses, type and up to two VLAN tags come before the payload.
    #[must_use]
    pub fn max_frame(&self) -> usize {
        const BEFORE_PAYLOAD: u32 = 14 + 2 * 4;
        self.mtu.load(Ordering::Relaxed).saturating_add(BEFORE_PAYLOAD) as usize
    }
}

/// The sending side of one queue.
pub struct NicSender {
    tx: Box<dyn NicTx>,
    /// Copies of what the kernel refused, until the NIC is known to be lost (they go by another one) or alive (it had no room).
    refused: Vec<Frame>,
    /// When the first of them was refused.
    refused_at: Option<Millis>,
    /// Calls of [`NicSender::service`] since the NIC was last kicked although lost.
    unkicked: u32,
}

/// What looking after a queue found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Serviced {
    /// Refused frames that were given up, since their NIC is alive.
    pub refused: u64,
    /// The kernel has begun to refuse frames: somebody should look at the link now.
    pub suspect: bool,
}

impl NicSender {
    fn new(tx: Box<dyn NicTx>) -> NicSender {
        NicSender {
            tx,
            refused: Vec::with_capacity(MAX_REFUSED),
            refused_at: None,
            unkicked: 0,
        }
    }

    /// Sends what fits on the ring and frees the rest; returns how many frames that were. `frames` is empty afterwards.
    pub fn send(&mut self, chunks: &mut ChunkCache, frames: &mut Vec<Frame>) -> u64 {
        let mut frames = frames.drain(..);
        self.tx.send(&mut frames);
        self.tx.flush();
        // The chunks that come back are those that the next burst is copied into, while they are in the cache.
        if self.reap(chunks) > 0 && frames.len() > 0 {
            self.tx.send(&mut frames);
            self.tx.flush();
        }
        let dropped = frames.len() as u64;
        for frame in &mut frames {
            chunks.free(frame);
        }
        dropped
    }

    /// Upkeep of a queue that has frames in flight: takes sent chunks back and reminds the kernel of the others. Of a NIC that is
    /// lost, appends a copy of every frame that is not known to be sent to `rescued`.
    pub fn service(
        &mut self,
        chunks: &mut ChunkCache,
        now: Millis,
        lost: bool,
        rescued: &mut Vec<Frame>,
    ) -> Serviced {
        if !self.is_pending() {
            return Serviced::default();
        }
        if lost && self.tx.completes_unsent() {
            // Completed since the last look: perhaps sent before the loss, perhaps dropped after it. Twice is better than never.
            self.tx.copy_in_flight(chunks, rescued);
        }
        self.reap(chunks);
        if lost {
            rescued.append(&mut self.refused);
            self.refused_at = None;
            self.tx.copy_in_flight(chunks, rescued);
            self.unkicked += 1;
            if self.unkicked >= LOST_KICK_EVERY {
                // What the kernel drops now need not be sent when the NIC is back.
                self.unkicked = 0;
                self.tx.flush();
            }
            return Serviced::default();
        }
        self.tx.flush();
        self.tx.copy_refused(chunks, &mut self.refused);
        let mut serviced = Serviced::default();
        if self.refused.is_empty() {
            return serviced;
        }
        match self.refused_at {
            None => {
                self.refused_at = Some(now);
                serviced.suspect = true;
            }
            Some(since) if now.wrapping_sub(since) < VERDICT_MS && self.refused.len() <= MAX_REFUSED => {}
            Some(_) => {
                serviced.refused = self.refused.len() as u64;
                self.clear(chunks);
            }
        }
        serviced
    }

    /// Whether frames are in flight, or wait for a verdict.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.tx.in_flight() > 0 || !self.refused.is_empty()
    }

    /// Gives up what waits here, before the queue goes.
    pub fn clear(&mut self, chunks: &mut ChunkCache) {
        self.refused_at = None;
        self.refused.drain(..).for_each(|frame| chunks.free(frame));
    }

    /// Takes sent chunks back; returns how many.
    pub(crate) fn reap(&mut self, chunks: &mut ChunkCache) -> usize {
        self.tx.copy_refused(chunks, &mut self.refused);
        self.tx.reap(chunks)
    }

    /// The driver side, for counters.
    #[must_use]
    pub fn tx(&self) -> &dyn NicTx {
        &*self.tx
    }
}

/// One queue of a NIC.
pub struct NicQueue {
    /// Receiving side. Only the worker whose share holds this queue takes it, and keeps it; the lock makes hand-overs between
    /// generations safe.
    pub rx: Mutex<Box<dyn NicRx>>,
    /// What the receiving side has counted.
    pub rx_reader: Arc<dyn NicRxReader>,
    /// What to wait for; `None` if the receiving side cannot be waited for. Open for as long as this queue lives.
    pub wait_fd: Option<RawFd>,
    /// Sending side, for any worker.
    pub tx: Shared<NicSender>,
}

impl NicQueue {
    /// Joins the two sides.
    #[must_use]
    pub fn new(rx: Box<dyn NicRx>, tx: Box<dyn NicTx>) -> NicQueue {
        NicQueue {
            rx_reader: rx.reader(),
            wait_fd: rx.wait_fd().map(|fd| fd.as_raw_fd()),
            rx: Mutex::new(rx),
            tx: Shared::new(NicSender::new(tx), HAND_OFF),
        }
    }
}

/// What a NIC receives for groups.
pub struct NicGroup {
    /// Taken by the worker whose share it is, and by the control thread to change what the NIC admits, which may take long.
    pub tap: Mutex<GroupTap>,
    /// What to wait for. Open for as long as this lives.
    pub wait_fd: RawFd,
}

impl NicGroup {
    /// With an open tap.
    #[must_use]
    pub fn new(tap: GroupTap) -> NicGroup {
        NicGroup {
            wait_fd: tap.wait_fd().as_raw_fd(),
            tap: Mutex::new(tap),
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
    pub group: Option<NicGroup>,
    /// Senders behind it may leave checksums to a device that is not there (the other end of a veth is on this host): they are
    /// completed here.
    pub partial_checksums: bool,
}

impl Nic {
    /// The NIC while it has no sockets: nothing is received, and what is sent by it is dropped. Keeps the place of the others, whose
    /// positions mean something.
    #[must_use]
    pub fn absent(state: Arc<NicState>, mac: Mac) -> Nic {
        Nic {
            state,
            mac,
            queues: Box::default(),
            group: None,
            partial_checksums: false,
        }
    }

    /// Leaves a frame for the workers to send by the first queue; [`crate::engine::Engine::wake`] has them look. `false`: the NIC has
    /// no sockets, or there is no room.
    ///
    /// For frames that may come a moment later, and many at once, from a thread that is as ordinary as any: it never holds the ring, which
    /// workers would find held for as long as it is kept from running, and one wake-up sends them all, where
    /// [`crate::probe::Injector`] has a system call for each.
    pub fn hand_over(&self, chunks: &mut ChunkCache, bytes: &[u8]) -> bool {
        let Some(queue) = self.queues.first() else {
            return false;
        };
        let Some(mut frame) = chunks.alloc(bytes.len()) else {
            return false;
        };
        chunks.memory().write(&mut frame, 0, bytes);
        match queue.tx.hand_over(frame) {
            Ok(()) => true,
            Err(frame) => {
                chunks.free(frame);
                false
            }
        }
    }

    /// Frees what waits for the queues' rings: for the control thread, once no worker uses the NIC any more. What is on the rings
    /// is quarantined when this is dropped.
    pub fn clear(&self, chunks: &mut ChunkCache) {
        for queue in &self.queues {
            queue.tx.lock().clear(chunks);
            queue.tx.clear(chunks);
        }
    }

    /// The queue that `worker` sends by; `None` if there is none. Each worker keeps to one, so a session's frames stay in order
    /// and the lock is seldom contended.
    #[must_use]
    pub fn tx_queue(&self, worker: usize) -> Option<usize> {
        worker.checked_rem(self.queues.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::frames::FrameMemory;
    use crate::nic::memory::pair;

    #[test]
    fn of_a_lost_nic_all_is_copied_that_is_not_known_to_be_sent() {
        for (completes_unsent, copied) in [(false, vec![2, 3]), (true, vec![1, 2, 3])] {
            let memory = FrameMemory::new(64).expect("memory");
            let mut chunks = ChunkCache::new(Arc::clone(&memory));
            let (_rx, mut tx, mut peer) = pair(0, &memory, 8);
            if completes_unsent {
                tx = tx.completing_unsent();
            }
            let mut sender = NicSender::new(Box::new(tx));
            let frame = |number: u8, chunks: &mut ChunkCache| {
                let mut frame = chunks.alloc(60).expect("a chunk");
                memory.write(&mut frame, 0, &[number; 60]);
                frame
            };
            let mut frames = (0..4).map(|number| frame(number, &mut chunks)).collect();
            assert_eq!(sender.send(&mut chunks, &mut frames), 0);
            let mut rescued = Vec::new();
            assert!(peer.collect().is_some());
            sender.service(&mut chunks, 0, false, &mut rescued);
            assert!(rescued.is_empty());
            // Completed before the loss is known, and not yet taken back.
            assert!(peer.collect().is_some());
            for _ in 0..2 {
                sender.service(&mut chunks, 0, true, &mut rescued);
            }
            let numbers: Vec<u8> = rescued.iter().map(|frame| memory.head(frame)[0]).collect();
            assert_eq!(numbers, copied);
            assert!(!sender.is_pending());
            rescued.drain(..).for_each(|frame| chunks.free(frame));
            assert_eq!(memory.state_errors(), 0);
        }
    }
}
