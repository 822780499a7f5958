//! One frame at a time: from the moment it is offered until its receiver sees it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use crate::driver::DriverRing;
use crate::port::Port;

/// A frame that does not come is lost.
const LIMIT: Duration = Duration::from_secs(1);
/// Lost frames end the measurement when they are more than one in this many.
const ACCEPTED_LOSS: usize = 100;

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct LatencyPlan {
    /// Frames that are timed.
    pub samples: usize,
    /// Frames before that.
    pub warm_up: usize,
    /// Time between a frame's arrival and the next one.
    pub interval: Duration,
}

/// Nanoseconds, as of a sorted list.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Latency {
    /// Frames timed.
    pub samples: usize,
    /// Frames that did not arrive within a second.
    pub lost: usize,
    /// What reading the clock costs, which each of the figures contains once.
    pub clock_ns: u64,
    /// The fastest.
    pub min_ns: u64,
    /// Half are faster.
    pub p50_ns: u64,
    /// The mean of those between the fastest and the slowest tenth: the steps of the clock are evened out in it, and what happens seldom is not in
    /// it.
    pub middle_ns: f64,
    /// 90 % are faster.
    pub p90_ns: u64,
    /// 99 % are faster.
    pub p99_ns: u64,
    /// 99.9 % are faster.
    pub p999_ns: u64,
    /// The slowest.
    pub max_ns: u64,
    /// How many took from 2^i to 2^(i+1) - 1 ns, for each i.
    pub histogram: Vec<usize>,
}

impl Latency {
    /// Sorts and sums up.
    ///
    /// # Errors
    /// If there is no sample.
    pub fn of(mut samples_ns: Vec<u64>, lost: usize) -> Result<Latency> {
        samples_ns.sort_unstable();
        let (Some(min), Some(max)) = (samples_ns.first(), samples_ns.last()) else {
            bail!("no frame arrived");
        };
        let (min_ns, max_ns) = (*min, *max);
        let at = |per_mille: usize| samples_ns[(samples_ns.len() - 1) * per_mille / 1000];
        let tenth = samples_ns.len() / 10;
        let middle = &samples_ns[tenth..samples_ns.len() - tenth];
        let mut histogram = vec![0; 1 + usize::try_from(max_ns.max(1).ilog2())?];
        for sample in &samples_ns {
            histogram[usize::try_from(sample.max(&1).ilog2())?] += 1;
        }
        Ok(Latency {
            samples: samples_ns.len(),
            lost,
            clock_ns: clock_cost(),
            min_ns,
            p50_ns: at(500),
            middle_ns: mean(middle),
            p90_ns: at(900),
            p99_ns: at(990),
            p999_ns: at(999),
            max_ns,
            histogram,
        })
    }
}

#[allow(clippy::cast_precision_loss, reason = "a mean is not exact")]
fn mean(samples: &[u64]) -> f64 {
    samples.iter().sum::<u64>() as f64 / samples.len() as f64
}

/// What one look at the clock costs.
fn clock_cost() -> u64 {
    const LOOKS: u32 = 1000;
    let start = Instant::now();
    for _ in 0..LOOKS {
        std::hint::black_box(Instant::now());
    }
    nanoseconds(start.elapsed() / LOOKS)
}

/// Nanoseconds of a duration.
#[must_use]
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Times `trip` again and again: it sends a frame and returns when it has arrived, or `false` if it did not.
///
/// # Errors
/// Those of `trip`, or that too many were lost.
pub fn measure(plan: &LatencyPlan, mut trip: impl FnMut() -> Result<Option<Duration>>) -> Result<Latency> {
    let mut samples = Vec::with_capacity(plan.samples);
    let mut lost = 0;
    for turn in 0..plan.warm_up + plan.samples {
        match trip()? {
            Some(took) if turn >= plan.warm_up => samples.push(nanoseconds(took)),
            Some(_) => {}
            None => lost += 1,
        }
        ensure!(
            lost <= ACCEPTED_LOSS.max((turn + 1) / ACCEPTED_LOSS) && (turn < 10 || lost <= turn),
            "{lost} of {} frames did not arrive",
            turn + 1
        );
        pause(plan.interval);
    }
    Latency::of(samples, lost)
}

/// Short waits keep the CPU, or the wake-up of this thread would be measured as well.
fn pause(interval: Duration) {
    let start = Instant::now();
    while start.elapsed() < interval {
        std::hint::spin_loop();
    }
}

/// Times frames from the first port to the second.
///
/// # Errors
/// If the device breaks a rule or loses too much.
pub fn latency<'m, R: DriverRing<'m>>(ports: &mut [Port<'m, R>], plan: &LatencyPlan) -> Result<Latency> {
    let [from, to] = ports else {
        bail!("a frame is timed from one port to another");
    };
    introduce(from, to)?;
    measure(plan, || trip(from, to))
}

/// Each port sends once, so that a switch learns where it is; what that yields is thrown away.
fn introduce<'m, R: DriverRing<'m>>(from: &mut Port<'m, R>, to: &mut Port<'m, R>) -> Result<()> {
    to.send(1)?;
    from.send(1)?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(100) {
        for port in [&mut *from, &mut *to] {
            let count = port.rx.completed()?;
            if count > 0 {
                port.repost(count)?;
            }
        }
    }
    Ok(())
}

fn trip<'m, R: DriverRing<'m>>(from: &mut Port<'m, R>, to: &mut Port<'m, R>) -> Result<Option<Duration>> {
    // A frame that was late belongs to nobody.
    let late = to.rx.completed()?;
    if late > 0 {
        to.repost(late)?;
    }
    from.tx.completed()?;
    if from.tx.outstanding() == from.tx.size() {
        return Ok(None);
    }
    let start = Instant::now();
    from.send(1)?;
    let mut looks = 0u32;
    loop {
        let count = to.rx.completed()?;
        if count > 0 {
            let took = start.elapsed();
            to.repost(count)?;
            return Ok(Some(took));
        }
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(1024) && start.elapsed() > LIMIT {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_list() {
        let samples = (1..=1000).rev().collect();
        let latency = Latency::of(samples, 3).unwrap();
        assert_eq!(
            (latency.min_ns, latency.p50_ns, latency.p99_ns, latency.max_ns),
            (1, 500, 990, 1000)
        );
        assert_eq!((latency.samples, latency.lost), (1000, 3));
        assert!((latency.middle_ns - 500.5).abs() < 1e-9, "{latency:?}");
        assert_eq!(latency.histogram, [1, 2, 4, 8, 16, 32, 64, 128, 256, 489]);
        assert!(Latency::of(Vec::new(), 1).is_err());
    }

    #[test]
    fn a_device_that_loses_everything_is_given_up() {
        let plan = LatencyPlan {
            samples: 1000,
            warm_up: 0,
            interval: Duration::ZERO,
        };
        let mut tries = 0;
        let lost = measure(&plan, || {
            tries += 1;
            Ok(None)
        });
        assert!(lost.is_err() && tries < 200);
        let fine = measure(&plan, || Ok(Some(Duration::from_nanos(5)))).unwrap();
        assert_eq!((fine.samples, fine.p50_ns), (1000, 5));
    }
}
