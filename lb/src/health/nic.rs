//! What is known of one NIC.

use super::flap::Points;
use super::{Cause, Event, HealthConfig, Input};
use crate::Millis;
use crate::nics::NicIndex;
use crate::table::elapsed_ms;

/// How fit a NIC is to carry frames, the fittest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fitness {
    /// Nothing is against it.
    Fit,
    /// Its carrier has yet to last long enough.
    Updelay,
    /// It has failed too often lately.
    Flapping,
    /// It has yet to answer a probe.
    NotProbed,
    /// It has a carrier, but does not work: of use only if nothing else is.
    Suspect(Cause),
    /// It has no carrier.
    Down(Cause),
}

impl Fitness {
    pub(super) const fn is_suspect(self) -> bool {
        matches!(self, Fitness::Suspect(_) | Fitness::Down(_))
    }

    pub(super) const fn cause(self) -> Cause {
        match self {
            Fitness::Fit => Cause::Fit,
            Fitness::Updelay => Cause::Updelay,
            Fitness::Flapping => Cause::Flapping,
            Fitness::NotProbed => Cause::NotProbed,
            Fitness::Suspect(cause) | Fitness::Down(cause) => cause,
        }
    }
}

/// Kicks within this time are counted together.
const KICK_WINDOW_MS: Millis = 1_000;

/// Whether failed kicks that are counted since then belong to those of now.
fn is_recent((_, since): (u32, Millis), now: Millis) -> bool {
    elapsed_ms(now, since) < KICK_WINDOW_MS
}

#[derive(Debug, Default)]
pub(super) struct NicHealth {
    pub alive: bool,
    pub since: Option<(Cause, Millis)>,
    pub losses: u32,
    /// The carrier was lost and came back since the last look.
    pub flapped: bool,
    link_down: bool,
    carrier: Option<bool>,
    down_count: Option<u32>,
    /// When the carrier came, or a fault was over; `None`: it was there at the first look, or that is longer ago than the updelay.
    up_since: Option<Millis>,
    flap: Points,
    /// The last stall or failed kick, while it is held against the NIC.
    fault: Option<(Cause, Millis)>,
    /// Failed kicks of the last second, and since when they are counted.
    kicks: Option<(u32, Millis)>,
    probing: bool,
    answered: bool,
    /// In a row.
    lost_probes: u32,
    /// So many were lost while others were answered: a point, if they are answered again.
    blamed: bool,
}

impl NicHealth {
    /// An interface that is back, with what is known of the one that went.
    pub(super) fn returned(before: Option<NicHealth>, now: Millis, probed: bool) -> NicHealth {
        let before = before.unwrap_or_default();
        NicHealth {
            alive: before.alive,
            since: before.since,
            losses: before.losses,
            flap: before.flap,
            // Its carrier may be there at the first look and has not lasted all the same.
            up_since: Some(now),
            probing: probed,
            ..NicHealth::default()
        }
    }

    pub(super) fn input(&mut self, config: &HealthConfig, now: Millis, input: Input) {
        match input {
            Input::Carrier { up, down_count } => self.carrier(config, now, up, down_count),
            Input::Link { up } => {
                if self.link_down && up {
                    self.up_since = Some(now);
                }
                self.link_down = !up;
                if !up {
                    self.restart();
                }
            }
            Input::TxWaiting { for_ms, paused } => {
                let limit = config.stall_ms.saturating_mul(if paused { 10 } else { 1 });
                if for_ms >= limit.max(1) {
                    self.blame(config, now, Cause::TxStalled { for_ms });
                } else if for_ms == 0 && matches!(self.fault, Some((Cause::TxStalled { .. }, _))) {
                    self.fault = None;
                    self.up_since = Some(now);
                }
            }
            Input::KickFailed { errno, count } => {
                let (before, since) = self
                    .kicks
                    .filter(|&kicks| is_recent(kicks, now))
                    .unwrap_or((0, now));
                let kicks = before.saturating_add(count);
                self.kicks = Some((kicks, since));
                // ENXIO, ENODEV, ENETDOWN: there is nothing to wait for.
                if matches!(errno, 6 | 19 | 100) || kicks >= config.kick_errors {
                    self.blame(config, now, Cause::KickFailed { errno });
                }
            }
            Input::Probing { on } => {
                (self.probing, self.answered, self.lost_probes, self.blamed) = (on, false, 0, false);
            }
            Input::ProbeOk => {
                if self.lost_probes >= config.probe_losses.max(1) {
                    // What lies behind it may not forward yet, as with a carrier that came back.
                    self.up_since = Some(now);
                }
                if std::mem::take(&mut self.blamed) {
                    self.flap.lose(&config.flap, now, 1);
                }
                (self.answered, self.lost_probes) = (true, 0);
            }
            Input::ProbeLost => {
                self.lost_probes = self.lost_probes.saturating_add(1);
                self.blamed |= self.lost_probes == config.probe_losses.max(1);
            }
        }
    }

    /// Holds a fault against the NIC. A new one costs a point, but not one of a dead NIC: what it died of has cost one, and what its
    /// rings held then cannot leave.
    fn blame(&mut self, config: &HealthConfig, now: Millis, cause: Cause) {
        if self.alive && self.fault_in_force(config, now).is_none() {
            self.flap.lose(&config.flap, now, 1);
        }
        self.fault = Some((cause, now));
    }

