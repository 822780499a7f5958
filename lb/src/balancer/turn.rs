//! What one burst does to the sessions.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use arc_swap::Guard;

use super::admission::Refusal;
use super::{Balancer, Observed, is_alive};
use crate::Millis;
use crate::counters::Counters;
use crate::nics::NicIndex;
use crate::parse::{Class, Parsed};
use crate::plan::Plan;
use crate::policy::Loads;
use crate::state::{Progress, Timer, may_open};
use crate::table::{BATCH, Hit, Insertion, Lookup, Meta, SessionTable};
use crate::watch::Notes;

/// Tries to change a state that other workers change too, before leaving it to them.
const STATE_RETRIES: usize = 4;

/// One burst: its clock, the NICs alive at its start, and whose counters it uses.
pub(super) struct Turn<'a> {
    pub balancer: &'a Balancer,
    pub counters: &'a Counters,
    pub alive: u32,
    pub now: Millis,
    pub micros: u32,
    /// Where this worker notes what it sends, while `adaptive` is in force.
    pub notes: Option<&'a Notes>,
    /// Loaded when a frame needs it: a burst of known sessions does not.
    pub plan: OnceCell<Guard<Arc<Plan>>>,
    /// Sessions of the NICs, summed when the first new session needs them.
    pub loads: RefCell<Option<Loads>>,
}

/// Frames in a row of one session, charged to it at once.
#[derive(Default)]
struct Run {
    /// Whose they are, if there are any.
    hit: Hit,
    frames: u32,
    bytes: u64,
}

impl Run {
    #[inline]
    fn add(&mut self, table: &SessionTable, now: Millis, hit: &Hit, frame_len: u32) {
        if !SessionTable::same_entry(&self.hit, hit) {
            self.charge(table, now);
            *self = Run {
                hit: *hit,
                ..Run::default()
            };
        }
        self.frames += 1;
        self.bytes += u64::from(frame_len);
    }

    #[inline]
    fn charge(&self, table: &SessionTable, now: Millis) {
        if self.frames > 0 {
            table.refresh(&self.hit, now, self.frames, self.bytes);
        }
    }
}

