//! Into guest RX rings: from frame memory, and straight from another guest's buffers.

use super::Context;
use crate::counters::{DropReason, PairCounters, PortCounters};
use crate::fabric::{Port, Ring};
use crate::memory::frames::{ChunkCache, Frame, FrameMemory};
use crate::virtq::{self, RingError};
use crate::vnet::{self, GuestRxBurst, Look};

/// One guest RX ring, and where what becomes of its frames is counted.
struct Receiver<'p, 'm> {
    ring: &'p Ring,
    memory: &'m FrameMemory,
    port: &'p PortCounters,
    pair: &'p PairCounters,
    failure: Option<RingError>,
}

impl<'p, 'm> Receiver<'p, 'm> {
    /// `None`, and `frames` counted as dropped, if the ring does not run.
    fn new(
        worker: usize,
        memory: &'m FrameMemory,
        port: &'p Port,
        pair_at: usize,
        frames: usize,
    ) -> Option<Receiver<'p, 'm>> {
        let counters = port.state.counters.of(worker);
        let Some(ring) = port.pairs.get(pair_at).and_then(|pair| pair.rx.as_ref()) else {
            counters.drops.add(DropReason::PortNotReady, frames as u64);
            return None;
        };
        Some(Receiver {
            ring,
            memory,
            port: counters,
            pair: port.state.pairs[pair_at].of(worker),
            failure: None,
        })
    }

    /// Delivers what can be, and frees all.
    fn fill(&mut self, engine: &mut virtq::Ring, chunks: &mut ChunkCache, frames: &mut Vec<Frame>) {
        let memory = self.memory;
        self.give(engine, frames.len(), |engine| {
            vnet::give_to_guest(engine, memory, frames)
        });
        frames.drain(..).for_each(|frame| chunks.free(frame));
    }

    /// Has `give` deliver `count` frames, and counts what became of them.
    fn give(
        &mut self,
        engine: &mut virtq::Ring,
        count: usize,
        give: impl FnOnce(&mut virtq::Ring) -> Result<GuestRxBurst, RingError>,
    ) {
        let drops = &self.port.drops;
        if self.ring.is_broken() || self.failure.is_some() {
            drops.add(DropReason::RingBroken, count as u64);
            return;
        }
        match give(engine) {
            Ok(given) => {
                self.pair.guest_rx_frames.add(given.delivered as u64);
                self.pair.guest_rx_bytes.add(given.bytes);
                self.pair.notifications.add(u64::from(engine.notify()));
                let left = count - given.delivered - given.too_long as usize;
                if given.too_long > 0 || left > 0 {
                    drops.add(DropReason::TooLong, u64::from(given.too_long));
                    drops.add(DropReason::NoGuestBuffer, left as u64);
                }
            }
            Err(error) => {
                self.failure = Some(error);
                drops.add(DropReason::RingBroken, count as u64);
            }
        }
    }
}

impl Context {
    /// Delivers frames of frame memory.
    pub(super) fn deliver_to_port(&mut self, port: &Port, pair_at: usize, frames: &mut Vec<Frame>) {
        let Some(mut receiver) = Receiver::new(self.index, &self.memory, port, pair_at, frames.len()) else {
            frames.drain(..).for_each(|frame| self.stock.chunks.free(frame));
            return;
        };
        let ring = receiver.ring;
        let outcome = ring
            .engine
            .put(&mut self.stock, frames, |engine, chunks, frames| {
                receiver.fill(engine, chunks, frames)
            });
        let failure = receiver.failure;
        if outcome.is_contended() {
            let drops = &port.state.counters.of(self.index).drops;
            drops.add(DropReason::HandOffFull, outcome.dropped);
            self.count_contention(outcome);
        }
        if outcome.owing {
            self.staged.owe_port(port.state.index, pair_at);
        }
        self.after_delivery(port, pair_at, ring, failure);
    }

    /// Forwards frames that the guest TX ring `from` has gathered. `false`, and nothing done, if another worker holds the receive
    /// ring.
    pub(super) fn forward_to_port<'a>(
        &mut self,
        from: &virtq::Ring,
        picks: impl ExactSizeIterator<Item = (usize, &'a Look)> + Clone,
        port: &Port,
        pair_at: usize,
    ) -> bool {
        let count = picks.len();
        let Some(mut receiver) = Receiver::new(self.index, &self.memory, port, pair_at, count) else {
            return true;
        };
        let ring = receiver.ring;
        let visited = ring.engine.visit(
            &mut self.stock,
            &mut receiver,
            Receiver::fill,
            |receiver, engine| {
                receiver.give(engine, count, |engine| vnet::forward(from, picks, engine));
            },
        );
        let failure = receiver.failure;
        if visited {
            self.after_delivery(port, pair_at, ring, failure);
        }
        visited
    }

    fn after_delivery(&mut self, port: &Port, pair_at: usize, ring: &Ring, failure: Option<RingError>) {
        if let Some(error) = failure {
            self.ring_broken(port, pair_at * 2, ring, error);
        }
    }
}