    /// No NIC's probes are answered, so it is the target that is gone.
    pub(super) fn acquit(&mut self) {
        self.blamed = false;
    }

    fn carrier(&mut self, config: &HealthConfig, now: Millis, up: bool, down_count: Option<u32>) {
        let counted = match (self.down_count, down_count) {
            (Some(before), Some(count)) => count.wrapping_sub(before),
            _ => 0,
        };
        self.down_count = down_count.or(self.down_count);
        let was_up = self.carrier.replace(up);
        // A loss that was seen is in the count too, sooner or later: a little more damping does no harm.
        let lost = counted.max(u32::from(was_up == Some(true) && !up));
        if lost > 0 {
            self.losses = self.losses.saturating_add(lost);
            self.flap.lose(&config.flap, now, lost);
            self.restart();
            self.flapped = up && self.alive;
        }
        if up && (was_up == Some(false) || lost > 0) {
            self.up_since = Some(now);
        }
    }

    /// What was known of a NIC that is gone says nothing of the one that comes back.
    fn restart(&mut self) {
        (self.answered, self.lost_probes, self.blamed) = (false, 0, false);
        (self.fault, self.kicks) = (None, None);
    }

    /// Forgets what is over. The clock wraps: what is kept for half its range seems to have happened just now.
    pub(super) fn forget_past(&mut self, config: &HealthConfig, now: Millis) {
        self.fault = self.fault_in_force(config, now);
        self.kicks = self.kicks.filter(|&kicks| is_recent(kicks, now));
        if self.updelay_left(config, now) == 0 {
            self.up_since = None;
        }
        self.flap.fade(&config.flap, now);
    }

    fn fault_in_force(&self, config: &HealthConfig, now: Millis) -> Option<(Cause, Millis)> {
        self.fault
            .filter(|&(_, at)| elapsed_ms(now, at) < config.fault_hold_ms)
    }

    pub(super) fn has_carrier(&self) -> bool {
        !self.link_down && self.carrier == Some(true)
    }

    /// Nothing that is known from probes is against it.
    pub(super) fn answers(&self, config: &HealthConfig) -> bool {
        !self.probing || self.answered && self.lost_probes < config.probe_losses.max(1)
    }

    /// `heed`: probes count.
    pub(super) fn fitness(&self, config: &HealthConfig, heed: bool, now: Millis) -> Fitness {
        let unanswered = heed && !self.answers(config);
        let fault = self.fault_in_force(config, now);
        match self.carrier {
            _ if self.link_down => Fitness::Down(Cause::LinkDown),
            None => Fitness::Down(Cause::Unknown),
            Some(false) => Fitness::Down(Cause::CarrierLost),
            Some(true) => {
                if let Some((cause, _)) = fault {
                    Fitness::Suspect(cause)
                } else if unanswered && self.lost_probes >= config.probe_losses.max(1) {
                    let count = self.lost_probes;
                    Fitness::Suspect(Cause::ProbesLost { count })
                } else if unanswered {
                    Fitness::NotProbed
                } else if self.flap.is_suppressed(&config.flap, now) {
                    Fitness::Flapping
                } else if self.updelay_left(config, now) > 0 {
                    Fitness::Updelay
                } else {
                    Fitness::Fit
                }
            }
        }
    }

    fn updelay_left(&self, config: &HealthConfig, now: Millis) -> Millis {
        let up_for = self.up_since.map(|since| elapsed_ms(now, since));
        up_for.map_or(0, |up_for| config.updelay_ms.saturating_sub(up_for))
    }

    /// Milliseconds until time alone may make it fit.
    pub(super) fn wait_ms(&self, config: &HealthConfig, heed: bool, now: Millis) -> Option<Millis> {
        match self.fitness(config, heed, now) {
            Fitness::Fit => Some(0),
            Fitness::Updelay => Some(self.updelay_left(config, now)),
            Fitness::Flapping => Some(self.flap.wait_ms(&config.flap, now)),
            Fitness::Suspect(Cause::TxStalled { .. } | Cause::KickFailed { .. }) => {
                let since = self.fault.map_or(0, |(_, at)| elapsed_ms(now, at));
                Some(config.fault_hold_ms.saturating_sub(since))
            }
            _ => None,
        }
    }

    /// Makes it alive or dead, and says so. A blink is told as a loss, and as a return if it is alive all the same.
    pub(super) fn turn(
        &mut self,
        nic: NicIndex,
        alive: bool,
        cause: Cause,
        now: Millis,
        events: &mut Vec<Event>,
    ) {
        let at = now;
        if std::mem::take(&mut self.flapped) && self.alive {
            let cause = Cause::CarrierBlinked;
            events.push(Event {
                nic,
                alive: false,
                cause,
                at,
            });
            (self.alive, self.since) = (false, Some((cause, at)));
            // It waits like any other that comes back; `settle` takes it at once if it is all there is.
            return;
        }
        events.push(Event {
            nic,
            alive,
            cause,
            at,
        });
        (self.alive, self.since) = (alive, Some((cause, at)));
    }
}
