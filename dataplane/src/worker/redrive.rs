//! Frames that were given to a NIC that then died: copies of them leave by others.
//!
//! The loss of a NIC is rare, so the lists here grow when it happens instead of taking memory before.

use std::sync::atomic::Ordering;

use super::Context;
use super::from_guest::frame_len;
use crate::counters::DropReason;
use crate::fabric::{Fabric, Nic, NicSender, NicState};
use crate::neighbour;

impl Context {
    /// Looks after a queue's frames in flight; those of a lost NIC are collected for [`Context::redrive`].
    pub(super) fn look_after(&mut self, nic: &NicState, sender: &mut NicSender) {
        let lost = nic.lost.load(Ordering::Acquire);
        let serviced = sender.service(&mut self.stock.chunks, self.now.millis, lost, &mut self.rescued);
        if serviced.refused > 0 {
            let drops = &nic.counters.of(self.index).drops;
            drops.add(DropReason::NicRefused, serviced.refused);
            self.balancer.record_refused(nic.index, serviced.refused);
        }
        if serviced.suspect && !nic.suspect.swap(true, Ordering::AcqRel) {
            self.shared.suspect();
        }
    }

    /// Sends what was collected by the NICs that are alive; returns how many frames that were.
    pub(super) fn redrive(&mut self, fabric: &Fabric, lost: &Nic) -> usize {
        if self.rescued.is_empty() {
            return 0;
        }
        let mut frames = std::mem::take(&mut self.rescued);
        let count = frames.len();
        // The lost NIC's own probes say nothing when another one sends them, and would have its address seen there.
        for frame in frames.extract_if(.., |frame| {
            self.memory.head(frame).get(6..12) == Some(&lost.mac.0)
        }) {
            self.stock.chunks.free(frame);
        }
        self.rescued_observed.clear();
        for frame in &frames {
            let head = self.memory.head(frame);
            self.balancer
                .collect(&mut self.rescued_observed, head, frame_len(frame));
        }
        let view = self.stations();
        if view.is_none() {
            self.balancer.steer(
                self.index,
                self.now,
                &mut self.rescued_observed,
                &mut self.rescued_choices,
            );
        }
        let counters = lost.state.counters.of(self.index);
        for (at, frame) in frames.drain(..).enumerate() {
            let head = self.memory.head(&frame);
            let nic = match &view {
                Some(view) => neighbour::sender(head)
                    .and_then(|station| view.steer(station))
                    .map(usize::from),
                None if head.first().is_some_and(|byte| byte & 1 == 1) => {
                    self.balancer.designated().map(usize::from)
                }
                None => self.rescued_choices.get(at).copied().flatten().map(usize::from),
            };
            let nic = nic.filter(|nic| *nic < fabric.nics.len());
            // It may have come back, and has these frames already.
            match nic.filter(|nic| *nic != usize::from(lost.state.index)) {
                Some(nic) => {
                    counters.redriven.add(1);
                    self.staged.nic(nic, frame);
                }
                None => {
                    counters.drops.add(DropReason::NoNicAlive, 1);
                    self.stock.chunks.free(frame);
                }
            }
        }
        self.rescued = frames;
        self.deliver_staged(fabric);
        count
    }
}
