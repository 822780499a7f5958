//! A NIC that comes and goes is left out until it is quiet.

use crate::Millis;

/// Each loss of a carrier, stall, run of failed kicks or of lost probes costs a point, and points fade. The worst case is bounded: from `max` points to
/// `reuse` it takes log2(max / reuse) half-lives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlapDamping {
    /// Time in which half the points fade, in milliseconds.
    pub half_life_ms: Millis,
    /// Points from which on a NIC is left out.
    pub suppress: f64,
    /// Points below which it may come back.
    pub reuse: f64,
    /// Most points.
    pub max: f64,
}

impl Default for FlapDamping {
    /// The third failure within some seconds leaves a NIC out; at most 20 s after the last one it may come back.
    fn default() -> FlapDamping {
        FlapDamping {
            half_life_ms: 5_000,
            suppress: 2.5,
            reuse: 1.0,
            max: 16.0,
        }
    }
}

/// The points of one NIC.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Points {
    points: f64,
    at: Millis,
    suppressed: bool,
}

impl Points {
    /// The NIC has failed so many times.
    pub(super) fn lose(&mut self, config: &FlapDamping, now: Millis, times: u32) {
        let suppressed = self.is_suppressed(config, now);
        self.points = (self.at(config, now) + f64::from(times)).min(config.max);
        self.at = now;
        self.suppressed = suppressed || self.points >= config.suppress;
    }

    /// Writes down now and then what the points have faded to: the clock wraps, and from half its range on they would seem not to have
    /// faded at all.
    pub(super) fn fade(&mut self, config: &FlapDamping, now: Millis) {
        if crate::table::elapsed_ms(now, self.at) >= config.half_life_ms.max(1) {
            self.suppressed = self.is_suppressed(config, now);
            (self.points, self.at) = (self.at(config, now), now);
        }
    }

    fn at(&self, config: &FlapDamping, now: Millis) -> f64 {
        let elapsed = f64::from(crate::table::elapsed_ms(now, self.at));
        self.points * (-elapsed / f64::from(config.half_life_ms.max(1))).exp2()
    }

    pub(super) fn is_suppressed(&self, config: &FlapDamping, now: Millis) -> bool {
        self.suppressed && self.at(config, now) >= config.reuse
    }

    /// Milliseconds until the NIC may come back.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float converts to the nearest value that fits"
    )]
    pub(super) fn wait_ms(&self, config: &FlapDamping, now: Millis) -> Millis {
        let halvings = (self.at(config, now) / config.reuse.max(f64::MIN_POSITIVE)).log2();
        // One more, so that it is over then and not just about to be.
        (halvings.max(0.0) * f64::from(config.half_life_ms)) as Millis + 1
    }
}
