//! What adaptive waiting costs under load, saves without, and adds to a frame that wakes the worker.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::bare_wake;
use super::device::{Device, Wait};
use super::report::{APART, Section};
use super::{Field, Settings, cpu_time, folder, microseconds, patiently};
use crate::latency::LatencyPlan;

const NAMES: [&str; 2] = ["busy", "adaptive"];
const RATIO: &str = "adaptive : busy";
const SLEEPER: &str = "a thread that sleeps";
const OVER: &str = "adaptive : that thread";
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
        "Microseconds until its receiver sees it; the adaptive worker sleeps when the frame comes. \"A thread that sleeps\" does nothing but \
         that: from a write to its eventfd until it runs.",
        2,
        &[NAMES[0], NAMES[1], SLEEPER, OVER],
    );
    let plan = LatencyPlan {
        samples: if settings.quick { 100 } else { 500 },
        warm_up: 20,
        interval: Duration::from_millis(3),
    };
    for _ in 0..settings.runs {
        let names = [NAMES[0], NAMES[1], SLEEPER];
        let outcomes = [
            time_vnicd(settings, Wait::Busy, &plan),
            time_vnicd(settings, Wait::Adaptive, &plan),
            bare_wake::time(&plan).map(|latency| [latency.p50_ns, latency.p99_ns].map(microseconds)),
        ];
        for (at, percentile) in ["p50", "p99"].into_iter().enumerate() {
            for (name, outcome) in names.iter().zip(&outcomes) {
                let figure = outcome.as_ref().map(|figures| figures[at]);
                section.add(
                    percentile,
                    name,
                    figure.map_err(|error| anyhow::anyhow!("{error:#}")),
                );
            }
            if let [_, Ok(adaptive), Ok(sleeper)] = &outcomes {
                section.add(percentile, OVER, Ok(adaptive[at] / sleeper[at]));
            }
        }
    }
    section
}

/// Microseconds that half and 99 % of the frames take less than.
fn time_vnicd(settings: &Settings, wait: Wait, plan: &LatencyPlan) -> Result<[f64; 2]> {
    let mut device = vnicd(settings, wait, "wake", 2)?;
    let report = patiently(|| {
        device.while_running(|device| {
            let numbers = [
                plan.samples.to_string(),
                plan.warm_up.to_string(),
                plan.interval.as_micros().to_string(),
            ];
            let [samples, warm_up, interval] = numbers.each_ref().map(String::as_str);
            let arguments = ["--samples", samples, "--warm-up", warm_up, "--interval", interval];
            settings.load("latency", device, &arguments)
        })
    })?;
    let figure = |name: &str| report[name].as_u64().context("no percentile").map(microseconds);
    Ok([figure("p50_ns")?, figure("p99_ns")?])
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
