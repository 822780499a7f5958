//! What a burst tells `adaptive`: bytes by NIC and by watched session, round trips, and a session to look at.

use super::Observed;
use super::turn::Turn;
use crate::MAX_NICS;
use crate::key::proto;
use crate::nics::NicIndex;
use crate::parse::{Class, Parsed};
use crate::table::{BATCH, Lookup};
use crate::watch::Notes;

/// Whether round trips can be measured by a frame.
fn is_segment(parsed: &Parsed) -> bool {
    parsed.class() == Class::Session && parsed.key().protocol() == proto::TCP
}

impl Turn<'_> {
    /// The burst that was just decided on, and its NICs.
    pub(super) fn note_sent(
        &self,
        notes: &Notes,
        burst: &[Observed],
        lookups: &[Lookup; BATCH],
        out: &[Option<NicIndex>],
    ) {
        let (mut frames, mut bytes) = ([0u64; MAX_NICS], [0u64; MAX_NICS]);
        for ((frame, lookup), nic) in burst.iter().zip(lookups).zip(out) {
            let Some(nic) = *nic else { continue };
            let (at, len) = (usize::from(nic) % MAX_NICS, u64::from(frame.frame_len));
            frames[at] += 1;
            bytes[at] += len;
            let watch = lookup.hit.map_or(0, |hit| hit.meta.watch());
            if watch != 0 {
                notes.charge(watch, len);
            }
            if is_segment(&frame.parsed) {
                let in_flight = &self.balancer.in_flight;
                in_flight.sent(nic, lookup.hash, frame, self.micros);
            }
        }
        for nic in (0..MAX_NICS).filter(|&nic| frames[nic] != 0) {
            self.counters.sent(nic, frames[nic], bytes[nic]);
        }
        // Each frame of a burst has its turn; heavy sessions have more frames.
        let pick = notes.turn().wrapping_mul(0x9e37_79b9) / 0x1_0000 % burst.len().max(1);
        if let Some(hit) = lookups.get(pick).and_then(|lookup| lookup.hit) {
            notes.sample(&hit);
        }
    }

    pub(super) fn note_received(&self, burst: &[Observed], lookups: &[Lookup; BATCH]) {
        for (frame, lookup) in burst.iter().zip(lookups) {
            let parsed = &frame.parsed;
            let Some(hit) = lookup.hit.filter(|_| is_segment(parsed)) else {
                continue;
            };
            let (nic, in_flight) = (hit.meta.nic(), &self.balancer.in_flight);
            if let Some(rtt_us) = in_flight.received(nic, lookup.hash, frame, self.micros) {
                let signals = &self.balancer.signals;
                signals.round_trip(self.now, nic, parsed.key().place(), rtt_us);
            }
        }
    }
}
