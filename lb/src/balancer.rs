//! The one face that `dataplane` calls: a burst of parsed frames in, a NIC for each out.

#[cfg(test)]
mod adaptive_tests;
mod admission;
mod burst;
mod control;
mod explain;
#[cfg(test)]
mod flood_tests;
mod note;
#[cfg(test)]
mod run_time_tests;
#[cfg(test)]
mod tests;
mod turn;

use std::cell::{OnceCell, RefCell};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwap, Guard};

use self::admission::Admission;
pub use self::burst::Burst;
use self::control::Control;
pub use self::explain::{Explanation, NicExplained, Reason};
use self::turn::Turn;
use crate::counters::AllCounters;
use crate::in_flight::InFlight;
use crate::key::SessionKey;
use crate::limits::{SessionLimits, Timeouts};
use crate::nics::{AliveSet, NicIndex, NicInfo, NicSet, members};
use crate::parse::Parsed;
use crate::plan::{Plan, Planner};
use crate::policy::{Algorithm, Loads, NewSession, SLOW_START_MS, choose};
use crate::signals::Signals;
use crate::table::{BATCH, Listed, Search, SessionTable, elapsed_ms};
use crate::watch::AllNotes;
use crate::{Clock, MAX_NICS, Millis, rebalance};

/// Buckets that are listed without a pause.
const LISTED_BUCKETS: usize = 4096;

/// How the balancer is set up; fixed at start except where a method says otherwise.
#[derive(Debug, Clone)]
pub struct BalancerConfig {
    /// NICs in the order of their [`NicIndex`].
    pub nics: Vec<NicInfo>,
    /// Places new sessions; [`Balancer::set_policy`] changes it.
    pub algorithm: Algorithm,
    /// Sessions that the table is sized for; its memory (about 80 bytes each) is allocated at once.
    pub session_capacity: usize,
    /// Workers that will call [`Balancer::steer`] and [`Balancer::observe`]. A single one is spared atomic additions.
    pub workers: usize,
    /// When idle sessions are forgotten.
    pub timeouts: Timeouts,
    /// How many sessions may come.
    pub limits: SessionLimits,
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
    /// Timestamp value and echo of a TCP segment, by which `adaptive` measures round trips; zeros if there is none or
    /// nobody asks: see [`Balancer::collect`].
    pub timestamps: [u32; 2],
    /// Its session's lookup, once that has begun: see [`Burst`].
    search: Search,
}

impl Observed {
    /// A frame of `frame_len` bytes that was parsed elsewhere.
    #[must_use]
    pub fn new(parsed: Parsed, frame_len: u32) -> Observed {
        Observed {
            parsed,
            frame_len,
            ..Observed::EMPTY
        }
    }

    const EMPTY: Observed = Observed {
        parsed: Parsed::EMPTY,
        frame_len: 0,
        timestamps: [0; 2],
        search: Search::NONE,
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
    /// Sessions that `adaptive` moved to even out the NICs.
    pub moved: u64,
    /// Frames forwarded without a session because their buckets were full (or held by another worker for long).
    pub table_full: u64,
    /// TCP sessions that have not finished their handshake, now; part of `sessions`.
    pub half_open: u64,
    /// Fragmented datagrams whose NIC is remembered, now; not part of `sessions`.
    pub fragments: u64,
    /// Frames forwarded without a session because of [`SessionLimits::half_open`].
    pub half_open_full: u64,
    /// Frames of TCP in mid-stream forwarded without a session because half the table is sessions of which one end was heard.
    pub one_way_full: u64,
    /// Frames forwarded without a session because of [`SessionLimits::new_per_second`].
    pub new_capped: u64,
    /// First fragments that left no word for the later ones because of [`SessionLimits::fragments`].
    pub fragments_full: u64,
}

/// Chooses NICs for frames and keeps the sessions' pins. Shared by all workers.
pub struct Balancer {
    alive: AliveSet,
    /// NICs that there are, as in the plan: what a burst needs of it that goes to NICs of known sessions only.
    present: AtomicU32,
    /// Whether `adaptive` is in force, so that bursts are measured.
    measuring: AtomicBool,
    /// NICs that have been alive, or could have been: one that is alive now is in slow start, those of the start are not.
    seen: AtomicU32,
    /// NICs in slow start, and since when.
    warming: AtomicU32,
    returned: [AtomicU32; MAX_NICS],
    plan: ArcSwap<Plan>,
    table: SessionTable,
    admission: Admission,
    counters: AllCounters,
    signals: Signals,
    in_flight: InFlight,
    notes: AllNotes,
    /// Ticks of the clock for which a session must have paused before it may move.
    move_gap_ms: AtomicU32,
    /// Whoever changes something holds it; no worker does.
    control: Mutex<Control>,
}

impl Balancer {
    /// Allocates the session table and builds the slot table. NICs beyond [`crate::MAX_NICS`] are left out. No NIC is
    /// alive until health code says so: see [`Balancer::set_alive`].
    #[must_use]
    pub fn new(config: &BalancerConfig) -> Arc<Balancer> {
        let mut planner = Planner::new(config.algorithm, &config.nics, config.hash_key);
        let plan = planner.plan(None);
        let table = SessionTable::new(config.session_capacity, config.workers, &config.timeouts);
        Arc::new(Balancer {
            alive: AliveSet::default(),
            present: AtomicU32::new(plan.present),
            measuring: AtomicBool::new(config.algorithm == Algorithm::Adaptive),
            seen: AtomicU32::new(0),
            warming: AtomicU32::new(0),
            returned: Default::default(),
            plan: ArcSwap::from_pointee(plan),
            admission: Admission::new(&config.limits, table.lanes()),
            table,
            counters: AllCounters::new(),
            signals: Signals::new(),
            in_flight: InFlight::default(),
            notes: AllNotes::new(),
            move_gap_ms: AtomicU32::new(rebalance::gap_ms(0.0)),
            control: Mutex::new(Control::new(planner)),
        })
    }

