//! What one burst does to the sessions.

use std::sync::atomic::Ordering::Relaxed;

use super::{Balancer, Observed, is_alive};
use crate::Millis;
use crate::counters::Counters;
use crate::nics::NicIndex;
use crate::parse::{Class, Parsed};
use crate::state::{Progress, Timer, may_open};
use crate::table::{BATCH, Hit, Insertion, Lookup, Meta, SessionTable};

/// Tries to change a state that other workers change too, before leaving it to them.
const STATE_RETRIES: usize = 4;

/// One burst: its clock, the NICs alive at its start, and whose counters it uses.
pub(super) struct Turn<'a> {
    pub balancer: &'a Balancer,
    pub counters: &'a Counters,
    pub alive: u32,
    pub now: Millis,
}

/// Frames in a row of one session, charged to it at once.
#[derive(Default)]
struct Run {
    hit: Option<Hit>,
    frames: u32,
    bytes: u64,
}

impl Run {
    #[inline]
    fn add(&mut self, table: &SessionTable, now: Millis, hit: Hit, frame_len: u32) {
        if !self.hit.is_some_and(|last| SessionTable::same_entry(&last, &hit)) {
            self.charge(table, now);
            self.hit = Some(hit);
        }
        self.frames += 1;
        self.bytes += u64::from(frame_len);
    }

    #[inline]
    fn charge(&mut self, table: &SessionTable, now: Millis) {
        if let Some(hit) = self.hit.take() {
            table.refresh(&hit, now, self.frames, self.bytes);
        }
        (self.frames, self.bytes) = (0, 0);
    }
}

