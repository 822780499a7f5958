//! How far the generator's CPU and the device's are from each other.
//!
//! Virtual CPUs are moved between cores. Between two that share a cache a line goes there and back in 44 to 57 ns, between two that do not in 330 to 450 (AMD
//! EPYC), which changes every figure of this suite by up to three times: figures are only compared if they were taken at the same distance.

use std::hint::spin_loop;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use super::device::DEVICE_CPU;
use super::{GENERATOR_CPU, on_cpu};

/// There and back, so often at a time.
const TRIPS: u32 = 20_000;
/// The least of so many times counts: the others were interrupted.
const TIMES: usize = 5;
/// Times that turns are measured again because the distance changed.
const REPEATS: usize = 5;
/// Distances that differ by more than this are not the same.
const SAME: f64 = 1.6;

/// A word with its cache line, and the next, to itself.
#[repr(align(128))]
struct Ball(AtomicU32);

/// Nanoseconds that a cache line takes from one CPU to the other and back.
///
/// # Errors
/// If there is no such CPU.
pub(super) fn round_trip() -> Result<f64> {
    // A side that could not be bound would leave the other one waiting.
    for cpu in [GENERATOR_CPU, DEVICE_CPU] {
        on_cpu(cpu, || Ok(()))?;
    }
    let ball = Ball(AtomicU32::new(0));
    let pass = |first: u32| {
        for trip in 0..TRIPS {
            while ball.0.load(Ordering::Acquire) != 2 * trip + first {
                spin_loop();
            }
            ball.0.store(2 * trip + first + 1, Ordering::Release);
        }
    };
    let mut least = f64::INFINITY;
    for _ in 0..TIMES {
        ball.0.store(0, Ordering::Release);
        // Both are bound before the first looks at the clock, or it would time how threads start.
        let bound = Barrier::new(2);
        let elapsed = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                on_cpu(DEVICE_CPU, || {
                    bound.wait();
                    pass(1);
                    Ok(())
                })
            });
            let elapsed = on_cpu(GENERATOR_CPU, || {
                bound.wait();
                let began = Instant::now();
                pass(0);
                Ok(began.elapsed())
            });
            other.join().ok().context("a thread ended early")??;
            elapsed
        })?;
        least = least.min(elapsed.as_secs_f64() * 1e9 / f64::from(TRIPS));
    }
    Ok(least)
}

/// Has `turns` measure, again if the CPUs' distance changed meanwhile; returns what it measured, and the distance. After some times the
/// last outcome is it, with the distance right after it.
pub(super) fn steadily<T>(mut turns: impl FnMut() -> T) -> (T, Result<f64>) {
    for _ in 0..REPEATS {
        let (before, outcome, after) = (round_trip(), turns(), round_trip());
        match (before, after) {
            (Ok(before), Ok(after)) if before.max(after) > SAME * before.min(after) => {}
            (Ok(before), Ok(after)) => return (outcome, Ok(before.max(after))),
            (Err(error), _) | (_, Err(error)) => return (outcome, Err(error)),
        }
    }
    let outcome = turns();
    (outcome, round_trip())
}
