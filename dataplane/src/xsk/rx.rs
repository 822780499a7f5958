//! The receiving half of a socket.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::socket::Socket;
use super::syscall;
use crate::memory::frames::{ChunkCache, Frame, MAX_SEGMENTS};
use crate::nic::{NicRx, NicRxCounters};

/// The receiving half of a NIC queue's socket.
pub struct XskRx {
    // Dropped first: a mapped ring keeps the socket alive.
    fill: Producer<u64>,
    rx: Consumer<libc::xdp_desc>,
    /// Segments of a frame whose rest has not arrived.
    partial: Option<Frame>,
    /// The rest of the frame on the ring is thrown away.
    skipping: bool,
    counters: NicRxCounters,
    socket: Arc<Socket>,
}

impl XskRx {
    pub(super) fn new(fill: Producer<u64>, rx: Consumer<libc::xdp_desc>, socket: Arc<Socket>) -> XskRx {
        XskRx {
            fill,
            rx,
            partial: None,
            skipping: false,
            counters: NicRxCounters::default(),
            socket,
        }
    }

    /// One descriptor: a frame if it ends one.
    fn take(&mut self, chunks: &mut ChunkCache, descriptor: libc::xdp_desc) -> Option<Frame> {
        let ends = descriptor.options & libc::XDP_PKT_CONTD == 0;
        let (memory, owner) = (&self.socket.memory, self.socket.owner);
        if self
            .partial
            .as_ref()
            .is_some_and(|frame| frame.segment_count() == MAX_SEGMENTS)
        {
            self.counters.too_long += 1;
            self.skipping = true;
        }
        if self.skipping {
            memory.skip_received(owner, chunks, descriptor.addr);
        } else {
            match memory.take_received(owner, self.partial.take(), descriptor.addr, descriptor.len) {
                Ok(frame) if ends => return Some(frame),
                Ok(frame) => self.partial = Some(frame),
                // A hole in the middle: counted as a state error, the rest of the frame is of no use.
                Err(partial) => {
                    self.partial = partial;
                    self.skipping = true;
                }
            }
        }
        if self.skipping {
            if let Some(frame) = self.partial.take() {
                chunks.free(frame);
            }
            self.skipping = !ends;
        }
        None
    }
}

impl NicRx for XskRx {
    fn receive(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>, max: usize) -> usize {
        assert!(
            Arc::ptr_eq(chunks.memory(), &self.socket.memory),
            "a cache of another frame memory"
        );
        let mut count = 0;
        while count < max {
            let Some(descriptor) = self.rx.pop() else { break };
            if let Some(frame) = self.take(chunks, descriptor) {
                self.counters.bytes += frame.len() as u64;
                out.push(frame);
                count += 1;
            }
        }
        self.rx.release();
        self.counters.frames += count as u64;
        count
    }

    fn refill(&mut self, chunks: &mut ChunkCache) {
        assert!(
            Arc::ptr_eq(chunks.memory(), &self.socket.memory),
            "a cache of another frame memory"
        );
        for _ in 0..self.fill.free(u32::MAX) {
            let Some(address) = chunks.take_for_fill(self.socket.owner) else {
                break;
            };
            self.fill.push(address);
        }
        if self.fill.publish() && self.fill.needs_wakeup() {
            syscall::wake_receiver(self.socket.fd());
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.fd())
    }

    fn counters(&self) -> NicRxCounters {
        let kernel = self.socket.statistics();
        NicRxCounters {
            kernel_dropped: kernel.rx_dropped + kernel.rx_ring_full,
            ..self.counters
        }
    }
}

impl AsFd for XskRx {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }
}

impl Drop for XskRx {
    fn drop(&mut self) {
        if let Some(frame) = self.partial.take() {
            self.socket.memory.free_to_pool(frame);
        }
    }
}