impl Turn<'_> {
    /// At most [`BATCH`] frames from guests; `out` is as long as `burst`.
    pub(super) fn steer(&self, burst: &[Observed], out: &mut [Option<NicIndex>]) {
        let mut lookups = [Lookup::NONE; BATCH];
        self.look_up(burst, &mut lookups);
        let mut run = Run::default();
        for ((frame, lookup), out) in burst.iter().zip(&lookups).zip(out.iter_mut()) {
            *out = match self.settled(frame, lookup) {
                Some(hit) if is_alive(self.alive, hit.meta.pin()) => {
                    run.add(&self.balancer.table, self.now, hit, frame.frame_len);
                    Some(hit.meta.pin())
                }
                _ => self.steer_one(frame, lookup, &mut run),
            };
        }
        run.charge(&self.balancer.table, self.now);
        if let Some(notes) = self.notes {
            self.note_sent(notes, burst, &lookups, out);
        }
    }

    /// At most [`BATCH`] frames from NICs.
    pub(super) fn observe(&self, burst: &[Observed]) {
        let mut lookups = [Lookup::NONE; BATCH];
        self.look_up(burst, &mut lookups);
        let mut run = Run::default();
        for (frame, lookup) in burst.iter().zip(&lookups) {
            match self.settled(frame, lookup) {
                Some(hit) => run.add(&self.balancer.table, self.now, hit, frame.frame_len),
                None => self.observe_one(frame, lookup, &mut run),
            }
        }
        run.charge(&self.balancer.table, self.now);
        if self.notes.is_some() {
            self.note_received(burst, &lookups);
        }
    }

    /// The session of a frame that changes nothing about it: nearly every frame's.
    #[inline]
    fn settled<'l>(&self, frame: &Observed, lookup: &'l Lookup) -> Option<&'l Hit> {
        let parsed = &frame.parsed;
        lookup.hit.as_ref().filter(|hit| {
            parsed.class() == Class::Session && hit.meta.is_settled(parsed.tcp_flags(), parsed.direction())
        })
    }

    #[inline(never)]
    fn steer_one(&self, frame: &Observed, lookup: &Lookup, run: &mut Run) -> Option<NicIndex> {
        let parsed = &frame.parsed;
        match parsed.class() {
            Class::Session => self.session_nic(frame, lookup, run),
            Class::FirstFragment => {
                let nic = self.session_nic(frame, lookup, run);
                if let Some(nic) = nic {
                    self.lead_fragments(parsed, nic);
                }
                nic
            }
            Class::LaterFragment => self.follow_fragment(parsed),
            Class::IcmpError => self.pinned(lookup.hit).or_else(|| self.by_slot(parsed)),
            Class::NonSession | Class::Malformed => self.by_slot(parsed),
        }
    }

    #[inline(never)]
    fn observe_one(&self, frame: &Observed, lookup: &Lookup, run: &mut Run) {
        if !matches!(frame.parsed.class(), Class::Session | Class::FirstFragment) {
            return;
        }
        let hit = match lookup.hit {
            Some(hit) => Some(self.advance(hit, &frame.parsed)),
            None => self.open(&frame.parsed, lookup.hash, || {
                let slots = &self.plan().slots;
                self.choose(&frame.parsed)
                    .or_else(|| slots.primary(slots.slot(frame.parsed.key())))
            }),
        };
        if let Some(hit) = hit {
            run.add(&self.balancer.table, self.now, &hit, frame.frame_len);
        }
    }

    /// An entry with this state has timed out.
    pub(super) fn expired(&self, meta: Meta) {
        self.balancer.admission.left(meta.progress().timer);
        if meta.progress().timer != Timer::Fragment {
            self.counters.expired.fetch_add(1, Relaxed);
            self.counters.leave(meta);
        }
    }

    /// Ends all lookups. Some classes have none in the table; what is found by chance is not looked at.
    #[inline]
    fn look_up(&self, burst: &[Observed], lookups: &mut [Lookup; BATCH]) {
        self.balancer.table.finish(burst, |frame| frame.search, lookups);
    }

    fn session_nic(&self, frame: &Observed, lookup: &Lookup, run: &mut Run) -> Option<NicIndex> {
        let parsed = &frame.parsed;
        let hit = match lookup.hit {
            Some(hit) => self.advance(hit, parsed),
            None => match self.open(parsed, lookup.hash, || self.choose(parsed)) {
                Some(hit) => hit,
                // Without an entry the frame still goes out, and never by another NIC than the next one.
                None => return self.by_slot(parsed),
            },
        };
        run.add(&self.balancer.table, self.now, &hit, frame.frame_len);
        self.pin(hit, parsed)
    }

    fn pin(&self, hit: Hit, parsed: &Parsed) -> Option<NicIndex> {
        let pin = hit.meta.pin();
        if is_alive(self.alive, pin) {
            return Some(pin);
        }
        self.repin(hit, parsed)
    }

    /// The NIC of a session whose own is dead, or that is asked to move. From a dead NIC it goes to the slot's first alive
    /// fallback; while no NIC is alive the pin stays. One that is asked to move does so when it has paused for long
    /// enough that this frame cannot overtake the one before.
    #[cold]
    fn repin(&self, mut hit: Hit, parsed: &Parsed) -> Option<NicIndex> {
        let table = &self.balancer.table;
        let gap_ms = self.balancer.move_gap_ms.load(Relaxed);
        for _ in 0..STATE_RETRIES {
            // An earlier frame of the burst may have moved it since the lookup.
            let (meta, paused_ms) = table.now_at(&hit, self.now).unwrap_or((hit.meta, 0));
            hit.meta = meta;
            let (nic, target) = (meta.nic(), meta.target());
            let is_alive = |nic| is_alive(self.alive, nic);
            let heir = match target.filter(|&target| is_alive(target)) {
                Some(target) if is_alive(nic) && paused_ms >= gap_ms => target,
                _ if is_alive(nic) => return Some(nic),
                _ => self.by_slot(parsed)?,
            };
            if let Ok(moved) = table.replace(&hit, meta.with_nic(heir)) {
                self.counters.change(meta, moved);
                let counter = if is_alive(nic) {
                    &self.counters.moved
                } else {
                    &self.counters.repinned
                };
                counter.fetch_add(1, Relaxed);
                return Some(heir);
            }
        }
        self.pinned(Some(hit)).or_else(|| self.by_slot(parsed))
    }

    fn pinned(&self, hit: Option<Hit>) -> Option<NicIndex> {
        hit.map(|hit| hit.meta.nic())
            .filter(|&nic| is_alive(self.alive, nic))
    }

    fn by_slot(&self, parsed: &Parsed) -> Option<NicIndex> {
        let slots = &self.plan().slots;
        slots.choose(slots.slot(parsed.key()), self.alive)
    }

    fn plan(&self) -> &Plan {
        self.plan.get_or_init(|| self.balancer.plan.load())
    }

    /// The policy's NIC for a new session.
    pub(super) fn choose(&self, parsed: &Parsed) -> Option<NicIndex> {
        let plan = self.plan();
        let slot = plan.slots.slot(parsed.key());
        if !plan.algorithm.uses_load() {
            return plan.slots.choose(slot, self.alive);
        }
        let mut loads = self.loads.borrow_mut();
        let loads = loads.get_or_insert_with(|| self.balancer.counters.loads());
        let opening = is_opening(parsed);
        let nic = self
            .balancer
            .choose_for(plan, slot, opening, (self.alive, self.now), loads)?;
        // The counters learn of it too, but are not read again for this burst.
        loads.place(nic, opening);
        Some(nic)
    }

    /// Makes the session of a frame that has none, unless another worker does so first. `None` if there may be none: the frame
    /// does not open one, no NIC is there for it, or a cap or the table is full.
    fn open(&self, parsed: &Parsed, hash: u64, nic: impl FnOnce() -> Option<NicIndex>) -> Option<Hit> {
        let (balancer, flags) = (self.balancer, parsed.tcp_flags());
        let protocol = parsed.key().protocol();
        let progress = Progress::first(protocol, flags, parsed.direction());
        let admitted = if may_open(protocol, flags) {
            balancer.admission.admit(progress.timer, self.now)
        } else {
            Ok(())
        };
        if !may_open(protocol, flags) || admitted.is_err() {
            // It may have been made since the lookup, by an earlier frame of this burst.
            if let Some(hit) = balancer.table.lookup(parsed.key()).hit {
                return Some(self.advance(hit, parsed));
            }
            if let Err(refusal) = admitted {
                self.refused(refusal);
            }
            return None;
        }
        match self.insert(parsed.key(), hash, Meta::new(nic()?, progress))? {
            Insertion::New(hit) => {
                self.counters.created.fetch_add(1, Relaxed);
                self.counters.enter(hit.meta);
                Some(hit)
            }
            Insertion::Existing(hit) => Some(self.advance(hit, parsed)),
            Insertion::Full => None,
        }
    }

    fn refused(&self, refusal: Refusal) {
        let counter = match refusal {
            Refusal::HalfOpen => &self.counters.half_open_full,
            Refusal::OneWay => &self.counters.one_way_full,
            Refusal::NewPerSecond => &self.counters.new_capped,
            Refusal::Fragments => &self.counters.fragments_full,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// Brings a session's state up to date with one more frame. A SYN on a closed session begins another one.
    fn advance(&self, mut hit: Hit, parsed: &Parsed) -> Hit {
        let (flags, direction) = (parsed.tcp_flags(), parsed.direction());
        for _ in 0..STATE_RETRIES {
            let progress = hit.meta.progress();
            let after = progress.after(flags, direction);
            if after == Some(progress) {
                return hit;
            }
            let next = after.map_or_else(
                || {
                    let nic = self.choose(parsed).unwrap_or(hit.meta.nic());
                    Meta::new(nic, Progress::first(parsed.key().protocol(), flags, direction))
                },
                |progress| hit.meta.with_progress(progress),
            );
            match self.balancer.table.replace(&hit, next) {
                Ok(meta) => {
                    if after.is_none() {
                        self.balancer.table.restart(&hit, self.now);
                        self.counters.created.fetch_add(1, Relaxed);
                    }
                    self.counters.change(hit.meta, meta);
                    self.balancer.admission.changed(hit.meta, meta);
                    hit.meta = meta;
                    return hit;
                }
                Err(Some(meta)) => hit.meta = meta,
                Err(None) => return hit,
            }
        }
        hit
    }

    /// Leaves the NIC of a first fragment for the later ones.
    fn lead_fragments(&self, parsed: &Parsed, nic: NicIndex) {
        let key = parsed.fragment_key();
        let lookup = self.balancer.table.lookup(&key);
        let meta = Meta::new(
            nic,
            Progress {
                timer: Timer::Fragment,
                spoke: 0,
                closed: 0,
            },
        );
        let hit = match lookup.hit {
            Some(hit) => hit,
            None => {
                if let Err(refusal) = self.balancer.admission.admit(Timer::Fragment, self.now) {
                    return self.refused(refusal);
                }
                match self.insert(&key, lookup.hash, meta) {
                    Some(Insertion::Existing(hit)) => hit,
                    _ => return,
                }
            }
        };
        // The identification came round again: what counts is the datagram that is under way now.
        let _lost_to_another_worker = self.balancer.table.replace(&hit, meta);
        self.balancer.table.refresh(&hit, self.now, 1, 0);
    }

    fn follow_fragment(&self, parsed: &Parsed) -> Option<NicIndex> {
        let hit = self.balancer.table.lookup(&parsed.fragment_key()).hit;
        match self.pinned(hit) {
            Some(nic) => {
                if let Some(hit) = hit {
                    self.balancer.table.refresh(&hit, self.now, 1, 0);
                }
                Some(nic)
            }
            None => self.by_slot(parsed),
        }
    }

    fn insert(&self, key: &crate::key::SessionKey, hash: u64, meta: Meta) -> Option<Insertion> {
        let insertion = self
            .balancer
            .table
            .insert(key, hash, meta, self.now, &mut |meta| self.expired(meta));
        match insertion {
            Insertion::New(_) => self.balancer.admission.entered(meta.progress().timer),
            Insertion::Existing(_) => {}
            Insertion::Full => {
                self.counters.table_full.fetch_add(1, Relaxed);
                return None;
            }
        }
        Some(insertion)
    }
}

/// Whether a session that begins with this frame is half-open.
fn is_opening(parsed: &Parsed) -> bool {
    let progress = Progress::first(parsed.key().protocol(), parsed.tcp_flags(), parsed.direction());
    progress.timer == Timer::TcpSyn
}
