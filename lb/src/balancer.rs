//! The one face that `dataplane` calls: a burst of parsed frames in, a NIC for each out.

mod burst;
#[cfg(test)]
mod tests;
mod turn;

use std::sync::Arc;

pub use self::burst::Burst;
use self::turn::Turn;
use crate::Millis;
use crate::counters::AllCounters;
use crate::key::SessionKey;
use crate::nics::{AliveSet, NicIndex, NicInfo};
use crate::parse::{Class, Parsed};
use crate::policy::{HashPolicy, NewSession, NicLoad, Policy};
use crate::slots::SlotTable;
use crate::table::{BATCH, Listed, SessionTable, elapsed_ms};

/// How the balancer is set up; fixed at start except where a method says otherwise.
#[derive(Debug, Clone)]
pub struct BalancerConfig {
    /// NICs in the order of their [`NicIndex`].
    pub nics: Vec<NicInfo>,
    /// Sessions that the table is sized for; its memory (about 80 bytes each) is allocated at once.
    pub session_capacity: usize,
    /// Workers that will call [`Balancer::steer`] and [`Balancer::observe`]. A single one is spared atomic additions.
    pub workers: usize,
    /// Key of the slot hash, kept by the caller across restarts.
    pub hash_key: [u8; 16],
}

/// One frame of a burst that came from a guest (or from a NIC), as the balancer needs it.
#[derive(Debug, Clone, Copy)]
pub struct Observed {
    /// What [`crate::parse::parse`] found.
    pub parsed: Parsed,
    /// Bytes of the frame, without virtio header and FCS.
    pub frame_len: u32,
}

impl Observed {
    const EMPTY: Observed = Observed {
        parsed: Parsed::EMPTY,
        frame_len: 0,
    };
}

/// One session, as an operator lists it.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// The canonical key.
    pub key: SessionKey,
    /// NIC that the session is pinned to.
    pub nic: NicIndex,
    /// Milliseconds since it was created.
    pub age_ms: u32,
    /// Milliseconds since its last frame.
    pub idle_ms: u32,
    /// Frames seen in both directions.
    pub frames: u64,
    /// Bytes seen in both directions.
    pub bytes: u64,
}

/// Counters of the table and the decisions, since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalancerStats {
    /// Sessions in the table now.
    pub sessions: u64,
    /// Most sessions that fit.
    pub capacity: u64,
    /// Sessions ever created.
    pub created: u64,
    /// Sessions that timed out.
    pub expired: u64,
    /// Sessions moved because their NIC was not alive.
    pub repinned: u64,
    /// Frames forwarded without a session because their buckets were full (or held by another worker for long).
    pub table_full: u64,
}

/// Chooses NICs for frames and keeps the sessions' pins. Shared by all workers.
pub struct Balancer {
    nics: Vec<NicInfo>,
    alive: AliveSet,
    slots: SlotTable,
    policy: Box<dyn Policy>,
    table: SessionTable,
    counters: AllCounters,
}

impl Balancer {
    /// Allocates the session table and builds the slot table. NICs beyond [`crate::MAX_NICS`] are left out. No NIC is
    /// alive until health code says so: see [`Balancer::alive`].
    #[must_use]
    pub fn new(config: &BalancerConfig) -> Arc<Balancer> {
        Arc::new(Balancer {
            nics: config.nics.iter().take(crate::MAX_NICS).cloned().collect(),
            alive: AliveSet::default(),
            slots: SlotTable::new(&config.nics, &config.hash_key),
            policy: Box::new(HashPolicy),
            table: SessionTable::new(config.session_capacity, config.workers),
            counters: AllCounters::new(),
        })
    }

    /// Which NICs are alive; health code stores to it, every burst reads it.
    #[must_use]
    pub fn alive(&self) -> &AliveSet {
        &self.alive
    }

    /// The NICs, in the order of their index.
    #[must_use]
    pub fn nics(&self) -> &[NicInfo] {
        &self.nics
    }

