//! The sending half of a socket.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::vec::Drain;

use super::ring::{Consumer, Producer};
use super::socket::{Socket, XskInfo};
use super::syscall;
use crate::memory::frames::{CHUNK_SIZE, ChunkCache, Frame, MAX_SEGMENTS};
use crate::nic::{NicTx, NicTxCounters};

/// Most kicks of one [`NicTx::flush`]: a kernel whose budget cannot be raised sends 32 descriptors a kick.
const MAX_KICKS: u32 = 8;
/// Refused frames remembered between two calls of [`NicTx::copy_refused`]; more are lost.
const MAX_REFUSED: usize = 256;
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
    /// Copy mode: index behind the last descriptor that the kernel has looked at. Its own index is shown late after an error.
    looked_at: u32,
    /// Indexes at which frames begin that the kernel dropped.
    refused: Vec<u32>,
    /// Chunks in flight that belong to a frame that was copied: it must not be copied twice. Never more than are on the ring.
    copied: HashSet<u64>,
    /// Index behind the last descriptor that [`NicTx::copy_in_flight`] has dealt with.
    saved: u32,
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
            looked_at: tx.published(),
            saved: tx.published(),
            refused: Vec::with_capacity(MAX_REFUSED),
            copied: HashSet::with_capacity(tx.size() as usize),
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

    /// Copy mode: the kernel has looked at everything before its index.
    fn note_progress(&mut self) {
        let consumed = self.tx.consumed();
        if is_after(consumed, self.looked_at) {
            self.looked_at = consumed;
        }
    }

    /// Copy mode: a kick ended with EBUSY, which means that the last frame that the kernel looked at was dropped (__xsk_generic_xmit in
    /// net/xdp/xsk.c: NET_XMIT_DROP; its descriptors are completed).
    fn note_refused(&mut self) {
        let _ = self.tx.unconsumed();
        let consumed = self.tx.consumed();
        // If it sent others before, it shows its index behind the dropped one; else it shows it later.
        let mut start = self.looked_at;
        let mut end = self.end_of_frame(start);
        while is_after(consumed, end) {
            start = end;
            end = self.end_of_frame(start);
        }
        self.looked_at = end;
        if self.refused.len() < MAX_REFUSED && is_after(self.tx.published(), start) {
            self.refused.push(start);
        }
    }

    /// Index behind the frame that begins at `start`.
    fn end_of_frame(&self, start: u32) -> u32 {
        let mut at = start;
        for _ in 0..MAX_SEGMENTS {
            if at == self.tx.published() {
                break;
            }
            let more = self.tx.written(at).options & libc::XDP_PKT_CONTD != 0;
            at = at.wrapping_add(1);
            if !more {
                break;
            }
        }
        // Never in place, so that a walk ends.
        if at == start { start.wrapping_add(1) } else { at }
    }

    fn copy(&mut self, chunks: &mut ChunkCache, address: u64, out: &mut Vec<Frame>) {
        if self.copied.contains(&chunk_of(address)) {
            return;
        }
        let socket = &self.socket;
        if let Some(copy) = socket.memory.copy_in_flight(socket.owner, chunks, address) {
            out.push(copy);
            self.copied.insert(chunk_of(address));
        }
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
    fn send(&mut self, frames: &mut Drain<'_, Frame>) {
        while let Some(segments) = frames.as_slice().first().map(Frame::segment_count) {
            let segments = u32::try_from(segments).unwrap_or(u32::MAX);
            let is_too_long = segments > 1 && !self.info.multi_buffer;
            if !is_too_long && self.tx.free(segments) < segments {
                return;
            }
            match frames.next() {
                Some(frame) if is_too_long => {
                    self.counters.too_long += 1;
                    self.socket.memory.free_to_pool(frame);
                }
                Some(frame) => self.give(frame),
                None => return,
            }
        }
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
            self.note_progress();
            let Err(error) = syscall::kick(self.socket.fd()) else {
                return;
            };
            match error.raw_os_error() {
                // Budget used up, completion ring full, out of send buffer or memory: the descriptors are still there.
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => {}
                // Zero-copy: the driver is at it. Copy: this frame was dropped (and completed), go on with the next.
                Some(libc::EBUSY) if self.info.zerocopy => return,
                Some(libc::EBUSY) => {
                    self.counters.kick_errors += 1;
                    self.note_refused();
                }
                errno => {
                    self.counters.kick_errors += 1;
                    self.counters.hard_errors += 1;
                    self.counters.hard_errno = errno.unwrap_or(0);
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
            if !self.copied.is_empty() {
                self.copied.remove(&chunk_of(address));
            }
            count += 1;
        }
        self.completion.release();
        self.in_flight = self.in_flight.saturating_sub(count);
        self.counters.completed += count as u64;
        count
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// In copy mode EBUSY tells what was dropped.
    fn completes_unsent(&self) -> bool {
        self.info.zerocopy
    }

    fn copy_refused(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>) {
        for at in 0..self.refused.len() {
            let address = self.tx.written(self.refused[at]).addr;
            self.copy(chunks, address, out);
        }
        self.refused.clear();
    }

    fn copy_in_flight(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>) {
        let published = self.tx.published();
        let cut = published.wrapping_sub(self.saved) > self.tx.size();
        let first = if cut {
            published.wrapping_sub(self.tx.size())
        } else {
            self.saved
        };
        let began = out.len();
        // From the newest to the oldest: a chunk that was sent, completed and sent again is on the ring twice, and what it holds is
        // the newer frame.
        let mut at = published;
        while self.in_flight > 0 && at != first {
            at = at.wrapping_sub(1);
            let begins_frame = if at == first {
                // Of what the ring no longer holds, the rest of a frame may be left.
                !cut
            } else {
                self.tx.written(at.wrapping_sub(1)).options & libc::XDP_PKT_CONTD == 0
            };
            let address = self.tx.written(at).addr;
            if begins_frame {
                self.copy(chunks, address, out);
            } else if self.socket.memory.is_sending(self.socket.owner, address) {
                self.copied.insert(chunk_of(address));
            }
        }
        out[began..].reverse();
        self.saved = published;
    }

    fn counters(&self) -> NicTxCounters {
        NicTxCounters {
            kernel_invalid: self.socket.statistics().tx_invalid_descs,
            ..self.counters
        }
    }
}

/// The chunk that an address lies in.
fn chunk_of(address: u64) -> u64 {
    address / CHUNK_SIZE as u64
}

/// Whether the index `a` comes after `b`.
fn is_after(a: u32, b: u32) -> bool {
    (1..=u32::MAX / 2).contains(&a.wrapping_sub(b))
}

impl AsFd for XskTx {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }
}

// A frame of the most segments must fit the smallest ring.
const _: () = assert!(MAX_SEGMENTS <= 32);
