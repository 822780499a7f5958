//! What happened to the NICs, for operators: the last events, each with its number and time.

use std::collections::VecDeque;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::control::report::{EventReport, EventsReport};

/// Events kept.
const KEPT: usize = 1024;

/// The last events.
pub(super) struct Journal {
    started: Instant,
    events: VecDeque<EventReport>,
    last: u64,
}

impl Journal {
    /// Empty; times count from `started`.
    pub(super) fn new(started: Instant) -> Journal {
        Journal {
            started,
            events: VecDeque::with_capacity(KEPT),
            last: 0,
        }
    }

    /// Keeps an event of now.
    pub(super) fn note(&mut self, nic: Option<&str>, kind: &str, cause: impl Into<String>) {
        self.note_at(Instant::now(), nic, kind, cause);
    }

    /// Keeps an event.
    pub(super) fn note_at(&mut self, at: Instant, nic: Option<&str>, kind: &str, cause: impl Into<String>) {
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        let unix = SystemTime::now()
            .checked_sub(at.elapsed())
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
            .unwrap_or_default();
        let uptime = at.saturating_duration_since(self.started);
        self.last += 1;
        self.events.push_back(EventReport {
            number: self.last,
            unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
            uptime_us: u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX),
            nic: nic.map(str::to_owned),
            kind: kind.to_owned(),
            cause: cause.into(),
        });
    }

    /// Number of the newest event.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Those with a higher number.
    pub(super) fn after(&self, number: u64) -> EventsReport {
        let newer = self.events.iter().filter(|event| event.number > number);
        EventsReport {
            events: newer.cloned().collect(),
            last: self.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_kept_and_none_is_told_twice() {
        let mut journal = Journal::new(Instant::now());
        assert_eq!(journal.after(0), EventsReport::default());
        for number in 0..KEPT + 10 {
            journal.note(Some("left"), "lost", number.to_string());
        }
        let all = journal.after(0);
        assert_eq!((all.events.len(), all.last), (KEPT, 1034));
        assert_eq!((all.events[0].number, all.events[0].cause.as_str()), (11, "10"));
        assert!(journal.after(all.last).events.is_empty());
        journal.note(None, "algorithm", "hash");
        let new = journal.after(all.last);
        assert_eq!((new.events.len(), new.events[0].number), (1, 1035));
        assert_eq!((new.events[0].nic.as_ref(), journal.last()), (None, 1035));
    }
}
