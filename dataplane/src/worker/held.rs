//! What a worker keeps locked for as long as it has its fabric: the send rings and the receiving NIC queues of its share. Nobody else wants
//! them until the next fabric, and to take a lock and to give it back costs more than the rest of a look at an idle queue.

use std::sync::{Mutex, MutexGuard};

use super::allowance::Backlog;
use crate::fabric::{Fabric, Ring};
use crate::nic::NicRx;
use crate::virtq;

/// A worker's share, as it keeps it.
pub(super) struct Held<'f> {
    /// The guests' send rings that run.
    pub rings: Vec<HeldRing<'f>>,
    /// The NIC queues.
    pub nic_queues: Vec<HeldNicQueue<'f>>,
}

impl<'f> Held<'f> {
    pub(super) fn of_share(fabric: &'f Fabric, worker: usize) -> Held<'f> {
        let share = &fabric.shares[worker];
        let rings = share.guest_tx.iter().filter_map(|&(port, pair)| {
            Some(HeldRing {
                port,
                pair,
                ring: fabric.ports[port].pairs[pair].tx.as_deref()?,
                backlog: Backlog::default(),
                engine: None,
            })
        });
        let nic_queues = share.nic_queues.iter().map(|&(nic, queue)| HeldNicQueue {
            nic,
            lock: &fabric.nics[nic].queues[queue].rx,
            rx: None,
        });
        Held {
            rings: rings.collect(),
            nic_queues: nic_queues.collect(),
        }
    }

    /// Whether a ring has work after all, with notifications asked for, or something of the share is still another worker's: the recheck
    /// before sleeping.
    pub(super) fn arm(&mut self) -> bool {
        let to_come = self.nic_queues.iter_mut().any(|held| held.rx().is_none());
        let mut rings = self.rings.iter_mut().filter(|held| !held.ring.is_broken());
        rings.any(|held| held.engine().is_none_or(|engine| engine.arm())) || to_come
    }

    /// Tells the drivers not to kick: the worker is polling again.
    pub(super) fn disarm(&mut self) {
        for engine in self.rings.iter_mut().filter_map(HeldRing::engine) {
            engine.disarm();
        }
    }
}

/// A guest's send ring.
pub(super) struct HeldRing<'f> {
    /// Its port's place in the fabric.
    pub port: usize,
    /// Its queue pair's place in the port.
    pub pair: usize,
    pub ring: &'f Ring,
    /// What waited in it at the last look.
    pub backlog: Backlog,
    /// `None` while the worker that had it in the last generation still does.
    engine: Option<MutexGuard<'f, virtq::Ring>>,
}

impl HeldRing<'_> {
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

/// A NIC queue's receiving side.
pub(super) struct HeldNicQueue<'f> {
    /// The NIC's place in the fabric.
    pub nic: usize,
    lock: &'f Mutex<Box<dyn NicRx>>,
    /// `None` while the worker that had it in the last generation still does.
    rx: Option<MutexGuard<'f, Box<dyn NicRx>>>,
}

impl HeldNicQueue<'_> {
    /// The receiving side, unless it is still another worker's.
    #[inline]
    pub(super) fn rx(&mut self) -> Option<&mut (dyn NicRx + 'static)> {
        if self.rx.is_none() {
            // A worker that panicked ends the process soon; until then its NIC queues rest.
            self.rx = self.lock.try_lock().ok();
        }
        self.rx.as_deref_mut().map(Box::as_mut)
    }
}
