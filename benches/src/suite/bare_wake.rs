//! How long a thread that sleeps takes to wake here, and nothing else: less than that nobody who sleeps can have.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::device::DEVICE_CPU;
use super::{GENERATOR_CPU, bind, on_cpu};
use crate::latency::{Latency, LatencyPlan, measure};

const LIMIT: Duration = Duration::from_secs(1);

/// From the write to an eventfd until it is seen that a thread on the device's CPU, which slept in read(2), runs.
///
/// # Errors
/// If there is no eventfd, or the thread does not wake.
pub(super) fn time(plan: &LatencyPlan) -> Result<Latency> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
    let (woken, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| -> Result<()> {
            bind(DEVICE_CPU)?;
            while !stop.load(Ordering::Relaxed) {
                event.read()?;
                woken.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let outcome = on_cpu(GENERATOR_CPU, || {
            measure(plan, || {
                let before = woken.load(Ordering::Relaxed);
                let start = Instant::now();
                event.write(1)?;
                while woken.load(Ordering::Relaxed) == before {
                    if start.elapsed() > LIMIT {
                        return Ok(None);
                    }
                    std::hint::spin_loop();
                }
                Ok(Some(start.elapsed()))
            })
        });
        stop.store(true, Ordering::Relaxed);
        event.write(1)?;
        match sleeper.join() {
            Ok(slept) => slept.and(outcome),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