    /// NICs that are alive and have not been removed.
    pub(crate) fn usable(&self) -> NicSet {
        // `set_alive` has seen the NIC before it set the bit, so this read needs no order of its own.
        self.alive.snapshot() & self.present.load(Relaxed)
    }

    /// Which NICs are alive; every burst reads it. Health code stores to it by [`Balancer::set_alive`].
    #[must_use]
    pub fn alive(&self) -> &AliveSet {
        &self.alive
    }

    /// The addresses that the session table occupies: they should be on huge pages.
    #[must_use]
    pub fn table_addresses(&self) -> [std::ops::Range<usize>; 2] {
        self.table.addresses()
    }

    /// Adds a frame of `frame_len` bytes that begins with `head` to a burst, with all that the balancer needs to know of it, and has
    /// memory fetch its session: nobody need ask for it before the burst is steered or observed.
    #[inline]
    pub fn collect<'b>(&self, burst: &'b mut Burst, head: &[u8], frame_len: u32) -> &'b Parsed {
        let timestamps = self.measuring.load(Relaxed);
        &burst
            .push_searched(&self.table, head, frame_len, timestamps)
            .parsed
    }

    /// Frames from guests, towards NICs: `out[i]` becomes the NIC of `burst[i]`, or `None` when no NIC is alive.
    /// What was in `out` is dropped; it does not allocate once its capacity is that of a burst.
    ///
    /// `now` may be [`Millis`]; only a [`Clock`] with microseconds lets `adaptive` measure latency in passing.
    pub fn steer(
        &self,
        worker: usize,
        now: impl Into<Clock>,
        burst: &mut Burst,
        out: &mut Vec<Option<NicIndex>>,
    ) {
        let now = now.into();
        out.clear();
        out.resize(burst.len(), None);
        let frames = burst.searched(&self.table).chunks(BATCH);
        for (frames, out) in frames.zip(out.chunks_mut(BATCH)) {
            self.turn(worker, now).steer(frames, out);
        }
    }

    /// Frames from NICs, towards guests: creates and refreshes sessions. A new session's NIC is the policy's
    /// choice and not the one that the frame came by, which is the switch's affair; while no NIC is alive it is the
    /// slot's primary.
    pub fn observe(&self, worker: usize, now: impl Into<Clock>, burst: &mut Burst) {
        let now = now.into();
        for frames in burst.searched(&self.table).chunks(BATCH) {
            self.turn(worker, now).observe(frames);
        }
    }

    /// Forgets idle sessions: called by any worker in every turn. Does what is due, within bounds (some ten microseconds), and returns
    /// whether more is due already.
    #[inline]
    pub fn upkeep(&self, now: impl Into<Clock>) -> bool {
        let now = now.into();
        self.table
            .expire(now.millis, &mut |meta| self.turn(0, now).expired(meta))
    }

    /// Up to `limit` sessions, in no particular order, each read when it is asked for: millions need not be in memory twice. `None`
    /// among them is a pause after some thousand buckets, full or empty, for whoever has other things to do. Ages are those of `now`.
    pub fn sessions(
        self: &Arc<Self>,
        now: Millis,
        limit: usize,
    ) -> impl Iterator<Item = Option<SessionInfo>> + Send + use<> {
        let balancer = Arc::clone(self);
        let buckets = (0..).map_while(move |bucket| Some((bucket, balancer.table.entries(bucket)?)));
        let info = move |entry: Listed| SessionInfo {
            key: entry.key,
            nic: entry.meta.nic(),
            age_ms: elapsed_ms(now, entry.created),
            idle_ms: elapsed_ms(now, entry.last_seen),
            frames: entry.frames,
            bytes: entry.bytes,
        };
        let mut left = limit;
        buckets
            .flat_map(move |(bucket, entries)| {
                let sessions = entries.filter(|entry| !entry.key.is_fragment());
                let pause = (bucket % LISTED_BUCKETS == LISTED_BUCKETS - 1).then_some(None);
                sessions.map(move |entry| Some(info(entry))).chain(pause)
            })
            .take_while(move |found| {
                let within = left > 0;
                left -= usize::from(within && found.is_some());
                within
            })
    }

    /// Live sessions pinned to each NIC.
    #[must_use]
    pub fn sessions_per_nic(&self) -> [u64; MAX_NICS] {
        self.counters.loads().sessions
    }

    /// The NIC that broadcast and multicast leave by where any would do: the lowest that is alive and takes new sessions, else
    /// the lowest that is alive. It follows from what is published, so all workers agree.
    #[must_use]
    pub fn designated(&self) -> Option<NicIndex> {
        let (alive, plan) = (self.alive.snapshot(), self.plan.load());
        let takes = |nic: &NicIndex| plan.weights[usize::from(*nic)] != 0;
        members(alive).find(takes).or_else(|| members(alive).next())
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
            moved: self.counters.sum(|set| &set.moved),
            table_full: self.counters.sum(|set| &set.table_full),
            half_open: self.admission.half_open(),
            fragments: self.admission.fragments(),
            half_open_full: self.counters.sum(|set| &set.half_open_full),
            one_way_full: self.counters.sum(|set| &set.one_way_full),
            new_capped: self.counters.sum(|set| &set.new_capped),
            fragments_full: self.counters.sum(|set| &set.fragments_full),
        }
    }

    fn turn(&self, worker: usize, now: Clock) -> Turn<'_> {
        Turn {
            balancer: self,
            counters: self.counters.of(worker),
            alive: self.usable(),
            now: now.millis,
            micros: now.micros,
            notes: self.measuring.load(Relaxed).then(|| self.notes.of(worker)),
            plan: OnceCell::new(),
            loads: RefCell::new(None),
        }
    }

    /// What is decided by now.
    pub(crate) fn plan(&self) -> Guard<Arc<Plan>> {
        self.plan.load()
    }

    /// The choice of the algorithm in force for something new with that slot, when the NICs carry `loads` of its kind.
    /// `opening`: it begins with a SYN.
    pub(crate) fn choose_for(
        &self,
        plan: &Plan,
        slot: u16,
        opening: bool,
        (alive, now): (NicSet, Millis),
        loads: &Loads,
    ) -> Option<NicIndex> {
        let session = NewSession {
            slot,
            slots: &plan.slots,
            alive: alive & plan.present,
            warming: self.warming(now),
            weights: &plan.weights,
            opening,
            loads,
        };
        choose(plan.algorithm, &session, |nic| self.signals.cost(nic))
    }

    /// NICs in slow start.
    fn warming(&self, now: Millis) -> NicSet {
        let since = |nic: NicIndex| elapsed_ms(now, self.returned[usize::from(nic)].load(Relaxed));
        let warming = self.warming.load(Relaxed);
        members(warming)
            .filter(|&nic| since(nic) < SLOW_START_MS)
            .fold(0, |set, nic| set | 1 << nic)
    }
}

const fn is_alive(alive: NicSet, nic: NicIndex) -> bool {
    alive >> (nic % 32) & 1 == 1
}