impl Turn<'_> {
    /// At most [`BATCH`] frames from guests; `out` is as long as `burst`.
    pub(super) fn steer(&self, burst: &[Observed], out: &mut [Option<NicIndex>]) {
        let mut lookups = [Lookup::NONE; BATCH];
        self.look_up(burst, &mut lookups);
        let mut run = Run::default();
        for ((frame, lookup), out) in burst.iter().zip(&lookups).zip(out) {
            *out = match self.settled(frame, lookup) {
                Some(hit) if is_alive(self.alive, hit.meta.nic()) => {
                    run.add(&self.balancer.table, self.now, *hit, frame.frame_len);
                    Some(hit.meta.nic())
                }
                _ => self.steer_one(frame, lookup, &mut run),
            };
        }
        run.charge(&self.balancer.table, self.now);
    }

    /// At most [`BATCH`] frames from NICs.
    pub(super) fn observe(&self, burst: &[Observed]) {
        let mut lookups = [Lookup::NONE; BATCH];
        self.look_up(burst, &mut lookups);
        let mut run = Run::default();
        for (frame, lookup) in burst.iter().zip(&lookups) {
            match self.settled(frame, lookup) {
                Some(hit) => run.add(&self.balancer.table, self.now, *hit, frame.frame_len),
                None => self.observe_one(frame, lookup, &mut run),
            }
        }
        run.charge(&self.balancer.table, self.now);
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
            None => {
                let balancer = self.balancer;
                let key = frame.parsed.key();
                let nic = balancer.choose(key, self.alive);
                let nic = nic.or_else(|| balancer.slots.primary(balancer.slots.slot(key)));
                nic.and_then(|nic| self.open(&frame.parsed, lookup.hash, nic))
            }
        };
        if let Some(hit) = hit {
            run.add(&self.balancer.table, self.now, hit, frame.frame_len);
        }
    }

    /// An entry with this state has timed out.
    pub(super) fn expired(&self, meta: Meta) {
        if meta.progress().timer != Timer::Fragment {
            self.counters.expired.fetch_add(1, Relaxed);
            self.counters.unpin(meta.nic());
        }
    }

    /// Looks all keys up. Some classes have none in the table; what is found by chance is not looked at.
    #[inline]
    fn look_up(&self, burst: &[Observed], lookups: &mut [Lookup; BATCH]) {
        self.balancer
            .table
            .lookup_batch(burst, |frame| frame.parsed.key(), lookups);
    }

    fn session_nic(&self, frame: &Observed, lookup: &Lookup, run: &mut Run) -> Option<NicIndex> {
        let parsed = &frame.parsed;
        let hit = match lookup.hit {
            Some(hit) => self.advance(hit, parsed),
            None => {
                let nic = self.balancer.choose(parsed.key(), self.alive)?;
                match self.open(parsed, lookup.hash, nic) {
                    Some(hit) => hit,
                    // Without an entry the frame still goes out, and never by another NIC than the next one.
                    None => return Some(nic),
                }
            }
        };
        run.add(&self.balancer.table, self.now, hit, frame.frame_len);
        self.pin(hit, parsed)
    }

    /// The NIC of a session, moved to the slot's first alive fallback if its own is dead. While no NIC is alive the
    /// pin stays.
    fn pin(&self, mut hit: Hit, parsed: &Parsed) -> Option<NicIndex> {
        if let Some(nic) = self.pinned(Some(hit)) {
            return Some(nic);
        }
        let heir = self.by_slot(parsed)?;
        for _ in 0..STATE_RETRIES {
            let dead = hit.meta.nic();
            match self.balancer.table.replace(&hit, hit.meta.with_nic(heir)) {
                Ok(_) => {
                    self.counters.unpin(dead);
                    self.counters.pin(heir);
                    self.counters.repinned.fetch_add(1, Relaxed);
                    break;
                }
                Err(Some(meta)) => hit.meta = meta,
                Err(None) => break,
            }
            if let Some(nic) = self.pinned(Some(hit)) {
                return Some(nic);
            }
        }
        Some(heir)
    }

    fn pinned(&self, hit: Option<Hit>) -> Option<NicIndex> {
        hit.map(|hit| hit.meta.nic())
            .filter(|&nic| is_alive(self.alive, nic))
    }

    fn by_slot(&self, parsed: &Parsed) -> Option<NicIndex> {
        let slots = &self.balancer.slots;
        slots.choose(slots.slot(parsed.key()), self.alive)
    }

    /// Makes the session of a frame that has none, unless another worker does so first.
    fn open(&self, parsed: &Parsed, hash: u64, nic: NicIndex) -> Option<Hit> {
        let protocol = parsed.key().protocol();
        if !may_open(protocol, parsed.tcp_flags()) {
            // It may have been made since the lookup, by an earlier frame of this burst.
            let hit = self.balancer.table.lookup(parsed.key()).hit?;
            return Some(self.advance(hit, parsed));
        }
        let meta = Meta::new(
            nic,
            self.now,
            Progress::first(protocol, parsed.tcp_flags(), parsed.direction()),
        );
        match self.insert(parsed.key(), hash, meta)? {
            Insertion::New(hit) => {
                self.counters.created.fetch_add(1, Relaxed);
                self.counters.pin(nic);
                Some(hit)
            }
            Insertion::Existing(hit) => Some(self.advance(hit, parsed)),
            Insertion::Full => None,
        }
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
                    let nic = self
                        .balancer
                        .choose(parsed.key(), self.alive)
                        .unwrap_or(hit.meta.nic());
                    Meta::new(
                        nic,
                        self.now,
                        Progress::first(parsed.key().protocol(), flags, direction),
                    )
                },
                |progress| hit.meta.with_progress(progress),
            );
            match self.balancer.table.replace(&hit, next) {
                Ok(meta) => {
                    if after.is_none() {
                        self.balancer.table.clear_counters(&hit);
                        self.counters.created.fetch_add(1, Relaxed);
                        self.counters.unpin(hit.meta.nic());
                        self.counters.pin(meta.nic());
                    }
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
            self.now,
            Progress {
                timer: Timer::Fragment,
                spoke: 0,
                closed: 0,
            },
        );
        let hit = match lookup.hit {
            Some(hit) => hit,
            None => match self.insert(&key, lookup.hash, meta) {
                Some(Insertion::Existing(hit)) => hit,
                _ => return,
            },
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
        if matches!(insertion, Insertion::Full) {
            self.counters.table_full.fetch_add(1, Relaxed);
            return None;
        }
        Some(insertion)
    }
}
