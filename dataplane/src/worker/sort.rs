//! Where each frame of a burst from a guest goes, decided on its first bytes.

use vnic_lb::parse::parse;

use super::Context;
use super::allowance::LONG_BURST;
use crate::counters::{DropReason, PairCounters};
use crate::engine::Event;
use crate::fabric::vlan::NO_VLAN;
use crate::fabric::{Fabric, MAX_PORTS, MAX_QUEUE_PAIRS, Port, PortIndex, Proposal};
use crate::switch::{self, FromGuest, Source};
use crate::virtq;
use crate::vnet::{self, Flaw, Look, WIRE_MIN_LEN};

/// Where one frame of a burst goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    /// Into a guest RX ring, as it is: a port and its queue pair.
    Ring(PortIndex, u8),
    /// Into one of a port's guest RX rings, as it is; its flow says which.
    Flow(PortIndex),
    /// To a local port, with a tag put in or taken out.
    Port(PortIndex),
    /// Out by a NIC that the session decides.
    Uplink,
    /// To a group.
    Group,
}

/// The frames of the burst in hand, sorted by where they go. A frame is named by its position in `looks`.
#[derive(Default)]
pub(super) struct Sorted {
    /// What was found of each chain.
    pub(super) looks: Vec<Look>,
    /// By guest RX ring: `port * MAX_QUEUE_PAIRS + pair`.
    by_ring: Box<[Vec<u8>]>,
    /// Rings that have frames now.
    touched: Vec<usize>,
    by_flow: Vec<(u8, PortIndex)>,
    /// To be copied into frame memory, with where they go from there, and their VLANs.
    pub(super) copied: Vec<(u8, Route, u16)>,
}

// So that a position fits eight bits.
const _: () = assert!(LONG_BURST <= u8::MAX as usize);

impl Sorted {
    /// With room for bursts.
    pub(super) fn new() -> Sorted {
        let rings = MAX_PORTS * MAX_QUEUE_PAIRS;
        Sorted {
            looks: Vec::with_capacity(LONG_BURST),
            by_ring: (0..rings).map(|_| Vec::new()).collect(),
            touched: Vec::with_capacity(rings),
            by_flow: Vec::with_capacity(LONG_BURST),
            copied: Vec::with_capacity(LONG_BURST),
        }
    }

    #[inline]
    fn push(&mut self, index: u8, port: PortIndex, pair: usize) {
        let ring = usize::from(port) * MAX_QUEUE_PAIRS + pair;
        let picks = &mut self.by_ring[ring];
        if picks.is_empty() {
            self.touched.push(ring);
            // Once in a ring's life; afterwards the room is there.
            picks.reserve(LONG_BURST);
        }
        picks.push(index);
    }

    /// Hands each ring and its frames to `forward`. Where that says `false` they are to be copied instead.
    pub(super) fn for_each_ring(&mut self, mut forward: impl FnMut(usize, usize, &[Look], &[u8]) -> bool) {
        while let Some(ring) = self.touched.pop() {
            let (port, pair) = (ring / MAX_QUEUE_PAIRS, ring % MAX_QUEUE_PAIRS);
            let picks = &mut self.by_ring[ring];
            if !forward(port, pair, &self.looks, picks) {
                let narrow = |value: usize| u8::try_from(value).unwrap_or(u8::MAX);
                let route = Route::Ring(narrow(port), narrow(pair));
                self.copied
                    .extend(picks.iter().map(|&index| (index, route, NO_VLAN)));
            }
            picks.clear();
        }
    }

    /// Spreads the frames that their flows decide on over the rings of their ports.
    pub(super) fn spread_by_flow(&mut self, fabric: &Fabric, engine: &virtq::Ring) {
        if self.by_flow.is_empty() {
            return;
        }
        let mut by_flow = std::mem::take(&mut self.by_flow);
        let looks = std::mem::take(&mut self.looks);
        let picks = by_flow
            .drain(..)
            .map(|(index, port)| (usize::from(index), &looks[usize::from(index)], (index, port)));
        vnet::peek(engine, picks, |_, (index, port), head| {
            let pair = fabric.ports[usize::from(port)].rx_pair(parse(head).flow_hash());
            self.push(index, port, pair.unwrap_or(0));
        });
        self.looks = looks;
        self.by_flow = by_flow;
    }
}

