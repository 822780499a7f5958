//! Frames sorted by destination, and their way into guest RX rings and NIC TX rings, a burst at a time.

use std::sync::atomic::Ordering;

use vnic_lb::MAX_NICS;
use vnic_lb::nics::NicIndex;
use vnic_lb::parse::parse;

use super::Context;
use super::allowance::LONG_BURST;
use crate::counters::DropReason;
use crate::fabric::vlan::{TAG_LEN, TAG_OFFSET, tag_bytes};
use crate::fabric::{
    Fabric, MAX_PORTS, MAX_QUEUE_PAIRS, Nic, NicSender, Port, PortIndex, PutOutcome, Shared,
};
use crate::memory::frames::Frame;

/// Frames by destination.
pub(super) struct Staged {
    /// For guest RX rings, at [`ring_at`].
    rings: Box<[Vec<Frame>]>,
    /// Rings that have frames now.
    touched_rings: Vec<usize>,
    /// Rings to come back to, see [`PutOutcome::owing`].
    owing_rings: Vec<usize>,
    /// For NICs.
    nics: [Vec<Frame>; MAX_NICS],
    /// NICs that have frames now; bit i is NIC i. A burst goes to any of them in turn, so a branch on which one is new could not be foreseen.
    touched_nics: u32,
    /// NICs to come back to.
    owing_nics: u32,
}

/// [`TAG_LEN`] as frame memory counts.
const TAG_LEN_U16: u16 = 4;
const _: () = assert!(TAG_LEN_U16 as usize == TAG_LEN);

/// Frames that one destination may have: the last burst comes when there is not quite a long one.
const ROOM: usize = 2 * LONG_BURST;

const RINGS: usize = MAX_PORTS * MAX_QUEUE_PAIRS;

/// Where a guest RX ring is among all of them.
fn ring_at(port: PortIndex, pair: usize) -> usize {
    usize::from(port) * MAX_QUEUE_PAIRS + pair
}

impl Staged {
    pub(super) fn new() -> Staged {
        Staged {
            rings: (0..RINGS).map(|_| Vec::new()).collect(),
            touched_rings: Vec::with_capacity(RINGS),
            owing_rings: Vec::with_capacity(RINGS),
            nics: std::array::from_fn(|_| Vec::with_capacity(ROOM)),
            touched_nics: 0,
            owing_nics: 0,
        }
    }

    pub(super) fn port(&mut self, port: PortIndex, pair: usize, frame: Frame) {
        let ring = ring_at(port, pair);
        let frames = &mut self.rings[ring];
        if frames.is_empty() {
            self.touched_rings.push(ring);
            // Once in a ring's life; afterwards the room is there.
            if frames.capacity() < ROOM {
                frames.reserve(ROOM);
            }
        }
        frames.push(frame);
    }

    #[inline(always)]
    pub(super) fn nic(&mut self, nic: usize, frame: Frame) {
        self.nics[nic].push(frame);
        self.touched_nics |= 1 << nic;
    }

    /// Comes back to a guest RX ring, once however many bursts found it held.
    pub(super) fn owe_port(&mut self, port: PortIndex, pair: usize) {
        let ring = ring_at(port, pair);
        if !self.owing_rings.contains(&ring) {
            self.owing_rings.push(ring);
        }
    }

    /// Comes back to a NIC.
    fn owe_nic(&mut self, nic: NicIndex) {
        self.owing_nics |= 1 << nic;
    }

    /// Has the next delivery visit what is owed, frames or none; returns how many queues those are. A destination that is gone took its
    /// hand-off ring along.
    fn call_debts(&mut self, ports: usize, nics: usize) -> usize {
        if self.owing_rings.is_empty() && self.owing_nics == 0 {
            return 0;
        }
        let count = self.owing_rings.len() + self.owing_nics.count_ones() as usize;
        let exists = |ring: &usize| ring / MAX_QUEUE_PAIRS < ports;
        self.touched_rings
            .extend(self.owing_rings.drain(..).filter(exists));
        self.touched_nics |= std::mem::take(&mut self.owing_nics) & ((1 << nics) - 1);
        count
    }
}

