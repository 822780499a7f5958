//! The receiving half of a socket.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::socket::Socket;
use super::syscall;
use crate::counters::Counter;
use crate::memory::frames::{ChunkCache, Frame, MAX_SEGMENTS};
use crate::nic::{NicRx, NicRxCounters, NicRxReader};

/// Most calls of [`NicRx::refill`] between two looks at the fill ring, and at the driver's wish to be woken.
const LOOK_EVERY: u32 = 64;
/// Part of the fill ring that must have come back as received chunks before it is looked at sooner.
const LOOK_SHARE: u32 = 8;

/// When [`NicRx::refill`] looks at the fill ring. A look costs a cache line that the kernel writes; topping up a nearly full ring
/// chunk by chunk would move that line with every turn.
#[derive(Debug)]
struct RefillPace {
    /// Chunks received since the last look; the kernel has taken at least as many from the ring.
    received: u32,
    /// Calls since the last look.
    unseen: u32,
    /// Calls since the driver's wish was last read.
    unasked: u32,
    /// The last look left the ring short of chunks, or there was none: look again at once.
    short: bool,
    /// Received chunks that are worth a look.
    batch: u32,
}

impl RefillPace {
    fn new(ring_size: u32) -> RefillPace {
        RefillPace {
            received: 0,
            unseen: 0,
            unasked: 0,
            short: true,
            batch: (ring_size / LOOK_SHARE).max(1),
        }
    }

    /// Whether this call is to look at the ring.
    fn look(&mut self) -> bool {
        self.unseen += 1;
        self.unasked += 1;
        self.short || self.received >= self.batch || self.unseen >= LOOK_EVERY
    }

    /// A look was taken; `short`: the ring is not full after it.
    fn looked(&mut self, short: bool) {
        (self.received, self.unseen, self.short) = (0, 0, short);
    }

    /// Whether to read the driver's wish to be woken.
    fn ask(&mut self, published: bool) -> bool {
        // A zero-copy driver finds the ring empty and only then sets the flag; chunks published in between are seen by nobody. No
        // frame arrives then, so nothing more is published, and the flag must be read all the same.
        let ask = published || self.unasked >= LOOK_EVERY;
        if ask {
            self.unasked = 0;
        }
        ask
    }
}

/// The receiving half of a NIC queue's socket.
pub struct XskRx {
    // Dropped first: a mapped ring keeps the socket alive.
    fill: Producer<u64>,
    rx: Consumer<libc::xdp_desc>,
    /// Segments of a frame whose rest has not arrived.
    partial: Option<Frame>,
    /// The rest of the frame on the ring is thrown away.
    skipping: bool,
    pace: RefillPace,
    counts: Arc<Counts>,
    socket: Arc<Socket>,
}

/// What the half counts, and where the kernel's own counts are read.
struct Counts {
    frames: Counter,
    bytes: Counter,
    too_long: Counter,
    socket: Arc<Socket>,
}

impl NicRxReader for Counts {
    fn counters(&self) -> NicRxCounters {
        let kernel = self.socket.statistics();
        NicRxCounters {
            frames: self.frames.get(),
            bytes: self.bytes.get(),
            too_long: self.too_long.get(),
            kernel_dropped: kernel.rx_dropped + kernel.rx_ring_full,
        }
    }
}

impl XskRx {
    pub(super) fn new(fill: Producer<u64>, rx: Consumer<libc::xdp_desc>, socket: Arc<Socket>) -> XskRx {
        XskRx {
            pace: RefillPace::new(fill.size()),
            fill,
            rx,
            partial: None,
            skipping: false,
            counts: Arc::new(Counts {
                frames: Counter::default(),
                bytes: Counter::default(),
                too_long: Counter::default(),
                socket: Arc::clone(&socket),
            }),
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
            self.counts.too_long.add(1);
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
        let (mut count, mut bytes) = (0, 0);
        while count < max {
            let Some(descriptor) = self.rx.pop() else { break };
            self.pace.received = self.pace.received.saturating_add(1);
            if let Some(frame) = self.take(chunks, descriptor) {
                bytes += frame.len() as u64;
                out.push(frame);
                count += 1;
            }
        }
        self.rx.release();
        if count > 0 {
            self.counts.frames.add(count as u64);
            self.counts.bytes.add(bytes);
        }
        count
    }

    fn refill(&mut self, chunks: &mut ChunkCache) {
        assert!(
            Arc::ptr_eq(chunks.memory(), &self.socket.memory),
            "a cache of another frame memory"
        );
        if !self.pace.look() {
            return;
        }
        let mut free = self.fill.free(u32::MAX);
        while free > 0
            && let Some(address) = chunks.take_for_fill(self.socket.owner)
        {
            self.fill.push(address);
            free -= 1;
        }
        self.pace.looked(free > 0);
        let published = self.fill.publish();
        if self.pace.ask(published) && self.fill.needs_wakeup() {
            syscall::wake_receiver(self.socket.fd());
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.fd())
    }

    fn reader(&self) -> Arc<dyn NicRxReader> {
        Arc::clone(&self.counts) as _
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks within `calls` calls that receive nothing and find the ring as full as it was.
    fn looks(pace: &mut RefillPace, calls: u32, short: bool) -> u32 {
        (0..calls)
            .map(|_| {
                let look = pace.look();
                if look {
                    pace.looked(short);
                }
                u32::from(look)
            })
            .sum()
    }

    #[test]
    fn the_first_call_and_each_after_a_short_one_look_at_the_ring() {
        let mut pace = RefillPace::new(2048);
        assert_eq!(looks(&mut pace, 5, true), 5);
        assert_eq!(looks(&mut pace, 1, false), 1);
        assert_eq!(looks(&mut pace, 1, false), 0);
    }

    #[test]
    fn a_full_ring_is_looked_at_after_an_eighth_of_it_was_received_or_now_and_then() {
        let mut pace = RefillPace::new(2048);
        pace.looked(false);
        pace.received = 255;
        assert!(!pace.look());
        pace.received = 256;
        assert!(pace.look());
        pace.looked(false);
        assert_eq!(looks(&mut pace, 10 * LOOK_EVERY, false), 10);
    }

    #[test]
    fn the_drivers_wish_is_read_even_if_nothing_is_published() {
        for short in [false, true] {
            let mut pace = RefillPace::new(2048);
            let mut asked = 0;
            for _ in 0..10 * LOOK_EVERY {
                if pace.look() {
                    pace.looked(short);
                    asked += u32::from(pace.ask(false));
                }
            }
            assert!((9..=10).contains(&asked), "short: {short}, asked {asked} times");
        }
        let mut pace = RefillPace::new(2048);
        assert!(pace.look() && pace.ask(true));
    }
}
