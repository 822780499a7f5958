//! Moving long-lived heavy sessions, which no choice at their beginning can place right.
//!
//! Workers note sessions that they send; the heavy ones among them are watched, so that their rates are exact. Once a
//! second, if the NICs' loads differ by enough to matter, the sessions that fit the difference best are asked to move.
//! They do so by themselves when they pause (see `Turn::repin`), or not at all: then the wish is withdrawn, they
//! are left alone for a while, and others are asked.
//!
//! Where that does not do, a NIC carries a heavy session and too many light ones beside it. Light sessions are asked as they
//! are noted, by their rate so far and once in their life, until enough have been.

use std::collections::HashMap;

use crate::key::SessionKey;
use crate::nics::{NicIndex, NicSet, members};
use crate::table::{Hit, Meta, SessionTable, elapsed_ms};
use crate::watch::{AllNotes, WATCHED};
use crate::{MAX_NICS, Millis};

/// Time between two rounds.
const ROUND_MS: Millis = 1_000;
/// Difference of the highest and the lowest load, as a part of the mean, below which nothing is moved.
const MIN_SPREAD: f64 = 0.03;
/// Difference in bytes a second below which nothing is moved: 1 Mb/s.
const MIN_DIFFERENCE: f64 = 125_000.0;
/// Sessions asked to move in a round.
const MAX_MOVES: usize = 64;
/// Light sessions asked to move in a round.
const MAX_LIGHT_MOVES: usize = 512;
/// Rest of a session that has moved.
const COOLDOWN_MS: Millis = 10_000;
/// Rest of a session that did not pause, doubled each time.
const REFUSED_MS: Millis = 2_000;
/// Part of the difference above which moving a session would only turn the difference round.
const MAX_FIT: f64 = 0.9;
/// Part of the mean load below which a session is too light to be watched for long.
const LIGHT: f64 = 1e-4;
/// Shortest pause of a session that is safe to move at, in microseconds.
const MIN_GAP_US: f64 = 500.0;

/// Ticks of the millisecond clock that a session must have paused for before it may move, when the NICs' round trips differ
/// by so many microseconds. Twice the difference, as it is an average; one tick more, as the first may have been
/// just over.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float converts to the nearest value that fits"
)]
pub(crate) fn gap_ms(rtt_spread_us: f64) -> Millis {
    let gap_us = (2.0 * rtt_spread_us).max(MIN_GAP_US);
    ((gap_us / 1000.0).ceil() as Millis).saturating_add(1)
}

/// A session that is watched.
struct Watched {
    number: u16,
    hit: Hit,
    /// Bytes counted up to the last round.
    bytes: u64,
    /// Bytes a second in the last round; 0 before it has seen a whole one.
    rate: f64,
    /// Has been watched for a whole round.
    is_known: bool,
    asked: bool,
    rests_until: Option<Millis>,
    refusals: u32,
}

/// The load of the NICs in one round, in bytes a second.
#[derive(Default, Clone, Copy)]
struct Loads {
    /// What a NIC carries more than its share (less: below 0).
    excess: [f64; MAX_NICS],
    /// A NIC's share of the whole.
    share: [f64; MAX_NICS],
    mean: f64,
    nics: NicSet,
}

/// What the control thread keeps from round to round.
pub(crate) struct Rebalancer {
    watched: HashMap<SessionKey, Watched>,
    free: Vec<u16>,
    /// Light sessions that were asked in this round.
    light: Vec<SessionKey>,
    /// What the heavy ones will leave to be evened out.
    rest: Option<Loads>,
    round: Option<Millis>,
    sent: [u64; MAX_NICS],
}

impl Rebalancer {
    pub(crate) fn new() -> Rebalancer {
        let numbers = 1..u16::try_from(WATCHED).unwrap_or(1);
        Rebalancer {
            watched: HashMap::new(),
            free: numbers.rev().collect(),
            light: Vec::new(),
            rest: None,
            round: None,
            sent: [0; MAX_NICS],
        }
    }

    /// Looks at what workers noted; once a second, asks sessions to move. `sent`: bytes by each NIC so far. `capacities`:
    /// what each can carry; only NICs in `nics` give or take.
    pub(crate) fn tick(
        &mut self,
        table: &SessionTable,
        notes: &AllNotes,
        now: Millis,
        nics: NicSet,
        sent: &[u64; MAX_NICS],
        capacities: &[f64; MAX_NICS],
    ) {
        for place in notes.take_samples() {
            let Some((key, hit)) = table.at(place).filter(|(key, _)| !key.is_fragment()) else {
                continue;
            };
            if !self.watch(table, notes, key, hit) {
                self.ask_light(table, now, key, hit);
            }
        }
        let elapsed = self.round.map(|round| now.wrapping_sub(round));
        if elapsed.is_some_and(|elapsed| elapsed < ROUND_MS) {
            return;
        }
        self.round = Some(now);
        let before = std::mem::replace(&mut self.sent, *sent);
        let Some(elapsed) = elapsed else { return };
        let seconds = f64::from(elapsed) / 1000.0;
        let rates: [f64; MAX_NICS] =
            std::array::from_fn(|nic| sent[nic].wrapping_sub(before[nic]) as f64 / seconds);
        let loads = Loads::new(nics, &rates, capacities);
        self.refresh(table, notes, now, seconds, loads.mean);
        self.withdraw_light(table);
        let (moves, rest) = self.plan(now, loads);
        self.rest = rest;
        for (key, target) in moves {
            if let Some(watched) = self.watched.get_mut(&key) {
                let asked = watched.hit.meta.with_target(Some(target));
                if let Ok(meta) = table.replace(&watched.hit, asked) {
                    (watched.hit.meta, watched.asked) = (meta, true);
                }
            }
        }
    }

