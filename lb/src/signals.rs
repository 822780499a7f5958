//! What is known of the NICs' latency and throughput: measured in passing or fed in, and turned into costs.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crossbeam_utils::CachePadded;

use crate::counters::Sent;
use crate::nics::{NicIndex, NicSet, NicState, has, members};
use crate::policy::NicCost;
use crate::{MAX_NICS, Millis};

/// Time in which a value that has fallen is forgotten to a third.
const DECAY_MS: f64 = 10_000.0;
/// Without a sample for so long a value falls by itself: a NIC that nobody uses must get another chance.
const SILENCE_MS: Millis = 1_000;
/// Shortest time between two looks at the counters.
const TICK_MS: Millis = 100;
/// A round trip longer than that many times the best one to the same place counts as this.
const MAX_INFLATION: f64 = 16.0;
/// How much dearer a NIC gets if it refuses every frame (ring full, dropped).
const REFUSAL_PENALTY: f64 = 10.0;
/// What a link is taken to carry if nobody has told, in Mb/s.
const DEFAULT_SPEED_MBPS: u32 = 10_000;
/// Places whose best round trip is remembered.
const FLOORS: usize = 1024;

/// A number in an atomic.
#[derive(Default)]
struct Number(AtomicU64);

impl Number {
    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }

    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }
}

/// A moving average that rises fast and falls slowly. Two workers that write at once lose a sample, which is no harm.
#[derive(Default)]
struct Peak {
    value: Number,
    at: AtomicU32,
}

impl Peak {
    fn sample(&self, now: Millis, sample: f64) {
        let (value, elapsed) = (self.value.get(), now.wrapping_sub(self.at.load(Relaxed)));
        self.at.store(now, Relaxed);
        self.value.set(if value == 0.0 {
            sample
        } else if sample > value {
            // Half the way: one outlier does not make a NIC an outcast, a few in a row do.
            (value + sample) / 2.0
        } else {
            value + (sample - value) * (f64::from(elapsed) / DECAY_MS).clamp(0.001, 1.0)
        });
    }

    /// Lets the value fall towards `rest` if there was no sample for a while.
    fn idle(&self, now: Millis, rest: f64) {
        let elapsed = now.wrapping_sub(self.at.load(Relaxed));
        if self.value.get() > rest && (SILENCE_MS..Millis::MAX / 2).contains(&elapsed) {
            self.sample(now, rest);
        }
    }

    fn get(&self) -> f64 {
        self.value.get()
    }
}

#[derive(Default)]
struct NicSignals {
    /// Round trips over the best one to the same place.
    inflation: Peak,
    /// Round trips, in microseconds.
    rtt_us: Peak,
    /// Frames that the NIC would not take, since start.
    refused: AtomicU64,
    latency: Number,
    utilisation: Number,
    per_session: Number,
    sessions: AtomicU64,
}

/// The figures of all NICs. Workers write samples and read costs; the control thread makes one of the other.
pub(crate) struct Signals {
    nics: [CachePadded<NicSignals>; MAX_NICS],
    /// Best round trip to a place: `tag:32 microseconds:32`.
    floors: Box<[AtomicU64]>,
}

/// What the control thread remembers from tick to tick.
#[derive(Default)]
pub(crate) struct Meter {
    at: Option<Millis>,
    sent: [Sent; MAX_NICS],
    refused: [u64; MAX_NICS],
    utilisation: [f64; MAX_NICS],
    penalty: [f64; MAX_NICS],
}

impl Meter {
    /// Whether enough time has passed since the last tick for a rate that means something.
    pub(crate) fn is_due(&self, now: Millis) -> bool {
        self.at.is_none_or(|at| now.wrapping_sub(at) >= TICK_MS)
    }

    /// Forgets what it has measured; `false` if that is nothing.
    pub(crate) fn stop(&mut self) -> bool {
        let was_running = self.at.is_some();
        *self = Meter::default();
        was_running
    }
}

/// What the costs of a NIC are made of, for people.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NicFigures {
    /// Moving peak of the round trips that were measured over the NIC, in microseconds; 0 if there was none.
    pub rtt_us: f64,
    /// Moving peak of the round trips over the best one to the same place; 0 if there was none.
    pub inflation: f64,
    /// Latency over that of the best NIC, times the penalty for refused frames, as of the last tick.
    pub latency: f64,
    /// Part of the capacity in use, 0 to 1, as of the last tick.
    pub utilisation: f64,
    /// What `adaptive` compares.
    pub cost: f64,
}