    /// Name of the algorithm that new sessions are placed by.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        self.policy.name()
    }

    /// Bytes that the session table occupies.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.table.memory_bytes()
    }

    /// Frames from guests, towards NICs: `out[i]` becomes the NIC of `frames[i]`, or `None` when no NIC is alive.
    /// What was in `out` is dropped; it does not allocate once its capacity is that of a burst.
    pub fn steer(&self, worker: usize, now: Millis, frames: &[Observed], out: &mut Vec<Option<NicIndex>>) {
        out.clear();
        out.resize(frames.len(), None);
        for (burst, out) in frames.chunks(BATCH).zip(out.chunks_mut(BATCH)) {
            self.turn(worker, now).steer(burst, out);
        }
    }

    /// Frames from NICs, towards guests: creates and refreshes sessions. A new session's NIC is the policy's
    /// choice and not the one that the frame came by, which is the switch's affair; while no NIC is alive it is the
    /// slot's primary.
    pub fn observe(&self, worker: usize, now: Millis, frames: &[Observed]) {
        for burst in frames.chunks(BATCH) {
            self.turn(worker, now).observe(burst);
        }
    }

    /// Bounded upkeep (timers): called by any worker every turn or so; looks at no more than about `budget` entries.
    pub fn upkeep(&self, now: Millis, budget: usize) {
        let turn = self.turn(0, now);
        self.table.expire(now, budget, &mut |meta| turn.expired(meta));
    }

    /// Up to `limit` sessions, in no particular order.
    #[must_use]
    pub fn sessions(&self, now: Millis, limit: usize) -> Vec<SessionInfo> {
        let sessions = self.table.iter().filter(|entry| !entry.key.is_fragment());
        let info = |entry: Listed| SessionInfo {
            key: entry.key,
            nic: entry.meta.nic(),
            age_ms: elapsed_ms(now, entry.meta.created()),
            idle_ms: elapsed_ms(now, entry.last_seen),
            frames: entry.frames,
            bytes: entry.bytes,
        };
        sessions.take(limit).map(info).collect()
    }

    /// Live sessions pinned to each NIC.
    #[must_use]
    pub fn sessions_per_nic(&self) -> [u64; crate::MAX_NICS] {
        let mut sessions = [0; crate::MAX_NICS];
        for (count, nic) in sessions.iter_mut().zip(0u8..) {
            *count = self.counters.sessions(nic);
        }
        sessions
    }

    /// The slot of a frame and the NIC that it would leave by now. Changes nothing.
    #[must_use]
    pub fn explain(&self, parsed: &Parsed) -> Option<(u16, NicIndex)> {
        let (slot, alive) = (self.slots.slot(parsed.key()), self.alive.snapshot());
        let stored = match parsed.class() {
            Class::LaterFragment => self.table.lookup(&parsed.fragment_key()).hit,
            _ => parsed.session_key().and_then(|key| self.table.lookup(key).hit),
        };
        let pinned = stored
            .map(|hit| hit.meta.nic())
            .filter(|&nic| is_alive(alive, nic));
        let nic = match (pinned, stored, parsed.class()) {
            (Some(nic), ..) => Some(nic),
            (None, None, Class::Session | Class::FirstFragment) => self.choose(parsed.key(), alive),
            _ => self.slots.choose(slot, alive),
        };
        Some((slot, nic?))
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> BalancerStats {
        BalancerStats {
            sessions: self.sessions_per_nic().iter().sum(),
            capacity: self.table.lanes() as u64,
            created: self.counters.sum(|set| &set.created),
            expired: self.counters.sum(|set| &set.expired),
            repinned: self.counters.sum(|set| &set.repinned),
            table_full: self.counters.sum(|set| &set.table_full),
        }
    }

    fn turn(&self, worker: usize, now: Millis) -> Turn<'_> {
        Turn {
            balancer: self,
            counters: self.counters.of(worker),
            alive: self.alive.snapshot(),
            now,
        }
    }

    /// The policy's NIC for a new session.
    fn choose(&self, key: &SessionKey, alive: u32) -> Option<NicIndex> {
        self.policy.choose(&NewSession {
            slot: self.slots.slot(key),
            slots: &self.slots,
            alive,
            nics: &self.nics,
            load: &self.counters,
        })
    }
}

const fn is_alive(alive: u32, nic: NicIndex) -> bool {
    alive >> (nic % 32) & 1 == 1
}
