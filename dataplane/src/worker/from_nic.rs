//! Frames that NICs receive, and copies of those to groups.

use super::Context;
use super::allowance::BURST;
use super::from_guest::frame_len;
use super::held::HeldNicQueue;
use crate::checksum::partial;
use crate::counters::DropReason;
use crate::fabric::{Fabric, Nic};
use crate::memory::frames::Frame;
use crate::switch::{self, FromNic};

impl Context {
    /// Takes one burst from a NIC queue; returns the number of frames.
    pub(super) fn poll_nic(&mut self, fabric: &Fabric, held: &mut HeldNicQueue<'_>) -> usize {
        let nic = &fabric.nics[held.nic];
        let Some(rx) = held.rx() else { return 0 };
        let received = rx.receive(&mut self.stock.chunks, &mut self.burst, BURST);
        rx.refill(&mut self.stock.chunks);
        self.allowance.note_nic(received);
        self.route_received(fabric, nic);
        received
    }

    /// Looks after the frames that NIC queues send, and sends what threads that are no workers left for them; returns how much there was
    /// that wants another look at once.
    pub(super) fn service_queues(&mut self, fabric: &Fabric, queues: &[(usize, usize)]) -> usize {
        let mut busy = 0;
        for &(nic, queue) in queues {
            let nic = &fabric.nics[nic];
            let tx = &nic.queues[queue].tx;
            if let Some(mut sender) = tx.try_lock()
                && sender.is_pending()
            {
                self.look_after(&nic.state, &mut sender);
            }
            if tx.has_handed_off() {
                busy += usize::from(self.send_by(nic, tx, &mut Vec::new()).owing);
            }
            busy += self.redrive(fabric, nic);
        }
        busy
    }

    /// Takes one burst of a NIC's group copies.
    pub(super) fn poll_group(&mut self, fabric: &Fabric, nic_at: usize) -> usize {
        let nic = &fabric.nics[nic_at];
        let Some(group) = &nic.group else { return 0 };
        let Ok(mut tap) = group.tap.try_lock() else {
            return 0;
        };
        let received = tap.receive(&mut self.stock.chunks, &mut self.burst, BURST);
        drop(tap);
        self.route_received(fabric, nic);
        received
    }

    fn route_received(&mut self, fabric: &Fabric, nic: &Nic) {
        if self.burst.is_empty() {
            return;
        }
        let mut burst = std::mem::take(&mut self.burst);
        let pinned = self.shared.stations.is_some();
        if pinned {
            self.drop_flooded(fabric, nic, &mut burst);
        }
        // The addresses of the frame before, and where it went: while nobody minds VLANs, they decide.
        let mut last: Option<([u8; 12], FromNic)> = None;
        for frame in burst.drain(..) {
            let head = self.memory.head(&frame);
            let vlan = switch::vlan_from_nic(fabric, head);
            let addresses = head.first_chunk();
            let decision = match (last, addresses) {
                (Some((before, decision)), Some(addresses)) if before == *addresses => decision,
                _ => decide(fabric, vlan, head),
            };
            last = addresses.filter(|_| !fabric.vlan_aware).map(|it| (*it, decision));
            self.route_one(fabric, nic, frame, vlan, decision);
        }
        self.burst = burst;
        if !self.observed.is_empty() {
            if !pinned {
                self.balancer.observe(self.index, self.now, &mut self.observed);
            }
            self.observed.clear();
        }
        self.deliver_staged(fabric);
    }

    #[inline]
    fn route_one(&mut self, fabric: &Fabric, nic: &Nic, mut frame: Frame, vlan: u16, decision: FromNic) {
        match decision {
            FromNic::Port(port) => {
                let head = self.memory.head(&frame);
                let (observed, len) = (&mut self.observed, frame_len(&frame));
                // Where stations decide, nobody asks for sessions.
                let parsed = match self.shared.stations {
                    Some(_) => &observed.push(head, len, false).parsed,
                    None => self.balancer.collect(observed, head, len),
                };
                if nic.partial_checksums
                    && let Some((field, value)) = partial::missing(parsed, self.memory.segments(&frame))
                {
                    self.memory.write(&mut frame, field, &value);
                }
                self.stage(fabric, port, frame);
            }
            FromNic::Group => {
                self.stage_copies(fabric, None, vlan, &frame);
                self.stock.chunks.free(frame);
            }
            FromNic::Drop(reason) => {
                nic.state.counters.of(self.index).drops.add(reason, 1);
                self.stock.chunks.free(frame);
            }
        }
    }
}

/// Where a frame that begins with `head` goes.
fn decide(fabric: &Fabric, vlan: u16, head: &[u8]) -> FromNic {
    match switch::addresses(head) {
        Some((dst, src)) => switch::from_nic(fabric, vlan, dst, src),
        None => FromNic::Drop(DropReason::TooShort),
    }
}
