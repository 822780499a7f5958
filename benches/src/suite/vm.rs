//! From one guest to another.

use anyhow::{Context, Result};

use super::report::{APART, OURS, OVS, PEER, Section};
use super::{Field, Settings};

/// A load and the generator's arguments for it.
type Load = (&'static str, &'static [&'static str]);

const LOADS: [Load; 8] = [
    ("60 B one way, 1024 flows", &["--size", "60"]),
    (
        "60 B one way, 65,536 flows",
        &["--size", "60", "--flows", "65536"],
    ),
    ("60 B both ways", &["--size", "60", "--both"]),
    ("IMIX one way", &["--size", "imix"]),
    ("IMIX both ways", &["--size", "imix", "--both"]),
    ("1514 B one way, 1024 flows", &["--size", "1514"]),
    (
        "1514 B one way, 65,536 flows",
        &["--size", "1514", "--flows", "65536"],
    ),
    ("1514 B both ways", &["--size", "1514", "--both"]),
];

const JUMBO: [Load; 1] = [(
    "9014 B one way, 8192 frames, queue 256",
    &["--size", "9014", "--frames", "8192", "--queue", "256"],
)];

const COLUMNS: [&str; 4] = [OURS, PEER, OVS, APART];

/// Floods.
///
/// # Errors
/// None yet: what fails is in the table.
pub(super) fn throughput(settings: &Settings) -> Result<Vec<Section>> {
    let mut sections = ["split", "packed"].map(|ring| {
        Section::new(
            &format!("VM to VM, {ring} rings"),
            "Million frames a second that arrive, both directions added. vnicd switches by address and refuses foreign source \
             addresses; testpmd does neither; OVS-DPDK learns addresses.",
            2,
            &COLUMNS,
        )
    });
    for (jumbo, loads) in [(false, &LOADS[..]), (true, &JUMBO[..])] {
        let mut field = Field::of_all(settings, if jumbo { "jumbo" } else { "plain" }, jumbo);
        for (load, arguments) in loads {
            for (section, ring) in sections.iter_mut().zip(["split", "packed"]) {
                let mut all = vec!["--ring", ring];
                all.extend(*arguments);
                for run in 0..settings.runs {
                    field.take_turns(section, load, run, |device| settings.flood(device, &all));
                }
            }
        }
    }
    Ok(sections.into())
}

/// One frame at a time, on devices that wait for nothing else.
///
/// # Errors
/// None yet: what fails is in the table.
pub(super) fn latencies(settings: &Settings) -> Result<Vec<Section>> {
    let mut section = Section::new(
        "Latency from VM to VM",
        "Nanoseconds from the moment when a frame is offered until its receiver sees it, one frame at a time; the clock's own \
         cost of about 20 ns is in them. It goes in steps, of 10 ns on some machines; \"middle\" is the mean of all but the fastest and the slowest tenth, \
         which has none.",
        0,
        &COLUMNS,
    );
    let mut field = Field::of_all(settings, "latency", false);
    let samples = if settings.quick { "5000" } else { "50000" };
    for ring in ["split", "packed"] {
        for run in 0..settings.runs {
            let arguments = ["--ring", ring, "--samples", samples, "--queue", "256"];
            let (outcomes, apart) = field.turns(&format!("latency, {ring}"), run, |device| {
                settings.load("latency", device, &arguments)
            });
            for (name, outcome) in outcomes {
                for percentile in ["p50", "middle", "p99"] {
                    let figure = outcome
                        .as_ref()
                        .map_err(|error| anyhow::anyhow!("{error:#}"))
                        .and_then(|report| {
                            report[format!("{percentile}_ns")]
                                .as_f64()
                                .with_context(|| format!("run {run} has no {percentile}"))
                        });
                    section.add(&format!("{ring}, {percentile}"), name, figure);
                }
            }
            section.add(&format!("{ring}, p50"), APART, apart);
        }
    }
    Ok(vec![section])
}
