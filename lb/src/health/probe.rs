//! When to send a probe, and what an answer or the lack of one says.
//!
//! One probe is under way at a time. While frames move, and while answers are missing, the next follows soon; else they are rare.
//! How long an answer may take depends on how long answers took lately, so that a slow target is not taken for a dead link.

use super::Input;

/// Time between two probes while frames move, in microseconds.
const PACE_US: u64 = 1_000;
/// The same while none do.
const IDLE_PACE_US: u64 = 100_000;
/// The same once the NIC was given up.
const LOST_PACE_US: u64 = 10_000;
/// Shortest and longest time that an answer is waited for.
const PATIENCE_US: std::ops::RangeInclusive<u64> = 500..=20_000;
/// An answer may take so many times what the slowest took lately.
const SLACK: u64 = 4;
/// Lost in a row, so many are a verdict; every so many-th goes to everybody, as the target may have another address now.
const VERDICT: u32 = 3;

/// Whom a probe is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cast {
    /// The target alone, if its link-layer address is known.
    Target,
    /// Everybody (broadcast, or the target's multicast group).
    Everybody,
}

/// What the last answer says of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// It does what it was asked for.
    Well,
    /// Where it is, which was known: that it is well has yet to be seen.
    Known,
    /// Where it is, and that is new.
    Found,
}

/// What follows from a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    /// To be told to [`super::Health::input`].
    pub verdict: Option<Input>,
    /// An answer came to the probe under way.
    pub answered: bool,
    /// Round trip of the answer that came, in microseconds.
    pub rtt_us: Option<u32>,
    /// A probe to send now.
    pub send: Option<Cast>,
}

/// The probes of one NIC.
#[derive(Debug)]
pub struct Prober {
    /// When the probe under way was sent.
    sent_us: Option<u64>,
    next_us: u64,
    /// Answers counted at the last look.
    answers: u64,
    lost: u32,
    /// Everybody was asked where the target is, and it said so: the next probe is for the target.
    located: bool,
    /// Slowest answer lately, in microseconds.
    peak_us: u64,
}

impl Prober {
    /// Begins; `answers` have been counted before.
    #[must_use]
    pub fn new(answers: u64) -> Prober {
        Prober {
            sent_us: None,
            next_us: 0,
            answers,
            lost: 0,
            located: false,
            // How far the target is, is not known yet.
            peak_us: *PATIENCE_US.end() / SLACK,
        }
    }

    /// Looks at the time and at what was answered. `answers`: how many so far, the last of them at `answered_us` with what it
    /// `says`; both times by one clock, in microseconds. `busy`: frames move.
    pub fn look(&mut self, now_us: u64, answers: u64, answered_us: u64, says: Says, busy: bool) -> Step {
        let mut step = Step::default();
        let came = std::mem::replace(&mut self.answers, answers) != answers;
        match self.sent_us {
            Some(sent) if came => {
                // An answer to an earlier probe, that came before this one left, says as much of the NIC, and nothing of the time.
                if let Some(rtt) = answered_us.checked_sub(sent) {
                    self.took(rtt);
                    // How long the target takes to say where it is, is not what an echo takes.
                    step.rtt_us = u32::try_from(rtt).ok().filter(|_| says == Says::Well);
                }
                self.sent_us = None;
                step.answered = true;
                self.located = says != Says::Well;
                if says != Says::Known {
                    self.lost = 0;
                }
                match says {
                    Says::Well => step.verdict = Some(Input::ProbeOk),
                    Says::Known | Says::Found => self.next_us = now_us,
                }
            }
            Some(sent) if now_us.saturating_sub(sent) >= self.patience_us() => {
                (self.sent_us, self.located) = (None, false);
                self.lost = self.lost.saturating_add(1);
                step.verdict = Some(Input::ProbeLost);
                self.next_us = if self.lost < VERDICT {
                    now_us
                } else {
                    now_us + LOST_PACE_US
                };
            }
            // Too late, and told as lost: be more patient.
            None if came => self.took(self.patience_us()),
            _ => {}
        }
        let soon = now_us + self.pace_us(busy);
        // It may have been planned at the slower pace.
        self.next_us = self.next_us.min(soon);
        if self.sent_us.is_none() && now_us >= self.next_us {
            self.sent_us = Some(now_us);
            self.next_us = soon;
            let everybody = self.lost % VERDICT == VERDICT - 1 && !self.located;
            step.send = Some(if everybody { Cast::Everybody } else { Cast::Target });
        }
        step
    }