impl Signals {
    pub(crate) fn new() -> Signals {
        Signals {
            nics: std::array::from_fn(|_| CachePadded::default()),
            floors: (0..FLOORS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn of(&self, nic: NicIndex) -> &NicSignals {
        &self.nics[usize::from(nic) % MAX_NICS]
    }

    /// A round trip whose request left by a NIC. Places differ in their distance, so it counts relative to the best one
    /// to the same `place` (any hash), over whichever NIC.
    pub(crate) fn round_trip(&self, now: Millis, nic: NicIndex, place: u64, rtt_us: u32) {
        let inflation = self.inflation(place, rtt_us.max(1));
        self.of(nic).inflation.sample(now, inflation);
        self.of(nic).rtt_us.sample(now, f64::from(rtt_us.max(1)));
    }

    fn inflation(&self, place: u64, rtt_us: u32) -> f64 {
        let (tag, at) = (place >> 32, ((place & 0xffff_ffff) * FLOORS as u64) >> 32);
        let Some(floor) = usize::try_from(at).ok().and_then(|at| self.floors.get(at)) else {
            return 1.0;
        };
        let stored = floor.load(Relaxed);
        let known = u32::try_from(stored & 0xffff_ffff).unwrap_or(0);
        let best = if stored >> 32 != tag || known == 0 || rtt_us < known {
            rtt_us
        } else {
            // A route that has become longer for good is the new measure after a thousand round trips.
            known + (rtt_us - known) / 1024
        };
        if u64::from(best) | tag << 32 != stored {
            floor.store(tag << 32 | u64::from(best), Relaxed);
        }
        (f64::from(rtt_us) / f64::from(best)).min(MAX_INFLATION)
    }

    /// Frames that a NIC would not take.
    pub(crate) fn refused(&self, nic: NicIndex, frames: u64) {
        self.of(nic).refused.fetch_add(frames, Relaxed);
    }

    /// What a policy compares.
    pub(crate) fn cost(&self, nic: NicIndex) -> NicCost {
        let of = self.of(nic);
        NicCost {
            // Before the first tick there is no figure, and all NICs are the same.
            latency: of.latency.get().max(1.0),
            utilisation: of.utilisation.get(),
            per_session: of.per_session.get(),
            sessions: of.sessions.load(Relaxed),
        }
    }

    /// The figures behind a NIC's cost, which has `sessions` now.
    pub(crate) fn figures(&self, nic: NicIndex, sessions: u64) -> NicFigures {
        let (of, cost) = (self.of(nic), self.cost(nic));
        NicFigures {
            rtt_us: of.rtt_us.get(),
            inflation: of.inflation.get(),
            latency: cost.latency,
            utilisation: cost.utilisation,
            cost: cost.with(sessions),
        }
    }

    /// Longest less shortest round trip of the NICs, in microseconds: how far a frame may overtake another one.
    pub(crate) fn rtt_spread_us(&self, alive: NicSet) -> f64 {
        let known = || {
            members(alive)
                .map(|nic| self.of(nic).rtt_us.get())
                .filter(|&rtt| rtt > 0.0)
        };
        let (low, high) = (known().fold(f64::INFINITY, f64::min), known().fold(0.0, f64::max));
        (high - low).max(0.0)
    }

    /// Forgets a NIC that was removed, so that the next one with its index starts clean.
    pub(crate) fn forget(&self, meter: &mut Meter, nic: NicIndex) {
        let (of, at) = (self.of(nic), usize::from(nic) % MAX_NICS);
        (meter.penalty[at], meter.utilisation[at]) = (0.0, 0.0);
        meter.refused[at] = of.refused.load(Relaxed);
        for peak in [&of.inflation, &of.rtt_us] {
            peak.value.set(0.0);
        }
        for number in [&of.latency, &of.utilisation, &of.per_session] {
            number.set(0.0);
        }
    }

    /// Makes costs of what was sampled and counted since the last time.
    pub(crate) fn tick(
        &self,
        meter: &mut Meter,
        now: Millis,
        alive: NicSet,
        nics: &[NicState],
        sent: &[Sent; MAX_NICS],
        sessions: &[u64; MAX_NICS],
    ) {
        let elapsed = meter.at.map_or(TICK_MS, |at| now.wrapping_sub(at)).max(1);
        let first = meter.at.replace(now).is_none();
        let capacities = capacities(nics);
        let latencies = self.latencies(now, alive);
        let mut total_rate = 0.0;
        for nic in members(alive) {
            let at = usize::from(nic);
            let frames = sent[at].frames.wrapping_sub(meter.sent[at].frames);
            let bytes = sent[at].bytes.wrapping_sub(meter.sent[at].bytes);
            let refused = self.of(nic).refused.load(Relaxed);
            let refused_now = refused.wrapping_sub(meter.refused[at]);
            (meter.sent[at], meter.refused[at]) = (sent[at], refused);
            // What was counted before the first tick has no interval to be divided by.
            let rate = if first {
                0.0
            } else {
                bytes as f64 * 1000.0 / f64::from(elapsed)
            };
            total_rate += rate;
            let part = refused_now as f64 / (frames + refused_now).max(1) as f64;
            let fall = (f64::from(elapsed) / DECAY_MS * 10.0).min(1.0);
            rise_fast(&mut meter.penalty[at], part, fall);
            rise_fast(&mut meter.utilisation[at], (rate / capacities[at]).min(1.0), fall);
        }
        let all_sessions: u64 = members(alive).map(|nic| sessions[usize::from(nic)]).sum();
        let per_session = total_rate / all_sessions.max(1) as f64;
        for nic in members(alive) {
            let (of, at) = (self.of(nic), usize::from(nic));
            let penalty = 1.0 + REFUSAL_PENALTY * meter.penalty[at];
            of.latency.set(latencies[at] * penalty);
            of.utilisation.set(meter.utilisation[at]);
            // Sessions that have yet to send count for something, or a herd of them would go to one NIC.
            of.per_session
                .set((per_session / capacities[at]).max(1.0 / f64::from(1 << 20)));
            of.sessions.store(sessions[at], Relaxed);
        }
    }

    /// Each NIC's latency over that of the best one.
    fn latencies(&self, now: Millis, alive: NicSet) -> [f64; MAX_NICS] {
        for nic in members(alive) {
            self.of(nic).inflation.idle(now, 1.0);
        }
        let best = members(alive)
            .map(|nic| self.of(nic).inflation.get())
            .filter(|&inflation| inflation > 0.0)
            .fold(f64::INFINITY, f64::min);
        std::array::from_fn(|at| match self.nics[at].inflation.get() {
            // Nothing was measured over it.
            0.0 => 1.0,
            inflation => (inflation / best).max(1.0),
        })
    }
}

fn rise_fast(value: &mut f64, sample: f64, fall: f64) {
    *value = if sample > *value {
        sample
    } else {
        *value + (sample - *value) * fall
    };
}

/// Bytes a second that each NIC is taken to carry: its link speed, or its share by weight of all link speeds if an
/// operator gave weights.
pub(crate) fn capacities(nics: &[NicState]) -> [f64; MAX_NICS] {
    let slowest = nics
        .iter()
        .filter_map(|nic| nic.speed_mbps)
        .min()
        .unwrap_or(DEFAULT_SPEED_MBPS);
    let speed = |nic: &NicState| f64::from(nic.speed_mbps.unwrap_or(slowest).max(1)) * 125_000.0;
    let weighed = nics
        .iter()
        .any(|nic| nic.info.weight.is_some_and(|weight| weight != 0));
    let all: f64 = nics.iter().map(speed).sum();
    let weights: u64 = nics.iter().map(|nic| u64::from(nic.weight)).sum();
    let mut capacities = [f64::from(slowest) * 125_000.0; MAX_NICS];
    for nic in nics {
        let at = usize::from(nic.nic) % MAX_NICS;
        capacities[at] = if weighed && nic.weight != 0 {
            all * f64::from(nic.weight) / weights as f64
        } else {
            speed(nic)
        };
    }
    capacities
}

/// NICs of `nics` that are in a set.
pub(crate) fn names(nics: &[NicState], set: NicSet) -> Vec<String> {
    let named = nics.iter().filter(|nic| has(set, nic.nic));
    named.map(|nic| nic.info.id.clone()).collect()
}
