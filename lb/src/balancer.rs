//! The one face that `dataplane` calls: a burst of parsed frames in, a NIC for each out.

use std::sync::Arc;

use crate::Millis;
use crate::key::SessionKey;
use crate::nics::{AliveSet, NicIndex, NicInfo};
use crate::parse::Parsed;

/// How the balancer is set up; fixed at start except where a method says otherwise.
#[derive(Debug, Clone)]
pub struct BalancerConfig {
    /// NICs in the order of their [`NicIndex`].
    pub nics: Vec<NicInfo>,
    /// Sessions that the table can hold; its memory is allocated at once.
    pub session_capacity: usize,
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
    /// Frames forwarded without a session because the table (or the bucket) was full.
    pub table_full: u64,
}

/// Chooses NICs for frames and keeps the sessions' pins. Shared by all workers.
pub struct Balancer {
    _private: (),
}

impl Balancer {
    /// Allocates the session table and builds the slot table.
    #[must_use]
    pub fn new(_config: &BalancerConfig) -> Arc<Balancer> {
        unimplemented!()
    }

    /// Which NICs are alive; health code stores to it, every burst reads it.
    #[must_use]
    pub fn alive(&self) -> &AliveSet {
        unimplemented!()
    }

    /// Frames from guests, towards NICs: `out[i]` is the NIC of `frames[i]`, or `None` when no NIC is alive.
    pub fn steer(
        &self,
        _worker: usize,
        _now: Millis,
        _frames: &[Observed],
        _out: &mut Vec<Option<NicIndex>>,
    ) {
        unimplemented!()
    }

    /// Frames from NICs, towards guests: creates and refreshes sessions.
    pub fn observe(&self, _worker: usize, _now: Millis, _frames: &[Observed]) {
        unimplemented!()
    }

    /// Bounded upkeep (timers): called by one worker every turn or so; looks at no more than `budget` entries.
    pub fn upkeep(&self, _now: Millis, _budget: usize) {
        unimplemented!()
    }

    /// Up to `limit` sessions, in no particular order.
    #[must_use]
    pub fn sessions(&self, _now: Millis, _limit: usize) -> Vec<SessionInfo> {
        unimplemented!()
    }

    /// Live sessions pinned to each NIC.
    #[must_use]
    pub fn sessions_per_nic(&self) -> [u64; crate::MAX_NICS] {
        unimplemented!()
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> BalancerStats {
        unimplemented!()
    }
}