impl Context {
    /// Stages a frame for a local port.
    pub(super) fn stage(&mut self, fabric: &Fabric, destination: PortIndex, mut frame: Frame) {
        let port = &fabric.ports[usize::from(destination)];
        if port.vlan.is_access() {
            self.pop_tag(&mut frame);
        }
        match self.choose_pair(port, &frame) {
            Some(pair) => self.staged.port(destination, pair, frame),
            None => {
                port.state
                    .counters
                    .of(self.index)
                    .drops
                    .add(DropReason::PortNotReady, 1);
                self.stock.chunks.free(frame);
            }
        }
    }

    /// Stages a copy for every running port of `vlan` but `except`.
    pub(super) fn stage_copies(
        &mut self,
        fabric: &Fabric,
        except: Option<PortIndex>,
        vlan: u16,
        frame: &Frame,
    ) {
        for port in &fabric.ports {
            if Some(port.state.index) == except || fabric.vlan_aware && !port.vlan.admits(vlan) {
                continue;
            }
            let Some(pair) = self.choose_pair(port, frame) else {
                continue;
            };
            match self.memory.copy_of(&mut self.stock.chunks, frame) {
                Some(mut copy) => {
                    if port.vlan.is_access() {
                        self.pop_tag(&mut copy);
                    }
                    self.staged.port(port.state.index, pair, copy);
                }
                None => port
                    .state
                    .counters
                    .of(self.index)
                    .drops
                    .add(DropReason::NoChunk, 1),
            }
        }
    }

    /// Puts the tag of `vlan` into an untagged frame; `false` when there is no room for it.
    pub(super) fn push_tag(&self, frame: &mut Frame, vlan: u16) -> bool {
        if !self.memory.push_front(frame, TAG_LEN_U16) {
            return false;
        }
        let head = self.memory.head_mut(frame);
        head.copy_within(TAG_LEN..TAG_LEN + TAG_OFFSET, 0);
        head[TAG_OFFSET..TAG_OFFSET + TAG_LEN].copy_from_slice(&tag_bytes(vlan));
        true
    }

    /// Takes the tag out of a tagged frame.
    fn pop_tag(&self, frame: &mut Frame) {
        let head = self.memory.head_mut(frame);
        // Longer than that, or its tag would not have been seen.
        if head.len() > TAG_OFFSET + TAG_LEN {
            head.copy_within(..TAG_OFFSET, TAG_LEN);
            let _ = self.memory.pull_front(frame, TAG_LEN_U16);
        }
    }

    fn choose_pair(&self, port: &Port, frame: &Frame) -> Option<usize> {
        if port.has_several_rx() {
            port.rx_pair(parse(self.memory.head(frame)).flow_hash())
        } else {
            port.rx_pair(0)
        }
    }

    /// Delivers everything that is staged.
    pub(super) fn deliver_staged(&mut self, fabric: &Fabric) {
        while let Some(ring) = self.staged.touched_rings.pop() {
            let mut frames = std::mem::take(&mut self.staged.rings[ring]);
            let (port, pair) = (ring / MAX_QUEUE_PAIRS, ring % MAX_QUEUE_PAIRS);
            self.deliver_to_port(&fabric.ports[port], pair, &mut frames);
            self.staged.rings[ring] = frames;
        }
        let mut touched = std::mem::take(&mut self.staged.touched_nics);
        while touched != 0 {
            let nic = touched.trailing_zeros() as usize;
            touched &= touched - 1;
            let mut frames = std::mem::take(&mut self.staged.nics[nic]);
            self.send_to_nic(&fabric.nics[nic], &mut frames);
            self.staged.nics[nic] = frames;
        }
    }

    /// Comes back to the queues that others held, for the frames left there; returns how many those were.
    pub(super) fn settle_debts(&mut self, fabric: &Fabric) -> usize {
        let count = self.staged.call_debts(fabric.ports.len(), fabric.nics.len());
        if count > 0 {
            self.deliver_staged(fabric);
        }
        count
    }

