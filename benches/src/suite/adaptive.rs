//! What adaptive waiting costs under load, saves without, and adds to a frame that wakes the worker.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::device::{Device, Wait};
use super::report::{APART, Section};
use super::{Field, Settings, cpu_time, folder, patiently};

const NAMES: [&str; 2] = ["busy", "adaptive"];
const RATIO: &str = "adaptive : busy";
/// Ports of the daemon that is idle.
const PORTS: usize = 8;

/// Runs it all.
///
/// # Errors
/// If vnicd does not start.
pub(super) fn run(settings: &Settings) -> Result<Vec<Section>> {
    Ok(vec![under_load(settings), waking(settings), idle(settings)?])
}

fn vnicd(settings: &Settings, wait: Wait, what: &str, ports: usize) -> Result<Device> {
    let name = format!("{what}-{wait:?}");
    Device::vnicd(&folder(settings, &name), wait, ports, None, &[])
}

fn under_load(settings: &Settings) -> Section {
    let mut section = Section::new(
        "vnicd: adaptive beside busy, under load",
        "Million frames a second from VM to VM, and the ratio of each turn.",
        2,
        &[NAMES[0], NAMES[1], RATIO, APART],
    );
    let mut field = Field {
        devices: vec![
            (NAMES[0], vnicd(settings, Wait::Busy, "load", 2)),
            (NAMES[1], vnicd(settings, Wait::Adaptive, "load", 2)),
        ],
    };
    for ring in ["split", "packed"] {
        for (load, arguments) in [
            ("60 B one way", &["--size", "60"][..]),
            ("1514 B both ways", &["--size", "1514", "--both"][..]),
        ] {
            let mut all = vec!["--ring", ring];
            all.extend(arguments);
            for run in 0..settings.runs {
                let load = format!("{ring}, {load}");
                let (outcomes, apart) = field.turns(&load, run, |device| settings.flood(device, &all));
                let of = |wanted: &str| {
                    let (_, outcome) = outcomes.iter().find(|(name, _)| *name == wanted)?;
                    outcome.as_ref().ok()
                };
                if let [Some(busy), Some(adaptive)] = NAMES.map(of) {
                    section.add(&load, RATIO, Ok(adaptive / busy));
                }
                for (name, outcome) in outcomes {
                    section.add(&load, name, outcome);
                }
                section.add(&load, APART, apart);
            }
        }
    }
    section
}

fn waking(settings: &Settings) -> Section {
    let mut section = Section::new(
        "vnicd: a frame after 3 ms of silence",
        "Microseconds until its receiver sees it; the adaptive worker sleeps when the frame comes.",
        1,
        &NAMES,
    );
    let samples = if settings.quick { "100" } else { "500" };
    for _ in 0..settings.runs {
        for (name, wait) in NAMES.into_iter().zip([Wait::Busy, Wait::Adaptive]) {
            let outcome = vnicd(settings, wait, "wake", 2).and_then(|mut device| {
                patiently(|| {
                    device.while_running(|device| {
                        let arguments = ["--samples", samples, "--warm-up", "20", "--interval", "3000"];
                        settings.load("latency", device, &arguments)
                    })
                })
            });
            for percentile in ["p50", "p99"] {
                let figure = outcome
                    .as_ref()
                    .map_err(|error| anyhow::anyhow!("{error:#}"))
                    .and_then(|report| {
                        report[format!("{percentile}_ns")]
                            .as_f64()
                            .context("no percentile")
                    });
                section.add(percentile, name, figure.map(|ns| ns / 1000.0));
            }
        }
    }
    section
}

fn idle(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "vnicd: idle with 8 guests connected",
        "CPU time of all its threads, in percent of one CPU.",
        2,
        &NAMES[1..],
    );
    let seconds = if settings.quick { 3 } else { 10 };
    let mut device = vnicd(settings, Wait::Adaptive, "idle", PORTS)?;
    for _ in 0..settings.runs.min(3) {
        let outcome = device.while_running(|device| {
            std::thread::scope(|scope| {
                let guests = scope.spawn(|| {
                    let limit = (seconds + 3).to_string();
                    settings.run_idle(device.sockets(), &limit)
                });
                // Connected, and past the work of that.
                std::thread::sleep(Duration::from_secs(2));
                let (began, before) = (Instant::now(), cpu_time(device.id())?);
                std::thread::sleep(Duration::from_secs(seconds));
                let used = cpu_time(device.id())?.saturating_sub(before);
                let percent = used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
                match guests.join() {
                    Ok(outcome) => outcome.map(|()| percent),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            })
        });
        section.add("8 ports, rings running", NAMES[1], outcome);
    }
    Ok(section)
}
