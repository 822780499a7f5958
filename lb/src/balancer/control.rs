//! What an operator, health code and probes change or tell at run time. Nothing here waits for a worker or makes one
//! wait. Calls that change weights, NICs or the algorithm build a slot table, which takes some ten milliseconds: they
//! belong into a thread that has the time.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, MutexGuard, PoisonError};

use super::Balancer;
use crate::nics::{NicError, NicIndex, NicInfo, NicState, has, members};
use crate::plan::Planner;
use crate::policy::Algorithm;
use crate::rebalance::{Rebalancer, gap_ms};
use crate::signals::{Meter, capacities};
use crate::{Clock, MAX_NICS, Millis};

/// What changes are made of.
pub(super) struct Control {
    planner: Planner,
    meter: Meter,
    rebalancer: Rebalancer,
}

impl Control {
    pub(super) fn new(planner: Planner) -> Control {
        Control {
            planner,
            meter: Meter::default(),
            rebalancer: Rebalancer::new(),
        }
    }
}

impl Balancer {
    fn control(&self) -> MutexGuard<'_, Control> {
        // Nothing is left half done: each change ends in one store of a new plan.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, control: &mut Control) {
        let plan = control.planner.plan(Some(&self.plan.load()));
        self.measuring
            .store(plan.algorithm == Algorithm::Adaptive, Relaxed);
        let present = plan.present;
        self.plan.store(Arc::new(plan));
        // After the plan: whoever finds a NIC here finds it there too.
        self.present.store(present, Release);
    }

    /// The algorithm that places new sessions.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.plan.load().algorithm
    }

    /// The NICs, lowest index first.
    #[must_use]
    pub fn nics(&self) -> Vec<NicState> {
        self.plan.load().nics.clone()
    }

    /// Changes the algorithm and returns the one before. Sessions that exist stay on their NICs.
    pub fn set_policy(&self, algorithm: Algorithm) -> Algorithm {
        let mut control = self.control();
        let before = control.planner.set_algorithm(algorithm);
        self.publish(&mut control);
        before
    }

    /// Gives a NIC another weight, or none: see [`crate::policy::weights_in_force`]. 0 drains it. Sessions that exist
    /// stay on their NICs.
    ///
    /// # Errors
    /// If there is no such NIC.
    pub fn set_weight(&self, nic: NicIndex, weight: Option<u32>) -> Result<(), NicError> {
        let mut control = self.control();
        control.planner.nic(nic)?.info.weight = weight;
        self.publish(&mut control);
        Ok(())
    }

    /// Tells the speed of a NIC's link in Mb/s, or that it is unknown; returns whether that is new.
    ///
    /// # Errors
    /// If there is no such NIC.
    pub fn set_link_speed(&self, nic: NicIndex, mbps: Option<u32>) -> Result<bool, NicError> {
        let mut control = self.control();
        let state = control.planner.nic(nic)?;
        let is_new = state.speed_mbps != mbps;
        state.speed_mbps = mbps;
        if is_new {
            self.publish(&mut control);
        }
        Ok(is_new)
    }

    /// Lets a NIC take no new sessions, and returns how many it still has. They stay until they end: ask
    /// [`Balancer::sessions_per_nic`] again. If every NIC is drained, new sessions go on as if none were.
    ///
    /// # Errors
    /// If there is no such NIC.
    pub fn drain(&self, nic: NicIndex) -> Result<u64, NicError> {
        self.set_drained(nic, true)
    }

    /// Ends a [`Balancer::drain`]; returns the NIC's sessions.
    ///
    /// # Errors
    /// If there is no such NIC.
    pub fn undrain(&self, nic: NicIndex) -> Result<u64, NicError> {
        self.set_drained(nic, false)
    }

    fn set_drained(&self, nic: NicIndex, drained: bool) -> Result<u64, NicError> {
        let mut control = self.control();
        control.planner.nic(nic)?.drained = drained;
        self.publish(&mut control);
        Ok(self.counters.sessions(nic))
    }

    /// Adds a NIC and returns its index. It is not alive before [`Balancer::set_alive`], and then in slow start. An id that
    /// was there before gets its index back, with the sessions that are still pinned to it.
    ///
    /// # Errors
    /// If the id is taken, or there are [`crate::MAX_NICS`] NICs.
    pub fn add_nic(&self, info: &NicInfo) -> Result<NicIndex, NicError> {
        let mut control = self.control();
        let nic = control.planner.add(info)?;
        self.seen.fetch_or(1 << nic, Relaxed);
        self.signals.forget(&mut control.meter, nic);
        self.publish(&mut control);
        Ok(nic)
    }

    /// Removes a NIC and returns how many sessions were pinned to it: each is pinned to another one at its next frame.
    /// [`Balancer::drain`] it first to spare them that.
    ///
    /// # Errors
    /// If there is no such NIC.
    pub fn remove_nic(&self, nic: NicIndex) -> Result<u64, NicError> {
        let mut control = self.control();
        control.planner.remove(nic)?;
        // First of all: from here on no frame goes there. In this order, so that a `set_alive` at the same time either has its bit
        // cleared here, or sees that the NIC is gone.
        self.present.fetch_and(!(1 << nic), AcqRel);
        self.alive.set(nic, false);
        self.publish(&mut control);
        Ok(self.counters.sessions(nic))
    }

    /// Marks a NIC alive or dead; returns whether that is new. Takes no lock: whoever watches the links must not wait for a
    /// slot table. A NIC that comes back, or comes after [`Balancer::first_look_over`], is in slow start for
    /// [`crate::policy::SLOW_START_MS`].
    pub fn set_alive(&self, nic: NicIndex, alive: bool, now: Millis) -> bool {
        if !alive {
            return self.alive.set(nic, false);
        }
        if !has(self.present.load(Acquire), nic) {
            return false;
        }
        let bit = 1u32 << (nic % 32);
        let seen = self.seen.fetch_or(bit, Relaxed) & bit != 0;
        if seen && !self.alive.contains(nic) {
            self.returned[usize::from(nic) % MAX_NICS].store(now, Relaxed);
            self.warming.fetch_or(bit, Relaxed);
        }
        let is_new = self.alive.set(nic, true);
        if !has(self.present.load(Acquire), nic) {
            // Removed meanwhile. A bit that stays would make the next NIC with this index alive before anybody has looked at it.
            self.alive.set(nic, false);
            return false;
        }
        is_new
    }

    /// The first look at the links is over, and the NICs that have a carrier are alive. Those that have none yet are not of the start:
    /// they are in slow start when they get one.
    pub fn first_look_over(&self) {
        self.seen.fetch_or(self.present.load(Acquire), Relaxed);
    }

    /// Tells of a probe's round trip over a NIC, in microseconds. `target` is any number that is the same for the same
    /// target: round trips are compared with the best one to it, over whichever NIC.
    pub fn record_probe(&self, nic: NicIndex, now: Millis, target: u64, rtt_us: u32) {
        let place = target.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.signals.round_trip(now, nic, place, rtt_us);
    }

    /// Tells of frames that a NIC did not take: its ring was full, or it dropped them.
    pub fn record_refused(&self, nic: NicIndex, frames: u64) {
        self.signals.refused(nic, frames);
    }

    /// Tells what a worker sent by a NIC without [`Balancer::steer`], as in topology `pinned`; at most once a burst.
    pub fn record_sent(&self, worker: usize, nic: NicIndex, frames: u64, bytes: u64) {
        self.counters.of(worker).sent(usize::from(nic), frames, bytes);
    }

    /// Makes costs of what was measured, and moves sessions if that evens out the NICs. To be called by the control thread
    /// about every 100 ms, more often does no harm; bounded work, without a slot table to build.
    pub fn tick(&self, now: impl Into<Clock>) {
        self.tick_for(now.into().millis, &self.counters.loads().sessions);
    }

    /// [`Balancer::tick`], with what the NICs carry: sessions, or stations in their place.
    pub(crate) fn tick_for(&self, now: Millis, carried: &[u64; MAX_NICS]) {
        let mut control = self.control();
        let warm = self.warming.load(Relaxed) & !self.warming(now);
        self.warming.fetch_and(!warm, Relaxed);
        let plan = self.plan.load();
        let Control {
            meter, rebalancer, ..
        } = &mut *control;
        if plan.algorithm != Algorithm::Adaptive {
            if meter.stop() {
                rebalancer.stop(&self.table);
            }
            return;
        }
        if !meter.is_due(now) {
            return;
        }
        let alive = self.usable() & plan.present;
        let sent = self.counters.sent();
        self.signals.tick(meter, now, alive, &plan.nics, &sent, carried);
        let spread_us = self.signals.rtt_spread_us(alive);
        self.move_gap_ms.store(gap_ms(spread_us), Relaxed);
        let in_use = members(alive)
            .filter(|&nic| plan.weights[usize::from(nic)] != 0)
            .fold(0, |set, nic| set | 1 << nic);
        rebalancer.tick(
            &self.table,
            &self.notes,
            now,
            in_use,
            &sent.map(|sent| sent.bytes),
            &capacities(&plan.nics),
        );
    }

    /// Whether a NIC is in slow start.
    #[must_use]
    pub fn is_warming(&self, nic: NicIndex, now: Millis) -> bool {
        has(self.warming(now), nic)
    }
}
