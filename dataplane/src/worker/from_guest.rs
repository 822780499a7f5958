//! Frames that guests send.

use super::Context;
use super::allowance::{BURST, Backlog};
use super::held::HeldRing;
use super::sort::{Route, Sorted};
use crate::counters::{DropReason, PairCounters};
use crate::engine::Event;
use crate::fabric::{Fabric, Port, Ring};
use crate::memory::frames::Frame;
use crate::virtq::{self, RingError};
use crate::vnet::{self, Look};

impl Context {
    /// Takes one burst from a guest TX ring. What could not go straight to another guest is staged afterwards. Returns the number of frames (or
    /// chains) taken.
    pub(super) fn poll_guest(&mut self, fabric: &Fabric, held: &mut HeldRing<'_>) -> usize {
        let (port_at, pair_at, ring) = (held.port, held.pair, held.ring);
        let most = self.allowance.of(std::mem::take(&mut held.backlog));
        let Some(engine) = held.engine().filter(|engine| engine.has_available()) else {
            return 0;
        };
        let port = &fabric.ports[port_at];
        let pair = &port.pairs[pair_at];
        let counters = port.state.pairs[pair_at].of(self.index);
        let taken = if pair.tx_enabled {
            self.take_burst(fabric, port, counters, engine, most)
        } else {
            self.discard_burst(port, engine)
        };
        counters.notifications.add(u64::from(engine.notify()));
        match taken {
            Ok((frames, bytes)) => {
                held.backlog = Backlog::of(frames, bytes);
                self.allowance.note_ring(held.backlog);
                frames
            }
            Err(error) => {
                self.ring_broken(port, pair_at * 2 + 1, ring, error);
                0
            }
        }
    }

    /// Throws a burst away; returns its frames (or chains), and no bytes, as none was looked at.
    fn discard_burst(&self, port: &Port, engine: &mut virtq::Ring) -> Result<(usize, u64), RingError> {
        let discarded = vnet::discard_from_guest(engine, BURST)?;
        let drops = &port.state.counters.of(self.index).drops;
        drops.add(DropReason::RingDisabled, discarded as u64);
        Ok((discarded, 0))
    }

    /// Looks at a burst of at most so many frames, copies each of them to where it goes, and gives the guest its buffers back. Returns the
    /// number of frames (or chains) and the bytes of those that were in order.
    fn take_burst(
        &mut self,
        fabric: &Fabric,
        port: &Port,
        counters: &PairCounters,
        engine: &mut virtq::Ring,
        most: usize,
    ) -> Result<(usize, u64), RingError> {
        vnet::look(engine, most, &mut self.sorted.looks)?;
        let mut sorted = std::mem::take(&mut self.sorted);
        let bytes = self.sort(fabric, port, counters, &mut sorted);
        sorted.spread_by_flow(fabric, engine);
        sorted.for_each_ring(|port, pair, looks, picks| {
            let frames = picks
                .iter()
                .map(|&index| (usize::from(index), &looks[usize::from(index)]));
            self.forward_to_port(engine, frames, &fabric.ports[port], pair)
        });
        self.copy(fabric, port, engine, &mut sorted);
        let taken = sorted.looks.len();
        self.sorted = sorted;
        vnet::finish(engine);
        Ok((taken, bytes))
    }

    /// Copies what does not go straight to another guest into frame memory, and stages it: so many at a time that what is known of them
    /// is still in the first-level cache at the end.
    fn copy(&mut self, fabric: &Fabric, port: &Port, engine: &virtq::Ring, sorted: &mut Sorted) {
        for copied in sorted.copied.chunks(BURST) {
            self.copy_burst(port, engine, &sorted.looks, copied);
            let all_leave = copied.iter().all(|(_, route, _)| matches!(route, Route::Uplink));
            if all_leave && !port.vlan.is_access() {
                // As nearly always, and as `route` would do one by one.
                std::mem::swap(&mut self.burst, &mut self.uplink);
            } else {
                let mut frames = std::mem::take(&mut self.burst);
                for (frame, &(_, route, vlan)) in frames.drain(..).zip(copied) {
                    self.route(fabric, port, frame, route, vlan);
                }
                self.burst = frames;
            }
            self.send_uplink(fabric, port);
        }
        sorted.copied.clear();
    }