    /// Withdraws every wish and forgets every session: another algorithm is in force.
    pub(crate) fn stop(&mut self, table: &SessionTable) {
        let keys: Vec<_> = self.watched.keys().copied().collect();
        keys.iter().for_each(|key| self.forget(table, key));
        self.withdraw_light(table);
        (self.round, self.rest) = (None, None);
    }

    /// Asks a session that is not watched to move, if its NIC has more than its share.
    fn ask_light(&mut self, table: &SessionTable, now: Millis, key: SessionKey, hit: Hit) {
        let from = hit.meta.nic();
        let Some(rest) = &mut self.rest else { return };
        let Some((_, to, _)) = rest.extremes() else { return };
        let (from_at, to_at) = (usize::from(from), usize::from(to));
        let has_more = rest.excess[from_at] > rest.mean * MIN_SPREAD / 8.0;
        let is_asked = hit.meta.has_moved() || hit.meta.target().is_some();
        if !has_more || is_asked || self.light.len() >= MAX_LIGHT_MOVES || self.watched.contains_key(&key) {
            return;
        }
        let Some(entry) = table.read(&hit) else { return };
        let age_ms = elapsed_ms(now, entry.created).max(1_000);
        let rate = entry.bytes as f64 * 1000.0 / f64::from(age_ms);
        if rate > rest.excess[from_at] {
            return;
        }
        if mark(table, hit, |meta| meta.with_target(Some(to))).is_some() {
            rest.excess[from_at] -= rate;
            rest.excess[to_at] += rate;
            self.light.push(key);
        }
    }

    /// Takes back what light sessions were asked and have not done.
    fn withdraw_light(&mut self, table: &SessionTable) {
        for key in std::mem::take(&mut self.light) {
            if let Some(hit) = table.lookup(&key).hit.filter(|hit| hit.meta.target().is_some()) {
                // Only the session itself could be faster, by moving.
                let _ = mark(table, hit, |meta| meta.with_target(None));
            }
        }
    }

    /// Begins to count the bytes of a session that was noted; `false`: every number is taken.
    fn watch(&mut self, table: &SessionTable, notes: &AllNotes, key: SessionKey, hit: Hit) -> bool {
        if self.watched.contains_key(&key) {
            return true;
        }
        let Some(number) = self.free.pop() else {
            return false;
        };
        let Some(hit) = mark(table, hit, |meta| meta.with_watch(number)) else {
            self.free.push(number);
            return true;
        };
        let watched = Watched {
            number,
            hit,
            bytes: notes.bytes(number),
            rate: 0.0,
            is_known: false,
            asked: false,
            rests_until: None,
            refusals: 0,
        };
        self.watched.insert(key, watched);
        true
    }

    /// Reads the rates, takes note of who moved and withdraws wishes that were not fulfilled; lets go of light sessions.
    fn refresh(&mut self, table: &SessionTable, notes: &AllNotes, now: Millis, seconds: f64, mean: f64) {
        let mut gone = Vec::new();
        for (key, watched) in &mut self.watched {
            let bytes = notes.bytes(watched.number);
            let before = std::mem::replace(&mut watched.bytes, bytes);
            // One that was noted in the middle of a round has shown too little of itself.
            let is_new = !std::mem::replace(&mut watched.is_known, true);
            watched.rate = if is_new {
                0.0
            } else {
                bytes.wrapping_sub(before) as f64 / seconds
            };
            let Some(hit) = table.lookup(key).hit else {
                gone.push(*key);
                continue;
            };
            // Its entry may have moved, or have been made anew and lost its number.
            let number = watched.number;
            let wished = hit.meta.target().is_some();
            let Some(hit) = mark(table, hit, |meta| meta.with_watch(number).with_target(None)) else {
                gone.push(*key);
                continue;
            };
            watched.hit = hit;
            if std::mem::take(&mut watched.asked) {
                let rest = if wished {
                    watched.refusals = (watched.refusals + 1).min(6);
                    REFUSED_MS << watched.refusals
                } else {
                    watched.refusals = 0;
                    COOLDOWN_MS
                };
                watched.rests_until = Some(now.wrapping_add(rest));
            } else if watched.rests_until.is_some_and(|until| is_over(now, until)) {
                watched.rests_until = None;
            }
            if !is_new && watched.rate < mean * LIGHT && watched.rests_until.is_none() {
                gone.push(*key);
            }
        }
        gone.iter().for_each(|key| self.forget(table, key));
        self.make_room(table);
    }

