//! A limit on log lines that somebody outside can cause.

use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 32;
/// Another one may come after this long.
const REFILL: Duration = Duration::from_secs(2);

/// A token bucket: a guest or front-end that misbehaves without end does not fill the log.
#[derive(Debug)]
pub(super) struct LogBudget {
    lines: u32,
    refilled: Instant,
    withheld: u64,
}

impl LogBudget {
    pub(super) fn new(now: Instant) -> LogBudget {
        LogBudget {
            lines: BURST,
            refilled: now,
            withheld: 0,
        }
    }

    /// `None`: no line now. Otherwise how many were withheld since the last one, if any were.
    pub(super) fn take(&mut self, now: Instant) -> Option<Option<u64>> {
        let refills = now.duration_since(self.refilled).as_millis() / REFILL.as_millis();
        if let Ok(refills) = u32::try_from(refills)
            && let Some(passed) = REFILL.checked_mul(refills)
        {
            self.lines = self.lines.saturating_add(refills).min(BURST);
            self.refilled += passed;
        }
        if self.lines == 0 {
            self.withheld += 1;
            return None;
        }
        self.lines -= 1;
        Some(Some(std::mem::take(&mut self.withheld)).filter(|count| *count > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted_and_time_brings_lines_back() {
        let start = Instant::now();
        let mut budget = LogBudget::new(start);
        for _ in 0..BURST {
            assert_eq!(budget.take(start), Some(None));
        }
        for _ in 0..1000 {
            assert_eq!(budget.take(start), None);
        }
        assert_eq!(budget.take(start + REFILL), Some(Some(1000)));
        assert_eq!(budget.take(start + REFILL), None);
        // A long silence fills the bucket and no more.
        let later = start + 1000 * REFILL;
        assert_eq!(budget.take(later), Some(Some(1)));
        for _ in 1..BURST {
            assert_eq!(budget.take(later), Some(None));
        }
        assert_eq!(budget.take(later), None);
    }
}