    /// The probe of the last look could not be sent (the ring is full, say), which is no fault of the link.
    pub fn unsent(&mut self) {
        self.sent_us = None;
    }

    /// Whether an answer may come.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.sent_us.is_some()
    }

    /// An answer is missing and the next may be, so that looks should be frequent.
    #[must_use]
    pub fn hurries(&self) -> bool {
        (1..VERDICT).contains(&self.lost)
    }

    /// The interface has come back: what was counted before is over.
    pub fn restart(&mut self) {
        (self.sent_us, self.next_us, self.lost) = (None, 0, 0);
        self.located = false;
    }

    fn pace_us(&self, busy: bool) -> u64 {
        match (self.lost, busy) {
            (VERDICT.., _) => LOST_PACE_US,
            (0, false) => IDLE_PACE_US,
            _ => PACE_US,
        }
    }

    fn patience_us(&self) -> u64 {
        (self.peak_us * SLACK).clamp(*PATIENCE_US.start(), *PATIENCE_US.end())
    }

    /// Rises at once, and falls by a 64th with each answer.
    fn took(&mut self, rtt_us: u64) {
        let fallen = self.peak_us - self.peak_us / 64;
        self.peak_us = rtt_us.max(fallen).min(*PATIENCE_US.end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target at a distance, looked for every 250 us.
    struct Lab {
        prober: Prober,
        now: u64,
        /// Answers on their way, and those that arrived.
        coming: Vec<u64>,
        answers: u64,
        answered: u64,
    }

    impl Lab {
        fn new() -> Lab {
            Lab {
                prober: Prober::new(0),
                now: 1_000_000,
                coming: Vec::new(),
                answers: 0,
                answered: 0,
            }
        }

        /// Lets time pass; `distance_us`: round trip, if the target is reached. Returns what was sent and what was concluded.
        fn run(
            &mut self,
            for_us: u64,
            busy: bool,
            distance_us: Option<u64>,
        ) -> (Vec<(u64, Cast)>, Vec<Input>) {
            let (mut sent, mut verdicts) = (Vec::new(), Vec::new());
            let (begin, end) = (self.now, self.now + for_us);
            while self.now < end {
                self.now += 250;
                let now = self.now;
                for at in self.coming.extract_if(.., |at| *at <= now) {
                    (self.answers, self.answered) = (self.answers + 1, at);
                }
                let step = self
                    .prober
                    .look(now, self.answers, self.answered, Says::Well, busy);
                verdicts.extend(step.verdict);
                if let Some(cast) = step.send {
                    sent.push((now - begin, cast));
                    self.coming.extend(distance_us.map(|distance| now + distance));
                }
            }
            (sent, verdicts)
        }
    }

    #[test]
    fn probes_follow_fast_while_frames_move_and_seldom_while_none_do() {
        let mut lab = Lab::new();
        let (sent, verdicts) = lab.run(100_000, true, Some(100));
        assert_eq!((sent.len(), verdicts.len()), (100, 100));
        assert!(verdicts.iter().all(|verdict| *verdict == Input::ProbeOk));
        assert!(sent.iter().all(|(_, cast)| *cast == Cast::Target));
        let (sent, _) = lab.run(1_000_000, false, Some(100));
        assert!((9..=11).contains(&sent.len()), "{}", sent.len());
        let (sent, _) = lab.run(10_000, true, Some(100));
        assert!(sent.len() >= 9, "the pace is taken up at once: {}", sent.len());
    }

    #[test]
    fn a_black_hole_is_found_within_three_milliseconds_and_then_probed_less() {
        let mut lab = Lab::new();
        lab.run(500_000, true, Some(100));
        let (sent, verdicts) = lab.run(3_000, true, None);
        let lost = verdicts.iter().filter(|verdict| **verdict == Input::ProbeLost);
        assert_eq!(lost.count(), 3);
        assert_eq!(sent[2].1, Cast::Everybody, "{sent:?}");
        let (sent, _) = lab.run(100_000, true, None);
        assert!((9..=11).contains(&sent.len()), "{}", sent.len());
        let (_, verdicts) = lab.run(20_000, true, Some(100));
        assert!(verdicts.contains(&Input::ProbeOk));
    }

    #[test]
    fn while_idle_one_loss_is_enough_to_hurry() {
        let mut lab = Lab::new();
        lab.run(500_000, true, Some(100));
        lab.run(300_000, false, Some(100));
        let (sent, verdicts) = lab.run(103_000, false, None);
        assert_eq!(verdicts[..3], [Input::ProbeLost; 3]);
        assert!(sent[2].0 - sent[0].0 <= 2_000, "{sent:?}");
    }

    #[test]
    fn a_slow_target_is_waited_for() {
        let mut lab = Lab::new();
        lab.run(200_000, true, Some(3_000));
        let (_, verdicts) = lab.run(500_000, true, Some(3_000));
        assert!(verdicts.len() > 100);
        assert!(verdicts.iter().all(|verdict| *verdict == Input::ProbeOk));
        // An outlier is no loss either.
        let (_, verdicts) = lab.run(50_000, true, Some(9_000));
        assert!(verdicts.iter().all(|verdict| *verdict == Input::ProbeOk));
    }

    /// A target that answers when everybody is asked where it is, and nothing else; `says`: what that tells.
    fn says_where_it_is(says: Says) -> Vec<Input> {
        let (mut prober, mut answers, mut asked) = (Prober::new(0), 0, None);
        let mut verdicts = Vec::new();
        for now in (0..200_000).step_by(250) {
            if asked.take() == Some(Cast::Everybody) {
                answers += 1;
            }
            let step = prober.look(now, answers, now, says, true);
            assert_eq!(step.rtt_us, None);
            verdicts.extend(step.verdict);
            asked = step.send.or(asked);
        }
        verdicts
    }

    #[test]
    fn to_say_where_it_is_makes_no_target_well() {
        let verdicts = says_where_it_is(Says::Known);
        assert!(verdicts.len() > 3 && verdicts.iter().all(|verdict| *verdict == Input::ProbeLost));
        // At a new address it gets another chance, and no verdict before it has used it.
        let verdicts = says_where_it_is(Says::Found);
        assert!(verdicts.iter().all(|verdict| *verdict == Input::ProbeLost));
    }

    #[test]
    fn a_target_is_asked_itself_as_soon_as_it_was_found() {
        let mut prober = Prober::new(0);
        let mut cast = |now, answers, says| prober.look(now, answers, now, says, true).send;
        assert_eq!(cast(1_000, 0, Says::Well), Some(Cast::Target));
        assert_eq!(cast(1_100, 1, Says::Found), Some(Cast::Target));
        assert_eq!(cast(50_000, 1, Says::Well), Some(Cast::Target), "lost");
        assert_eq!(cast(100_000, 1, Says::Well), Some(Cast::Everybody), "lost again");
        assert_eq!(cast(100_100, 2, Says::Known), Some(Cast::Target));
        let step = prober.look(200_000, 2, 0, Says::Well, true);
        assert_eq!(step.verdict, Some(Input::ProbeLost), "the third");
        assert!(!prober.hurries(), "which is a verdict");
    }

    #[test]
    fn what_could_not_be_sent_is_not_lost() {
        let mut prober = Prober::new(7);
        for now in 1..100 {
            let step = prober.look(now * 1_000, 7, 0, Says::Well, true);
            assert_eq!(step.verdict, None);
            assert_eq!(step.send, Some(Cast::Target));
            prober.unsent();
        }
    }
}
