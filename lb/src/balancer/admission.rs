//! Which frames may make an entry.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI32, AtomicU64};

use crossbeam_utils::CachePadded;

use crate::Millis;
use crate::limits::SessionLimits;
use crate::state::Timer;
use crate::table::Meta;

/// Length of the window in which new sessions are counted.
const WINDOW_MS: Millis = 1000;
/// Tries to count a new session that other workers' new ones get in the way of.
const WINDOW_RETRIES: usize = 4;

/// Why a frame goes without an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    HalfOpen,
    OneWay,
    NewPerSecond,
    Fragments,
}

/// The kinds of entry that are capped, and how many of them there are. Only entries that come, go or change touch it, so the
/// workers can share it.
pub(super) struct Admission {
    max_half_open: i32,
    max_one_way: i32,
    max_fragments: i32,
    new_per_second: u32,
    /// May be below zero for a moment: a worker can see an entry before its maker has counted it.
    half_open: CachePadded<AtomicI32>,
    one_way: CachePadded<AtomicI32>,
    fragments: CachePadded<AtomicI32>,
    /// `start of the window:32 sessions made in it:32`.
    window: CachePadded<AtomicU64>,
}

impl Admission {
    /// `lanes`: entries that the table has room for.
    pub(super) fn new(limits: &SessionLimits, lanes: usize) -> Admission {
        let at_most = |setting: u32, share: usize| {
            let share = i32::try_from(lanes / share).unwrap_or(i32::MAX);
            i32::try_from(setting).unwrap_or(i32::MAX).min(share)
        };
        Admission {
            max_half_open: at_most(limits.half_open, 4),
            max_one_way: at_most(u32::MAX, 2),
            max_fragments: at_most(limits.fragments, 16),
            new_per_second: limits.new_per_second,
            half_open: CachePadded::default(),
            one_way: CachePadded::default(),
            fragments: CachePadded::default(),
            window: CachePadded::default(),
        }
    }

    /// Whether an entry that would begin with this timer may be made now.
    pub(super) fn admit(&self, timer: Timer, now: Millis) -> Result<(), Refusal> {
        match timer {
            Timer::TcpSyn if self.half_open.load(Relaxed) >= self.max_half_open => Err(Refusal::HalfOpen),
            Timer::TcpOneWay if self.one_way.load(Relaxed) >= self.max_one_way => Err(Refusal::OneWay),
            Timer::Fragment if self.fragments.load(Relaxed) >= self.max_fragments => Err(Refusal::Fragments),
            Timer::Fragment => Ok(()),
            _ if self.fits_window(now) => Ok(()),
            _ => Err(Refusal::NewPerSecond),
        }
    }

    fn fits_window(&self, now: Millis) -> bool {
        for _ in 0..WINDOW_RETRIES {
            let window = self.window.load(Relaxed);
            let [s0, s1, s2, s3, c0, c1, c2, c3] = window.to_be_bytes();
            let (start, made) = (
                Millis::from_be_bytes([s0, s1, s2, s3]),
                u32::from_be_bytes([c0, c1, c2, c3]),
            );
            let since = now.wrapping_sub(start);
            // Another worker's clock may be a little ahead.
            let is_past = (WINDOW_MS..=Millis::MAX - WINDOW_MS).contains(&since);
            let (start, made) = if made > 0 && !is_past {
                (start, made)
            } else {
                (now, 0)
            };
            if made >= self.new_per_second {
                return false;
            }
            let next = u64::from(start) << 32 | u64::from(made + 1);
            if self
                .window
                .compare_exchange_weak(window, next, Relaxed, Relaxed)
                .is_ok()
            {
                return true;
            }
        }
        // Not counted: the cap bounds a load and needs no exactness.
        true
    }

    /// An entry was made.
    pub(super) fn entered(&self, timer: Timer) {
        self.count(timer, 1);
    }

    /// An entry has gone.
    pub(super) fn left(&self, timer: Timer) {
        self.count(timer, -1);
    }

    /// An entry's state has changed.
    pub(super) fn changed(&self, from: Meta, to: Meta) {
        let (from, to) = (from.progress().timer, to.progress().timer);
        if from != to {
            self.left(from);
            self.entered(to);
        }
    }

    fn count(&self, timer: Timer, step: i32) {
        match timer {
            Timer::TcpSyn => self.half_open.fetch_add(step, Relaxed),
            Timer::TcpOneWay => self.one_way.fetch_add(step, Relaxed),
            Timer::Fragment => self.fragments.fetch_add(step, Relaxed),
            _ => return,
        };
    }

    /// TCP sessions that have not finished their handshake.
    pub(super) fn half_open(&self) -> u64 {
        u64::try_from(self.half_open.load(Relaxed)).unwrap_or(0)
    }

    /// Fragmented datagrams whose NIC is remembered.
    pub(super) fn fragments(&self) -> u64 {
        u64::try_from(self.fragments.load(Relaxed)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(new_per_second: u32) -> Admission {
        let limits = SessionLimits {
            half_open: 3,
            new_per_second,
            fragments: 2,
        };
        Admission::new(&limits, 1000)
    }

    fn admitted(admission: &Admission, now: Millis, frames: u32) -> usize {
        (0..frames)
            .filter(|_| admission.admit(Timer::UdpOneWay, now).is_ok())
            .count()
    }

    #[test]
    fn new_sessions_are_capped_in_each_second() {
        // Also where the clock wraps, and for a worker whose clock is behind.
        let start = Millis::MAX - 500;
        let admission = admission(10);
        assert_eq!(admitted(&admission, start, 7), 7);
        assert_eq!(admitted(&admission, start.wrapping_add(999), 7), 3);
        assert_eq!(admitted(&admission, start.wrapping_sub(3), 7), 0);
        assert_eq!(admitted(&admission, start.wrapping_add(1000), 17), 10);
        assert_eq!(
            admission.admit(Timer::TcpEstablished, start.wrapping_add(1001)),
            Err(Refusal::NewPerSecond)
        );
    }

    #[test]
    fn half_open_sessions_and_fragments_have_their_own_caps() {
        let admission = admission(1000);
        for (timer, cap, refusal) in [
            (Timer::TcpSyn, 3, Refusal::HalfOpen),
            (Timer::Fragment, 2, Refusal::Fragments),
        ] {
            for _ in 0..cap {
                assert_eq!(admission.admit(timer, 0), Ok(()));
                admission.entered(timer);
            }
            assert_eq!(admission.admit(timer, 0), Err(refusal));
            admission.left(timer);
            assert_eq!(admission.admit(timer, 0), Ok(()));
        }
        assert_eq!((admission.half_open(), admission.fragments()), (2, 1));
        assert_eq!(admission.admit(Timer::UdpOneWay, 0), Ok(()));
    }

    #[test]
    fn no_kind_fills_a_small_table() {
        let admission = Admission::new(&SessionLimits::default(), 64);
        (0..16).for_each(|_| admission.entered(Timer::TcpSyn));
        (0..32).for_each(|_| admission.entered(Timer::TcpOneWay));
        (0..4).for_each(|_| admission.entered(Timer::Fragment));
        assert_eq!(admission.admit(Timer::TcpSyn, 0), Err(Refusal::HalfOpen));
        assert_eq!(admission.admit(Timer::TcpOneWay, 0), Err(Refusal::OneWay));
        assert_eq!(admission.admit(Timer::Fragment, 0), Err(Refusal::Fragments));
    }
}