    /// Copies frames into frame memory, to `burst`; when chunks run out, the rest is dropped.
    fn copy_burst(&mut self, port: &Port, engine: &virtq::Ring, looks: &[Look], copied: &[(u8, Route, u16)]) {
        let picks = copied
            .iter()
            .map(|&(index, ..)| (usize::from(index), &looks[usize::from(index)]));
        let taken = vnet::take(engine, picks, &mut self.stock.chunks, &mut self.burst);
        let missing = copied.len() - taken;
        if missing > 0 {
            let drops = &port.state.counters.of(self.index).drops;
            drops.add(DropReason::NoChunk, missing as u64);
        }
    }

    /// Stages one frame by its destination, or drops it.
    fn route(&mut self, fabric: &Fabric, port: &Port, mut frame: Frame, route: Route, vlan: u16) {
        if let Route::Ring(destination, pair) = route {
            return self.staged.port(destination, pair.into(), frame);
        }
        // From here on a frame of a VLAN has its tag, whatever the guest knows of it.
        if port.vlan.is_access() && !self.push_tag(&mut frame, vlan) {
            return self.drop_from_guest(port, frame, DropReason::TooLong);
        }
        match route {
            Route::Port(destination) | Route::Flow(destination) | Route::Ring(destination, _) => {
                self.stage(fabric, destination, frame);
            }
            Route::Uplink => self.uplink.push(frame),
            Route::Group => self.spread(fabric, port, vlan, frame),
        }
    }

    /// A group frame: a copy to every other running port of the VLAN, and the frame itself to one NIC: the designated one, or its
    /// station's.
    fn spread(&mut self, fabric: &Fabric, port: &Port, vlan: u16, frame: Frame) {
        self.stage_copies(fabric, Some(port.state.index), vlan, &frame);
        if fabric.nics.is_empty() {
            return self.stock.chunks.free(frame);
        }
        let nic = match self.stations() {
            None => self.balancer.designated().map(usize::from),
            Some(view) => self.station_nic(&view, port, self.memory.head(&frame)),
        };
        match nic.filter(|nic| *nic < fabric.nics.len()) {
            Some(nic) => self.staged.nic(nic, frame),
            None => self.drop_from_guest(port, frame, DropReason::NoNicAlive),
        }
    }

    /// Has the NICs of the frames in `uplink` chosen, and stages them.
    fn send_uplink(&mut self, fabric: &Fabric, port: &Port) {
        if self.uplink.is_empty() {
            return;
        }
        match self.stations() {
            None => self.steer_sessions(),
            Some(view) => self.steer_stations(&view, port),
        }
        let mut frames = std::mem::take(&mut self.uplink);
        for (frame, choice) in frames.drain(..).zip(&self.choices) {
            match choice {
                Some(nic) if usize::from(*nic) < fabric.nics.len() => {
                    self.staged.nic(usize::from(*nic), frame)
                }
                _ => {
                    port.state
                        .counters
                        .of(self.index)
                        .drops
                        .add(DropReason::NoNicAlive, 1);
                    self.stock.chunks.free(frame);
                }
            }
        }
        self.uplink = frames;
    }

    fn steer_sessions(&mut self) {
        for frame in &self.uplink {
            let head = self.memory.head(frame);
            self.balancer.collect(&mut self.observed, head, frame_len(frame));
        }
        self.balancer
            .steer(self.index, self.now, &mut self.observed, &mut self.choices);
        self.observed.clear();
    }

    fn drop_from_guest(&mut self, port: &Port, frame: Frame, reason: DropReason) {
        port.state.counters.of(self.index).drops.add(reason, 1);
        self.stock.chunks.free(frame);
    }

    /// Marks a ring broken and tells the control thread once.
    pub(super) fn ring_broken(&self, port: &Port, ring_index: usize, ring: &Ring, error: RingError) {
        if ring.mark_broken() {
            self.shared.report(Event::RingBroken {
                port: port.state.index,
                ring: ring_index,
                error,
            });
        }
    }
}

/// A frame's length as the balancer counts it; no frame is longer than a few chunks.
pub(super) fn frame_len(frame: &Frame) -> u32 {
    u32::try_from(frame.len()).unwrap_or(u32::MAX)
}