    fn send_to_nic(&mut self, nic: &Nic, frames: &mut Vec<Frame>) {
        let drops = &nic.state.counters.of(self.index).drops;
        let Some(queue) = nic.tx_queue(self.index).map(|queue| &nic.queues[queue]) else {
            drops.add(DropReason::NoNicAlive, frames.len() as u64);
            frames.drain(..).for_each(|frame| self.stock.chunks.free(frame));
            return;
        };
        // Only the NIC knows its MTU: the guest's is what its driver was told.
        let longest = nic.state.max_frame();
        if frames.iter().any(|frame| frame.len() > longest) {
            for frame in frames.extract_if(.., |frame| frame.len() > longest) {
                drops.add(DropReason::TooLong, 1);
                self.stock.chunks.free(frame);
            }
        }
        let outcome = self.send_by(nic, &queue.tx, frames);
        if outcome.is_contended() {
            drops.add(DropReason::HandOffFull, outcome.dropped);
            self.count_contention(outcome);
        }
        if outcome.owing {
            self.staged.owe_nic(nic.state.index);
        }
    }

    /// Sends frames by a queue of a NIC, after those that others left for it.
    pub(super) fn send_by(
        &mut self,
        nic: &Nic,
        queue: &Shared<NicSender>,
        frames: &mut Vec<Frame>,
    ) -> PutOutcome {
        let mut dropped = 0;
        let outcome = queue.put(&mut self.stock, frames, |sender, chunks, frames| {
            dropped += sender.send(chunks, frames);
        });
        if dropped > 0 {
            let drops = &nic.state.counters.of(self.index).drops;
            drops.add(DropReason::NicRingFull, dropped);
            self.balancer.record_refused(nic.state.index, dropped);
        }
        outcome
    }

    pub(super) fn count_contention(&self, outcome: PutOutcome) {
        let counters = self.shared.counters.of(self.index);
        counters.contended_bursts.add(1);
        counters.handed_off_frames.add(outcome.handed_off);
    }

    /// Takes errors off the sockets of the share, which would else end every sleep at once.
    pub(super) fn clear_errors(&self, fabric: &Fabric) {
        let groups = fabric.shares[self.index].groups.iter();
        for group in groups.filter_map(|nic| fabric.nics[*nic].group.as_ref()) {
            if let Ok(tap) = group.tap.try_lock() {
                tap.clear_error();
            }
        }
    }

    /// Whether a NIC queue that this worker looks after still has frames in flight. Those of a lost NIC may stay for ever.
    pub(super) fn in_flight(&self, fabric: &Fabric) -> bool {
        self.senders(fabric).any(|(nic, tx)| {
            !nic.state.lost.load(Ordering::Relaxed) && tx.try_lock().is_none_or(|sender| sender.is_pending())
        })
    }

    /// Looks after what this worker sent by queues of other shares; returns whether it must do so again at once.
    pub(super) fn service_senders(&mut self, fabric: &Fabric) -> bool {
        self.service_queues(fabric, &fabric.shares[self.index].nic_tx) > 0
    }

    fn senders<'a>(&self, fabric: &'a Fabric) -> impl Iterator<Item = (&'a Nic, &'a Shared<NicSender>)> {
        let share = &fabric.shares[self.index];
        let queues = share.nic_queues.iter().chain(&share.nic_tx);
        queues.map(|&(nic, queue)| {
            let nic = &*fabric.nics[nic];
            (nic, &nic.queues[queue].tx)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_come_back_to_once_and_only_while_it_is_there() {
        let mut staged = Staged::new();
        let room = staged.owing_rings.capacity();
        for _ in 0..=room {
            staged.owe_port(1, 2);
            staged.owe_nic(0);
        }
        staged.owe_port(2, 0);
        staged.owe_nic(7);
        assert_eq!(staged.owing_rings.capacity(), room);
        assert_eq!(staged.call_debts(2, 7), 4);
        assert_eq!(staged.touched_rings, [MAX_QUEUE_PAIRS + 2]);
        assert_eq!(staged.touched_nics, 1);
        assert_eq!(staged.call_debts(2, 7), 0);
    }
}
