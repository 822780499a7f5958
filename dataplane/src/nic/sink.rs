//! A NIC queue's sending half that swallows: what is flushed is completed at once. For benches: it does to each chunk what a socket does,
//! and beside that next to nothing.

use std::sync::Arc;
use std::vec::Drain;

use super::{NicTx, NicTxCounters};
use crate::memory::frames::{ChunkCache, Frame, FrameMemory, QueueOwner};

/// The half; its ring holds a number of chunks.
pub struct SinkTx {
    memory: Arc<FrameMemory>,
    owner: QueueOwner,
    /// Addresses that were sent and not reaped, in order.
    ring: Vec<u64>,
    depth: usize,
    counters: NicTxCounters,
}

impl SinkTx {
    /// The sending half of a queue of the NIC with this index, whose ring holds `depth` chunks.
    #[must_use]
    pub fn new(nic: u8, memory: &Arc<FrameMemory>, depth: usize) -> SinkTx {
        SinkTx {
            memory: Arc::clone(memory),
            owner: QueueOwner::new(nic),
            ring: Vec::with_capacity(depth),
            depth,
            counters: NicTxCounters::default(),
        }
    }
}

impl NicTx for SinkTx {
    fn send(&mut self, frames: &mut Drain<'_, Frame>) {
        let waiting = frames.len();
        while let Some(segments) = frames.as_slice().first().map(Frame::segment_count)
            && self.ring.len() + segments <= self.depth
            && let Some(frame) = frames.next()
        {
            self.counters.bytes += frame.len() as u64;
            let ring = &mut self.ring;
            self.memory
                .give_to_nic(self.owner, frame, |address, _, _| ring.push(address));
        }
        self.counters.frames += (waiting - frames.len()) as u64;
    }

    fn flush(&mut self) {}

    fn reap(&mut self, chunks: &mut ChunkCache) -> usize {
        let count = self.ring.len();
        for address in self.ring.drain(..) {
            self.memory.take_completed(self.owner, chunks, address);
        }
        count
    }

    fn in_flight(&self) -> usize {
        self.ring.len()
    }

    /// There is nothing to copy: what was sent is completed.
    fn copy_in_flight(&mut self, _chunks: &mut ChunkCache, _out: &mut Vec<Frame>) {}

    fn counters(&self) -> NicTxCounters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_sent_comes_back_free() {
        let memory = FrameMemory::new(8).unwrap();
        let mut chunks = ChunkCache::new(Arc::clone(&memory));
        let mut tx = SinkTx::new(0, &memory, 4);
        let mut frames: Vec<_> = (0..3).map(|_| chunks.alloc(60).unwrap()).collect();
        frames.push(chunks.alloc(5000).unwrap());
        let mut frames = frames.drain(..);
        tx.send(&mut frames);
        assert_eq!(frames.len(), 1, "it needs two places and there is one");
        assert_eq!((tx.in_flight(), memory.census().tx), (3, 3));
        assert_eq!(tx.reap(&mut chunks), 3);
        tx.send(&mut frames);
        assert_eq!((frames.len(), tx.reap(&mut chunks)), (0, 2));
        assert_eq!(memory.census().free, 8);
        assert_eq!((tx.counters().frames, tx.counters().bytes), (4, 5180));
        assert_eq!(memory.state_errors(), 0);
    }
}
