//! The sending half of a socket.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::socket::{Socket, XskInfo};
use super::syscall;
use crate::memory::frames::{ChunkCache, Frame, MAX_SEGMENTS};
use crate::nic::{NicTx, NicTxCounters};

/// Most kicks of one [`NicTx::flush`]: a kernel whose budget cannot be raised sends 32 descriptors a kick.
const MAX_KICKS: u32 = 8;
/// Quiet flushes (the kernel has taken every descriptor) between two kicks for completions that a zero-copy driver still owes.
const REMIND_EVERY: u32 = 64;

/// The sending half of a NIC queue's socket.
pub struct XskTx {
    // Dropped first: a mapped ring keeps the socket alive.
    tx: Producer<libc::xdp_desc>,
    completion: Consumer<u64>,
    in_flight: usize,
    /// Flushes since the last kick at which only completions were missing.
    quiet: u32,
    counters: NicTxCounters,
    info: XskInfo,
    socket: Arc<Socket>,
}

impl XskTx {
    pub(super) fn new(
        tx: Producer<libc::xdp_desc>,
        completion: Consumer<u64>,
        socket: Arc<Socket>,
        info: XskInfo,
    ) -> XskTx {
        XskTx {
            tx,
            completion,
            in_flight: 0,
            quiet: 0,
            counters: NicTxCounters::default(),
            info,
            socket,
        }
    }

    /// What the kernel gave.
    #[must_use]
    pub fn info(&self) -> XskInfo {
        self.info
    }

    fn give(&mut self, frame: Frame) {
        self.counters.frames += 1;
        self.counters.bytes += frame.len() as u64;
        let tx = &mut self.tx;
        let given = self
            .socket
            .memory
            .give_to_nic(self.socket.owner, frame, |addr, len, more| {
                let options = if more { libc::XDP_PKT_CONTD } else { 0 };
                tx.push(libc::xdp_desc { addr, len, options });
            });
        self.in_flight += given as usize;
    }

    /// Whether the kernel has something to do for us and asks to be told. `unconsumed`: descriptors that it has not taken.
    fn wants_kick(&mut self, unconsumed: u32) -> bool {
        if unconsumed > 0 {
            self.quiet = 0;
            return self.tx.needs_wakeup();
        }
        // In copy mode the kernel works on descriptors only while we kick, and completions come by themselves. A zero-copy driver may
        // need a kick to return completions, too, but many leave the flag set all the time: a kick for each flush would be a system
        // call for each turn while anything is on the wire.
        if !self.info.zerocopy || self.in_flight == 0 {
            return false;
        }
        self.quiet += 1;
        if self.quiet < REMIND_EVERY {
            return false;
        }
        self.quiet = 0;
        self.tx.needs_wakeup()
    }
}

impl NicTx for XskTx {
    fn send(&mut self, frames: &mut VecDeque<Frame>) -> usize {
        let mut count = 0;
        while let Some(frame) = frames.pop_front() {
            let segments = u32::try_from(frame.segment_count()).unwrap_or(u32::MAX);
            if segments > 1 && !self.info.multi_buffer {
                self.counters.too_long += 1;
                self.socket.memory.free_to_pool(frame);
            } else if self.tx.free(segments) >= segments {
                self.give(frame);
            } else {
                frames.push_front(frame);
                break;
            }
            count += 1;
        }
        count
    }

    fn flush(&mut self) {
        self.tx.publish();
        let mut left = u32::MAX;
        for _ in 0..MAX_KICKS {
            let unconsumed = self.tx.unconsumed();
            // No progress since the last kick: try again with the next flush.
            if unconsumed == left || !self.wants_kick(unconsumed) {
                return;
            }
            left = unconsumed;
            self.counters.kicks += 1;
            let Err(error) = syscall::kick(self.socket.fd()) else {
                return;
            };
            match error.raw_os_error() {
                // Budget used up, completion ring full, out of send buffer or memory: the descriptors are still there.
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => {}
                // Zero-copy: the driver is at it. Copy: this frame was dropped (and completed), go on with the next.
                Some(libc::EBUSY) if self.info.zerocopy => return,
                Some(libc::EBUSY) => self.counters.kick_errors += 1,
                _ => {
                    self.counters.kick_errors += 1;
                    return;
                }
            }
        }
    }

    fn reap(&mut self, chunks: &mut ChunkCache) -> usize {
        assert!(
            Arc::ptr_eq(chunks.memory(), &self.socket.memory),
            "a cache of another frame memory"
        );
        let mut count = 0;
        while let Some(address) = self.completion.pop() {
            self.socket
                .memory
                .take_completed(self.socket.owner, chunks, address);
            count += 1;
        }
        self.completion.release();
        self.in_flight = self.in_flight.saturating_sub(count);
        count
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn counters(&self) -> NicTxCounters {
        NicTxCounters {
            kernel_invalid: self.socket.statistics().tx_invalid_descs,
            ..self.counters
        }
    }
}

impl AsFd for XskTx {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }
}

// A frame of the most segments must fit the smallest ring.
const _: () = assert!(MAX_SEGMENTS <= 32);
