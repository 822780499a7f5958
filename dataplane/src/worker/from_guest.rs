//! Frames that guests send.

use vnic_lb::balancer::Observed;
use vnic_lb::mac::Mac;
use vnic_lb::parse::parse;

use super::{BURST, Context};
use crate::counters::DropReason;
use crate::engine::Event;
use crate::fabric::{Fabric, Port, Proposal, Ring};
use crate::memory::frames::Frame;
use crate::switch::{self, FromGuest, Source};
use crate::virtq::RingError;
use crate::vnet;

impl Context {
    /// Takes one burst from a guest TX ring and sends it on its way; returns the number of frames (or chains) taken.
    pub(super) fn poll_guest(&mut self, fabric: &Fabric, port_at: usize, pair_at: usize) -> usize {
        let port = &fabric.ports[port_at];
        let pair = &port.pairs[pair_at];
        let Some(ring) = &pair.tx else { return 0 };
        if ring.is_broken() {
            return 0;
        }
        let taken = match self.take(port, pair_at, ring, pair.tx_enabled) {
            Ok(taken) => taken,
            Err(error) => {
                self.ring_broken(port, pair_at * 2 + 1, ring, error);
                0
            }
        };
        // What was taken before the ring broke is complete and goes its way.
        let mut burst = std::mem::take(&mut self.burst);
        for frame in burst.drain(..) {
            self.route(fabric, port, frame);
        }
        self.burst = burst;
        self.send_uplink(fabric, port);
        self.deliver_staged(fabric);
        taken
    }

    /// Empties up to a burst of the ring into `self.burst`, and counts.
    fn take(&mut self, port: &Port, pair_at: usize, ring: &Ring, enabled: bool) -> Result<usize, RingError> {
        // Only contended while a queue moves to another worker between two generations.
        let Some(mut engine) = ring.engine.try_lock() else {
            return Ok(0);
        };
        if !engine.has_available() {
            return Ok(0);
        }
        let drops = &port.state.counters.of(self.index).drops;
        let counters = port.state.pairs[pair_at].of(self.index);
        if !enabled {
            let discarded = vnet::discard_from_guest(&mut engine, BURST)?;
            drops.add(DropReason::RingDisabled, u64::from(discarded));
            counters.notifications.add(u64::from(engine.notify()));
            return Ok(discarded as usize);
        }
        let taken = vnet::take_from_guest(&mut engine, &mut self.stock.chunks, &mut self.burst, BURST)?;
        counters.notifications.add(u64::from(engine.notify()));
        drop(engine);
        counters.guest_tx_frames.add(self.burst.len() as u64);
        counters.guest_tx_bytes.add(taken.bytes);
        if taken.chains as usize != self.burst.len() {
            drops.add(DropReason::NoChunk, u64::from(taken.no_chunk));
            drops.add(DropReason::TooShort, u64::from(taken.too_short));
            drops.add(DropReason::TooLong, u64::from(taken.too_long));
            drops.add(DropReason::BadHeader, u64::from(taken.bad_header));
        }
        Ok(taken.chains as usize)
    }

    /// Stages one frame by its destination, or drops it.
    fn route(&mut self, fabric: &Fabric, port: &Port, mut frame: Frame) {
        let head = self.memory.head(&frame);
        let Some((dst, src)) = addresses(head) else {
            return self.drop_from_guest(port, frame, DropReason::TooShort);
        };
        // First of all, so that no address is learned from a frame that may not pass.
        let vlan = match switch::vlan_from_guest(fabric, port, head) {
            Ok(vlan) => vlan,
            Err(reason) => return self.drop_from_guest(port, frame, reason),
        };
        match switch::check_source(fabric, port, src) {
            Source::Own => {}
            // The frame goes out already: the answer to it takes longer than the control thread does.
            Source::Candidate => match port.state.propose_mac(src) {
                Proposal::First => self.shared.report(Event::MacSeen {
                    port: port.state.index,
                    mac: src,
                }),
                Proposal::Pending => {}
                Proposal::Refused => return self.drop_from_guest(port, frame, DropReason::MacRefused),
            },
            Source::Refused(reason) => return self.drop_from_guest(port, frame, reason),
        }
        // From here on a frame of a VLAN has its tag, whatever the guest knows of it.
        if port.vlan.is_access() && !self.push_tag(&mut frame, vlan) {
            return self.drop_from_guest(port, frame, DropReason::TooLong);
        }
        match switch::from_guest(fabric, port, vlan, dst) {
            FromGuest::Port(destination) => self.stage(fabric, destination, frame),
            FromGuest::Uplink => {
                self.observed.push(Observed {
                    parsed: parse(self.memory.head(&frame)),
                    frame_len: frame_len(&frame),
                });
                self.uplink.push(frame);
            }
            FromGuest::Group => self.spread(fabric, port, vlan, frame),
            FromGuest::Drop(reason) => self.drop_from_guest(port, frame, reason),
        }
    }

    /// A group frame: a copy to every other running port of the VLAN, and the frame itself to the one designated NIC.
    fn spread(&mut self, fabric: &Fabric, port: &Port, vlan: u16, frame: Frame) {
        self.stage_copies(fabric, Some(port.state.index), vlan, &frame);
        if fabric.nics.is_empty() {
            return self.stock.chunks.free(frame);
        }
        match fabric.designated(self.balancer.alive().snapshot()) {
            Some(nic) => self.staged.nic(nic, frame),
            None => self.drop_from_guest(port, frame, DropReason::NoNicAlive),
        }
    }

    /// Asks the balancer for the NICs of the collected frames and stages them.
    fn send_uplink(&mut self, fabric: &Fabric, port: &Port) {
        if self.uplink.is_empty() {
            return;
        }
        self.choices.clear();
        self.balancer
            .steer(self.index, self.now, &self.observed, &mut self.choices);
        self.observed.clear();
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

/// Destination and source of an Ethernet frame.
pub(super) fn addresses(head: &[u8]) -> Option<(Mac, Mac)> {
    let (dst, rest) = head.split_first_chunk::<6>()?;
    let src = rest.first_chunk::<6>()?;
    Some((Mac(*dst), Mac(*src)))
}

/// A frame's length as the balancer counts it; no frame is longer than a few chunks.
pub(super) fn frame_len(frame: &Frame) -> u32 {
    u32::try_from(frame.len()).unwrap_or(u32::MAX)
}
