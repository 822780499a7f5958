//! The in-memory twin of a NIC queue: bounded rings, the same chunk states, and a [`MemoryPeer`] in the place of the kernel and
//! the wire.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::vec::Drain;

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{NicRx, NicRxCounters, NicRxReader, NicTx, NicTxCounters};
use crate::counters::Counter;
use crate::memory::frames::{
    ChunkCache, Frame, FrameMemory, HEADROOM, MAX_SEGMENTS, QueueOwner, SEGMENT_SIZE,
};

/// What the two halves and the peer share.
struct Wire {
    memory: Arc<FrameMemory>,
    owner: QueueOwner,
    /// Addresses of chunks to receive into.
    fill: ArrayQueue<u64>,
    arrived: ArrayQueue<Frame>,
    /// Flushed and not yet collected; the chunks are in state Tx.
    sending: ArrayQueue<Frame>,
    completed: ArrayQueue<Frame>,
    /// Readable when frames have arrived, if somebody wants to wait.
    announced: Option<EventFd>,
    /// Frames and bytes that the receiving half has taken.
    received: [Counter; 2],
}

impl Wire {
    fn new(nic: u8, memory: &Arc<FrameMemory>, depth: usize) -> Wire {
        let depth = depth.max(1);
        Wire {
            memory: memory.clone(),
            owner: QueueOwner::new(nic),
            fill: ArrayQueue::new(depth),
            arrived: ArrayQueue::new(depth),
            sending: ArrayQueue::new(depth),
            completed: ArrayQueue::new(depth),
            announced: None,
            received: [Counter::default(), Counter::default()],
        }
    }
}

impl NicRxReader for Wire {
    fn counters(&self) -> NicRxCounters {
        let [frames, bytes] = self.received.each_ref().map(Counter::get);
        NicRxCounters {
            frames,
            bytes,
            ..NicRxCounters::default()
        }
    }
}

