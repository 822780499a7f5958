//! Frames of the daemon's own, sent by a NIC's socket from a thread that is no worker.

use std::sync::Arc;

use crate::fabric::{Nic, Stock};
use crate::memory::frames::{ChunkCache, Frame, FrameMemory};

/// Sends frames that no guest sent. Takes the queue as a worker does: if one holds it, the frame is left to whoever has it next.
///
/// Probes do not go by [`Nic::hand_over`], for they are to tell of a NIC and not of the workers. How long a worker takes to wake, or to be
/// given a CPU, would count as the link's round trip, up to a loss; a ring without room would too, since it is found by the worker alone; and
/// every probe, a thousand a second while frames move, would wake all workers. The health thread, which runs before ordinary threads if
/// it may, is seldom interrupted while it holds the queue.
pub struct Injector {
    stock: Stock,
    burst: Vec<Frame>,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Injected {
    /// It is on the ring, or left to whoever has the queue next.
    pub sent: bool,
    /// Something is left for a worker to send: wake them.
    pub owing: bool,
}

impl Injector {
    /// With chunks of this memory.
    #[must_use]
    pub fn new(memory: &Arc<FrameMemory>) -> Injector {
        Injector {
            stock: Stock::new(ChunkCache::new(Arc::clone(memory))),
            burst: Vec::with_capacity(1),
        }
    }

    /// Sends a copy of these bytes by the NIC's first queue. May kick; waits for nothing.
    pub fn send(&mut self, nic: &Nic, bytes: &[u8]) -> Injected {
        let Some(queue) = nic.queues.first() else {
            return Injected::default();
        };
        let Some(mut frame) = self.stock.chunks.alloc(bytes.len()) else {
            return Injected::default();
        };
        self.stock.chunks.memory().write(&mut frame, 0, bytes);
        self.burst.push(frame);
        let mut dropped = 0;
        let outcome = queue
            .tx
            .put(&mut self.stock, &mut self.burst, |sender, chunks, frames| {
                dropped += sender.send(chunks, frames);
            });
        Injected {
            // Of several, which one was dropped is not known.
            sent: dropped + outcome.dropped == 0,
            owing: outcome.owing,
        }
    }

    /// Takes back what was sent, if no worker is at it: one that sleeps would not.
    pub fn collect(&mut self, nic: &Nic) {
        if let Some(mut sender) = nic.queues.first().and_then(|queue| queue.tx.try_lock()) {
            sender.reap(&mut self.stock.chunks);
        }
    }
}

#[cfg(test)]
mod tests {
    use vnic_lb::mac::Mac;

    use super::*;
    use crate::fabric::{NicQueue, NicState};
    use crate::nic::memory::pair;

    #[test]
    fn a_frame_leaves_and_its_chunk_comes_back() {
        let memory = FrameMemory::new(64).unwrap();
        let (rx, tx, mut peer) = pair(0, &memory, 4);
        let state = Arc::new(NicState::new(0, "up0".to_owned(), 1, 1500));
        let nic = Nic {
            queues: Box::new([NicQueue::new(Box::new(rx), Box::new(tx))]),
            ..Nic::absent(Arc::clone(&state), Mac::default())
        };
        let mut injector = Injector::new(&memory);
        for round in 0..100u8 {
            let injected = injector.send(&nic, &[round; 60]);
            assert_eq!((injected.sent, injected.owing), (true, false));
            assert_eq!(peer.collect().as_deref(), Some(&[round; 60][..]));
            injector.collect(&nic);
            assert_eq!(nic.queues[0].tx.lock().tx().in_flight(), 0);
        }
        // A full ring is told, and takes no chunk away.
        while injector.send(&nic, &[0; 60]).sent {}
        drop((nic, peer, injector));
        assert_eq!(memory.census().free + memory.census().quarantined, 64);
        // Without sockets nothing is sent.
        let absent = Nic::absent(state, Mac::default());
        assert!(!Injector::new(&memory).send(&absent, &[0; 60]).sent);
    }

    #[test]
    fn a_queue_that_a_worker_holds_gets_the_frame_from_the_hand_off_ring() {
        let memory = FrameMemory::new(64).unwrap();
        let (rx, tx, _peer) = pair(0, &memory, 4);
        let state = Arc::new(NicState::new(0, "up0".to_owned(), 1, 1500));
        let nic = Nic {
            queues: Box::new([NicQueue::new(Box::new(rx), Box::new(tx))]),
            ..Nic::absent(state, Mac::default())
        };
        let held = nic.queues[0].tx.lock();
        let mut injector = Injector::new(&memory);
        let sent = std::thread::scope(|scope| {
            let thread = scope.spawn(|| injector.send(&nic, &[0; 60]));
            thread.join().unwrap()
        });
        assert!(sent.sent && sent.owing && nic.queues[0].tx.has_handed_off());
        drop(held);
    }
}