impl Context {
    /// Decides for each frame where it goes, and counts. Returns the bytes of all that are in order.
    pub(super) fn sort(
        &mut self,
        fabric: &Fabric,
        port: &Port,
        counters: &PairCounters,
        sorted: &mut Sorted,
    ) -> u64 {
        let drops = &port.state.counters.of(self.index).drops;
        let (mut frames, mut bytes) = (0, 0);
        // The addresses of the frame before, and where it went: while nobody minds VLANs, they decide.
        let mut last: Option<([u8; 12], Route)> = None;
        let looks = std::mem::take(&mut sorted.looks);
        for (look, index) in looks.iter().zip(0u8..) {
            if let Some(flaw) = look.flaw() {
                drops.add(reason_of(flaw), 1);
                continue;
            }
            frames += 1;
            bytes += look.len().max(WIRE_MIN_LEN) as u64;
            let (route, vlan) = match (last, look.head().first_chunk()) {
                (Some((before, route)), Some(addresses)) if before == *addresses => (route, NO_VLAN),
                (_, addresses) => match self.decide(fabric, port, look.head()) {
                    Ok((route, vlan)) => {
                        last = addresses
                            .copied()
                            .filter(|_| !fabric.vlan_aware)
                            .map(|it| (it, route));
                        (route, vlan)
                    }
                    Err(reason) => {
                        drops.add(reason, 1);
                        continue;
                    }
                },
            };
            match route {
                Route::Ring(port, pair) => sorted.push(index, port, pair.into()),
                Route::Flow(port) => sorted.by_flow.push((index, port)),
                Route::Port(_) | Route::Uplink | Route::Group => sorted.copied.push((index, route, vlan)),
            }
        }
        sorted.looks = looks;
        counters.guest_tx_frames.add(frames);
        counters.guest_tx_bytes.add(bytes);
        bytes
    }

    /// Decides where a frame that begins with `head` goes, and in which VLAN it is.
    fn decide(&self, fabric: &Fabric, port: &Port, head: &[u8]) -> Result<(Route, u16), DropReason> {
        let Some((dst, src)) = switch::addresses(head) else {
            return Err(DropReason::TooShort);
        };
        // First of all, so that no address is learned from a frame that may not pass.
        let vlan = switch::vlan_from_guest(fabric, port, head)?;
        match switch::check_source(fabric, port, src) {
            Source::Own => {}
            // The frame goes out already: the answer to it takes longer than the control thread does.
            Source::Candidate => match port.state.propose_mac(src) {
                Proposal::First => self.shared.report(Event::MacSeen {
                    port: port.state.index,
                    mac: src,
                }),
                Proposal::Pending => {}
                Proposal::Refused => return Err(DropReason::MacRefused),
            },
            Source::Refused(reason) => return Err(reason),
        }
        let route = match switch::from_guest(fabric, port, vlan, dst) {
            FromGuest::Port(to) => {
                let destination = &fabric.ports[usize::from(to)];
                // Between two access ports, which then are of one VLAN, the tag would be put in and taken out again.
                if destination.vlan.is_access() != port.vlan.is_access() {
                    Route::Port(to)
                } else if destination.has_several_rx() {
                    Route::Flow(to)
                } else {
                    // A port without a running ring counts as dropped what goes to its first.
                    let pair = destination.rx_pair(0).unwrap_or(0);
                    Route::Ring(to, u8::try_from(pair).unwrap_or(0))
                }
            }
            FromGuest::Uplink => Route::Uplink,
            FromGuest::Group => Route::Group,
            FromGuest::Drop(reason) => return Err(reason),
        };
        Ok((route, vlan))
    }
}

fn reason_of(flaw: Flaw) -> DropReason {
    match flaw {
        Flaw::TooShort => DropReason::TooShort,
        Flaw::TooLong => DropReason::TooLong,
        Flaw::BadHeader => DropReason::BadHeader,
    }
}