    /// With all numbers taken, the lighter half makes way for what else there may be.
    fn make_room(&mut self, table: &SessionTable) {
        if self.free.len() >= WATCHED / 8 {
            return;
        }
        let mut rates: Vec<_> = self.watched.iter().map(|(key, one)| (one.rate, *key)).collect();
        rates.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.words().cmp(&b.1.words())));
        for (_, key) in rates.iter().take(WATCHED / 4) {
            self.forget(table, key);
        }
    }

    fn forget(&mut self, table: &SessionTable, key: &SessionKey) {
        let Some(watched) = self.watched.remove(key) else {
            return;
        };
        let is_unmarked = match table.lookup(key).hit {
            Some(hit) if hit.meta.watch() == watched.number => {
                mark(table, hit, |meta| meta.with_watch(0).with_target(None)).is_some()
            }
            _ => true,
        };
        if is_unmarked {
            self.free.push(watched.number);
        } else {
            // It is still counted under this number, so nobody else may have it: it stays watched.
            self.watched.insert(*key, watched);
        }
    }

    /// Which heavy sessions should move where, and what is left to even out then. Each move takes the session that
    /// fits best half of the greatest difference.
    fn plan(&self, now: Millis, mut loads: Loads) -> (Vec<(SessionKey, NicIndex)>, Option<Loads>) {
        let mut moves = Vec::new();
        if !loads.differ(MIN_SPREAD) {
            return (moves, None);
        }
        let rests = |one: &Watched| one.rests_until.is_some_and(|until| !is_over(now, until));
        let mut movable: Vec<_> = self
            .watched
            .iter()
            .filter(|(_, one)| one.rate > 0.0 && !rests(one))
            .map(|(key, one)| (*key, one.hit.meta.nic(), one.rate))
            .collect();
        // The order of a hash map is another one each time.
        movable.sort_by(|a, b| b.2.total_cmp(&a.2).then_with(|| a.0.words().cmp(&b.0.words())));
        // Asking for more than is needed to halve the least difference would only disturb.
        while moves.len() < MAX_MOVES && loads.differ(MIN_SPREAD / 4.0) {
            let Some((from, to, difference)) = loads.extremes() else {
                break;
            };
            let misfit = |rate: f64| (rate - difference / 2.0).abs();
            let fits = |&(_, &(_, nic, rate)): &(usize, &(SessionKey, NicIndex, f64))| {
                nic == from && rate < difference * MAX_FIT
            };
            let best = movable
                .iter()
                .enumerate()
                .filter(fits)
                .min_by(|(_, a), (_, b)| misfit(a.2).total_cmp(&misfit(b.2)))
                .map(|(at, _)| at);
            let Some(at) = best else { break };
            let (key, _, rate) = movable.remove(at);
            loads.excess[usize::from(from)] -= rate;
            loads.excess[usize::from(to)] += rate;
            moves.push((key, to));
        }
        (moves, Some(loads))
    }
}

impl Loads {
    fn new(nics: NicSet, rates: &[f64; MAX_NICS], capacities: &[f64; MAX_NICS]) -> Loads {
        let sum = |of: &[f64; MAX_NICS]| members(nics).map(|nic| of[usize::from(nic)]).sum::<f64>();
        let (total, capacity) = (sum(rates), sum(capacities));
        let mut loads = Loads {
            nics,
            mean: total / f64::from(nics.count_ones().max(1)),
            ..Loads::default()
        };
        for nic in members(nics).map(usize::from) {
            loads.share[nic] = total * capacities[nic] / capacity.max(1.0);
            loads.excess[nic] = rates[nic] - loads.share[nic];
        }
        loads
    }

    /// The NIC with the most and the one with the least for its share, and what lies between them.
    fn extremes(&self) -> Option<(NicIndex, NicIndex, f64)> {
        let by_excess = |a: &NicIndex, b: &NicIndex| {
            self.excess[usize::from(*a)].total_cmp(&self.excess[usize::from(*b)])
        };
        let (most, least) = (
            members(self.nics).max_by(by_excess)?,
            members(self.nics).min_by(by_excess)?,
        );
        Some((
            most,
            least,
            self.excess[usize::from(most)] - self.excess[usize::from(least)],
        ))
    }

    /// Whether loads differ by that part of the mean, and by enough to matter at all.
    fn differ(&self, spread: f64) -> bool {
        self.extremes().is_some_and(|(_, _, difference)| {
            difference >= MIN_DIFFERENCE && difference >= spread * self.mean
        })
    }
}

/// Changes an entry's state, which workers change too.
fn mark(table: &SessionTable, mut hit: Hit, change: impl Fn(Meta) -> Meta) -> Option<Hit> {
    for _ in 0..4 {
        match table.replace(&hit, change(hit.meta)) {
            Ok(meta) => {
                hit.meta = meta;
                return Some(hit);
            }
            Err(Some(meta)) => hit.meta = meta,
            Err(None) => return None,
        }
    }
    None
}

fn is_over(now: Millis, until: Millis) -> bool {
    until == now || elapsed_ms(now, until) > 0
}
