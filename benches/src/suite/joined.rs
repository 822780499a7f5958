//! The joined loop over sessions, NICs and ports.

use std::time::Duration;

use anyhow::Result;

use super::device::DEVICE_CPU;
use super::distance::steadily;
use super::report::{APART, Section};
use super::{GENERATOR_CPU, Settings, on_cpu, patiently, undisturbed};
use crate::joined::{JoinedPlan, JoinedReport, run as run_joined};

/// Sessions, NICs, ports.
const CASES: [(u32, u8, u8); 7] = [
    (1024, 1, 1),
    (1024, 8, 1),
    (1024, 1, 8),
    (1024, 8, 8),
    (65_536, 8, 1),
    (1 << 20, 1, 1),
    (1 << 20, 8, 1),
];

/// Runs all cases.
///
/// # Errors
/// None: what fails is in the table.
pub(super) fn run(settings: &Settings) -> Result<Vec<Section>> {
    let columns = ["split", "packed", "split, ns", "packed, ns", APART];
    let mut section = Section::new(
        "Guest to session balancing to NIC in memory, 60 B",
        "Million frames a second that NICs send which complete at once, and the nanoseconds of the worker for each: everything that \
         is done to a frame but the kernel's part.",
        2,
        &columns,
    );
    let mut evenness = Section::new(
        "Evenness of the NICs in the same runs",
        "Frames of the NIC that sent least, as a part of an even share.",
        2,
        &columns[..2],
    );
    for _ in 0..settings.runs {
        for (sessions, nics, ports) in CASES {
            let load = format!("{sessions} sessions, {nics} NICs, {ports} ports");
            for packed in [false, true] {
                let plan = JoinedPlan {
                    packed,
                    sessions,
                    nics,
                    ports,
                    queue_size: 1024,
                    cpu: DEVICE_CPU,
                    times: [
                        // Every session is there before anything is counted.
                        Duration::from_secs_f64(settings.warm_up() + f64::from(sessions) / 2e6),
                        Duration::from_secs_f64(settings.seconds),
                    ],
                };
                let (report, apart) = steadily(|| patiently(|| on_cpu(GENERATOR_CPU, || run_alone(&plan))));
                section.add(&load, APART, apart);
                let name = columns[usize::from(packed)];
                let nanoseconds = columns[2 + usize::from(packed)];
                match report {
                    Ok(report) => {
                        section.add(&load, name, Ok(report.rate / 1e6));
                        section.add(&load, nanoseconds, Ok(report.ns_per_frame));
                        if nics > 1 {
                            evenness.add(&load, name, Ok(report.least_nic));
                        }
                    }
                    Err(error) => section.add(&load, name, Err(error)),
                }
            }
        }
    }
    Ok(vec![section, evenness])
}

/// Fails if anything else took much of the two CPUs.
fn run_alone(plan: &JoinedPlan) -> Result<JoinedReport> {
    let report = run_joined(plan)?;
    undisturbed("the generator and the worker", report.cpu_share)?;
    Ok(report)
}
