//! The send rings of a worker's share. It keeps their locks for as long as it has the fabric: nobody else wants them until the next
//! one, and to take a lock and to give it back costs more than the rest of a look at an idle ring.

use std::sync::MutexGuard;

use crate::fabric::{Fabric, Ring};
use crate::virtq;

/// One of them.
pub(super) struct HeldRing<'f> {
    /// Its port's place in the fabric.
    pub port: usize,
    /// Its queue pair's place in the port.
    pub pair: usize,
    pub ring: &'f Ring,
    /// `None` while the worker that had it in the last generation still does.
    engine: Option<MutexGuard<'f, virtq::Ring>>,
}

impl<'f> HeldRing<'f> {
    /// The rings of a worker's share that run.
    pub(super) fn of_share(fabric: &'f Fabric, worker: usize) -> Vec<HeldRing<'f>> {
        let rings = fabric.shares[worker].guest_tx.iter();
        rings
            .filter_map(|&(port, pair)| {
                Some(HeldRing {
                    port,
                    pair,
                    ring: fabric.ports[port].pairs[pair].tx.as_deref()?,
                    engine: None,
                })
            })
            .collect()
    }

    /// The ring's engine, unless it is broken or still another worker's.
    #[inline]
    pub(super) fn engine(&mut self) -> Option<&mut virtq::Ring> {
        if self.ring.is_broken() {
            return None;
        }
        if self.engine.is_none() {
            self.engine = self.ring.engine.try_lock();
        }
        self.engine.as_deref_mut()
    }
}

/// Whether a ring has work after all, with notifications asked for: the recheck before sleeping.
pub(super) fn arm(rings: &mut [HeldRing<'_>]) -> bool {
    rings
        .iter_mut()
        .filter(|held| !held.ring.is_broken())
        .any(|held| held.engine().is_none_or(|engine| engine.arm()))
}

/// Tells the drivers not to kick: the worker is polling again.
pub(super) fn disarm(rings: &mut [HeldRing<'_>]) {
    for engine in rings.iter_mut().filter_map(HeldRing::engine) {
        engine.disarm();
    }
}