impl Wire {
    fn next_arrived(&self) -> Option<Frame> {
        // Taking from an empty ring has a fence; who waits for nothing need not be exact.
        if self.announced.is_none() && self.arrived.is_empty() {
            return None;
        }
        self.arrived.pop().or_else(|| {
            // Empty: what was announced has been taken. Another look, for a frame that came in between.
            self.announced.as_ref()?.read().ok()?;
            self.arrived.pop()
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        while let Some(frame) = self.arrived.pop() {
            self.memory.free_to_pool(frame);
        }
        // No kernel is behind these: what was on its rings is free at once.
        self.memory.quarantine(self.owner);
        self.memory.release(self.owner);
    }
}

/// Receiving half of the twin.
pub struct MemoryRx {
    wire: Arc<Wire>,
}

/// Sending half of the twin.
pub struct MemoryTx {
    wire: Arc<Wire>,
    /// Sent and not flushed.
    queued: VecDeque<Frame>,
    depth: usize,
    frames_in_flight: usize,
    chunks_in_flight: usize,
    completes_unsent: bool,
    counters: NicTxCounters,
}

/// The wire's other end: gives frames to the twin, and takes those that it sends.
pub struct MemoryPeer {
    wire: Arc<Wire>,
}

/// A NIC queue whose rings hold `depth` frames (at least 1) each way.
#[must_use]
pub fn pair(nic: u8, memory: &Arc<FrameMemory>, depth: usize) -> (MemoryRx, MemoryTx, MemoryPeer) {
    ends(Wire::new(nic, memory, depth))
}

/// Like [`pair`], with a receiving half that can be waited for, at the price of a system call for each frame.
pub fn waitable_pair(
    nic: u8,
    memory: &Arc<FrameMemory>,
    depth: usize,
) -> io::Result<(MemoryRx, MemoryTx, MemoryPeer)> {
    let mut wire = Wire::new(nic, memory, depth);
    wire.announced = Some(EventFd::from_flags(
        EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )?);
    Ok(ends(wire))
}

fn ends(wire: Wire) -> (MemoryRx, MemoryTx, MemoryPeer) {
    let wire = Arc::new(wire);
    let rx = MemoryRx { wire: wire.clone() };
    (rx, MemoryTx::new(wire.clone()), MemoryPeer { wire })
}

impl NicRx for MemoryRx {
    fn receive(&mut self, _chunks: &mut ChunkCache, out: &mut Vec<Frame>, max: usize) -> usize {
        let mut count = 0;
        while count < max {
            let Some(frame) = self.wire.next_arrived() else {
                break;
            };
            self.wire.received[1].add(frame.len() as u64);
            out.push(frame);
            count += 1;
        }
        if count > 0 {
            self.wire.received[0].add(count as u64);
        }
        count
    }

    fn refill(&mut self, chunks: &mut ChunkCache) {
        let wire = &self.wire;
        for _ in wire.fill.len()..wire.fill.capacity() {
            let Some(address) = chunks.take_for_fill(wire.owner) else {
                return;
            };
            if wire.fill.push(address).is_err() {
                wire.memory.skip_received(wire.owner, chunks, address);
            }
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wire.announced.as_ref().map(AsFd::as_fd)
    }

    fn reader(&self) -> Arc<dyn NicRxReader> {
        Arc::clone(&self.wire) as _
    }
}

impl MemoryTx {
    fn new(wire: Arc<Wire>) -> MemoryTx {
        let depth = wire.sending.capacity();
        MemoryTx {
            wire,
            queued: VecDeque::with_capacity(depth),
            depth,
            frames_in_flight: 0,
            chunks_in_flight: 0,
            completes_unsent: false,
            counters: NicTxCounters::default(),
        }
    }

    /// As a zero-copy driver, whose completions say nothing of a frame's fate.
    #[must_use]
    pub fn completing_unsent(mut self) -> MemoryTx {
        self.completes_unsent = true;
        self
    }

    fn complete(&mut self, chunks: &mut ChunkCache, frame: Frame) -> usize {
        let count = frame.segment_count();
        self.frames_in_flight -= 1;
        self.chunks_in_flight -= count;
        self.counters.completed += count as u64;
        self.wire.memory.mark_sent(self.wire.owner, &frame);
        chunks.free(frame);
        count
    }
}

impl NicTx for MemoryTx {
    fn send(&mut self, frames: &mut Drain<'_, Frame>) {
        while self.frames_in_flight < self.depth
            && let Some(frame) = frames.next()
        {
            self.wire.memory.mark_sending(self.wire.owner, &frame);
            self.frames_in_flight += 1;
            self.chunks_in_flight += frame.segment_count();
            self.counters.frames += 1;
            self.counters.bytes += frame.len() as u64;
            self.queued.push_back(frame);
        }
    }

    /// As a kernel that asks to be kicked each time.
    fn flush(&mut self) {
        self.counters.kicks += u64::from(!self.queued.is_empty());
        while let Some(frame) = self.queued.pop_front() {
            if let Err(frame) = self.wire.sending.push(frame) {
                self.queued.push_front(frame);
                return;
            }
        }
    }

    fn reap(&mut self, chunks: &mut ChunkCache) -> usize {
        let mut count = 0;
        while let Some(frame) = self.wire.completed.pop() {
            count += self.complete(chunks, frame);
        }
        count
    }

    fn in_flight(&self) -> usize {
        self.chunks_in_flight
    }

    fn completes_unsent(&self) -> bool {
        self.completes_unsent
    }

    /// The lost NIC of the twin sends nothing more: what may not have been sent is taken back now.
    fn copy_in_flight(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>) {
        loop {
            let wire = &self.wire;
            let completed = self.completes_unsent.then(|| wire.completed.pop()).flatten();
            let oldest = completed.or_else(|| wire.sending.pop());
            let Some(frame) = oldest.or_else(|| self.queued.pop_front()) else {
                return;
            };
            self.frames_in_flight -= 1;
            self.chunks_in_flight -= frame.segment_count();
            self.wire.memory.mark_sent(self.wire.owner, &frame);
            if let Some(copy) = self.wire.memory.copy_of(chunks, &frame) {
                out.push(copy);
            }
            chunks.free(frame);
        }
    }

    fn counters(&self) -> NicTxCounters {
        self.counters
    }
}

impl MemoryPeer {
    /// Sends a frame to the twin; `false` when it offers too few chunks, its ring is full, or the frame needs more than
    /// [`MAX_SEGMENTS`].
    pub fn inject(&mut self, bytes: &[u8]) -> bool {
        let wire = &self.wire;
        let count = bytes.len().div_ceil(SEGMENT_SIZE).max(1);
        if count > MAX_SEGMENTS || wire.arrived.is_full() || wire.fill.len() < count {
            return false;
        }
        let mut frame = None;
        for segment in 0..count {
            let len = (bytes.len() - segment * SEGMENT_SIZE).min(SEGMENT_SIZE);
            let Some(address) = wire.fill.pop() else { break };
            let len = u32::try_from(len).unwrap_or(0);
            frame = wire
                .memory
                .take_received(wire.owner, frame, address + HEADROOM as u64, len)
                .ok();
        }
        let Some(mut frame) = frame else { return false };
        wire.memory.write(&mut frame, 0, bytes);
        if let Err(frame) = wire.arrived.push(frame) {
            wire.memory.free_to_pool(frame);
            return false;
        }
        if let Some(announced) = &wire.announced {
            let _ = announced.write(1);
        }
        true
    }

    /// Takes the next frame that the twin has sent and flushed, and completes it.
    pub fn collect(&mut self) -> Option<Vec<u8>> {
        let frame = self.wire.sending.pop()?;
        let bytes = self.wire.memory.segments(&frame).flatten().copied().collect();
        if let Err(frame) = self.wire.completed.push(frame) {
            // Cannot be: no more are in flight than the ring holds.
            self.wire.memory.mark_sent(self.wire.owner, &frame);
            self.wire.memory.free_to_pool(frame);
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::frames::Census;

    fn pattern(len: usize) -> Vec<u8> {
        (0..253).cycle().take(len).collect()
    }

    #[test]
    fn frames_pass_both_ways_and_chunks_return() {
        let memory = FrameMemory::new(64).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        let (mut rx, mut tx, mut peer) = pair(2, &memory, 8);
        assert!(!peer.inject(&pattern(60)), "nothing was offered");
        rx.refill(&mut chunks);
        assert_eq!(memory.census().fill, 8);
        let mut out = Vec::new();
        for len in [60, 1514, 9014] {
            assert!(peer.inject(&pattern(len)));
        }
        assert!(!peer.inject(&pattern(16_000)));
        assert_eq!(rx.receive(&mut chunks, &mut out, 2), 2);
        assert_eq!(rx.receive(&mut chunks, &mut out, 2), 1);
        tx.send(&mut out.drain(..));
        assert!(peer.collect().is_none(), "not flushed yet");
        tx.flush();
        assert_eq!((tx.in_flight(), tx.reap(&mut chunks)), (5, 0));
        for len in [60, 1514, 9014] {
            assert_eq!(peer.collect().unwrap(), pattern(len));
        }
        assert_eq!(tx.reap(&mut chunks), 5);
        assert_eq!(tx.in_flight(), 0);
        drop((rx, tx, peer));
        assert_eq!(
            memory.census(),
            Census {
                free: 64,
                ..Census::default()
            }
        );
        assert_eq!(memory.state_errors(), 0);
    }

    #[test]
    fn a_full_ring_pushes_back() {
        let memory = FrameMemory::new(64).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        let (_rx, mut tx, mut peer) = pair(0, &memory, 2);
        let mut queue: Vec<_> = (0..5).filter_map(|_| chunks.alloc(60)).collect();
        let mut queue = queue.drain(..);
        tx.send(&mut queue);
        assert_eq!(queue.len(), 3);
        tx.flush();
        tx.send(&mut queue);
        assert_eq!(queue.len(), 3);
        assert!(peer.collect().is_some());
        tx.send(&mut queue);
        assert_eq!(queue.len(), 3, "collected, not reaped");
        tx.reap(&mut chunks);
        tx.send(&mut queue);
        assert_eq!(queue.len(), 2);
        queue.for_each(|frame| chunks.free(frame));
    }

    #[test]
    fn dropping_everything_frees_what_was_under_way() {
        let memory = FrameMemory::new(64).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        let (mut rx, mut tx, mut peer) = pair(0, &memory, 4);
        rx.refill(&mut chunks);
        assert!(peer.inject(&pattern(100)));
        let mut queue: Vec<_> = (0..4).filter_map(|_| chunks.alloc(60)).collect();
        tx.send(&mut queue.drain(..));
        tx.flush();
        assert!(peer.collect().is_some());
        drop((rx, tx, peer));
        assert_eq!(
            memory.census(),
            Census {
                free: 64,
                ..Census::default()
            }
        );
    }
}
