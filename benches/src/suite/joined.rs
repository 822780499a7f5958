//! The joined loop over sessions, NICs and ports.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::device::DEVICE_CPU;
use super::distance::steadily;
use super::report::{APART, Section};
use super::{GENERATOR_CPU, Settings, on_cpu, patiently, undisturbed};
use crate::joined::{Direction, JoinedPlan, JoinedReport, run as run_joined};

/// Sessions, NICs, ports.
type Case = (u32, u8, u8);

/// What the others are compared with.
const BASE: Case = (1024, 1, 1);
const TO_NICS: [Case; 6] = [
    (1024, 8, 1),
    (1024, 1, 8),
    (1024, 8, 8),
    (65_536, 8, 1),
    (1 << 20, 1, 1),
    (1 << 20, 8, 1),
];
const FROM_NICS: [Case; 4] = [(1024, 8, 1), (1024, 1, 8), (65_536, 8, 1), (1 << 20, 1, 1)];

/// Turns without a frame, of all turns, with which the worker is not what is measured.
const MOST_IDLE: f64 = 0.05;

const RINGS: [&str; 2] = ["split", "packed"];
const NANOSECONDS: [&str; 2] = ["split, ns", "packed, ns"];
const TIMES_BASE: [&str; 2] = ["split, times the first row", "packed, times the first row"];

/// Runs all cases, each right after the one it is compared with, at one distance of the CPUs.
///
/// # Errors
/// None: what fails is in the table.
pub(super) fn run(settings: &Settings) -> Result<Vec<Section>> {
    let columns = [RINGS, NANOSECONDS, TIMES_BASE].concat();
    let columns = [&columns[..], &[APART]].concat();
    let compared = "How many times the nanoseconds of the first row: of a run of that right before, at the same distance of the CPUs.";
    let mut to_nics = Section::new(
        "Guest to session balancing to NIC in memory, 60 B",
        &format!(
            "Million frames a second that NICs send which complete at once, and the nanoseconds of the worker for each: everything \
             that is done to a frame but the kernel's part. {compared}"
        ),
        2,
        &columns,
    );
    let mut evenness = Section::new(
        "Evenness of the NICs in the same runs",
        "Frames of the NIC that sent least, as a part of an even share.",
        2,
        &RINGS,
    );
    let mut from_nics = Section::new(
        "NIC in memory to session lookup to guest, 60 B",
        &format!(
            "Million frames a second that guests receive, and the nanoseconds of the worker for each, with what it takes to write the \
             frame into a chunk, which a NIC does itself. {compared}"
        ),
        2,
        &columns,
    );
    for _ in 0..settings.runs {
        for case in TO_NICS {
            one_turn(
                settings,
                Direction::ToNics,
                case,
                &mut to_nics,
                Some(&mut evenness),
            );
        }
        for case in FROM_NICS {
            one_turn(settings, Direction::FromNics, case, &mut from_nics, None);
        }
    }
    Ok(vec![to_nics, evenness, from_nics])
}

/// Both kinds of ring, right after the first row's case.
fn one_turn(
    settings: &Settings,
    direction: Direction,
    case: Case,
    section: &mut Section,
    mut evenness: Option<&mut Section>,
) {
    for packed in [false, true] {
        let ring = usize::from(packed);
        let (reports, apart) =
            steadily(|| [BASE, case].map(|case| measure(settings, direction, case, packed)));
        for case in [BASE, case] {
            let apart = apart.as_ref().copied().map_err(|error| anyhow!("{error:#}"));
            section.add(&load(case), APART, apart);
        }
        let nanoseconds = |report: &Result<JoinedReport>| Some(report.as_ref().ok()?.ns_per_frame);
        if let [Some(base), Some(this)] = reports.each_ref().map(nanoseconds) {
            section.add(&load(case), TIMES_BASE[ring], Ok(this / base));
        }
        for (case, report) in [BASE, case].into_iter().zip(reports) {
            let load = load(case);
            match report {
                Ok(report) => {
                    section.add(&load, RINGS[ring], Ok(report.rate / 1e6));
                    section.add(&load, NANOSECONDS[ring], Ok(report.ns_per_frame));
                    if let Some(evenness) = evenness.as_deref_mut().filter(|_| case.1 > 1) {
                        evenness.add(&load, RINGS[ring], Ok(report.least_nic));
                    }
                }
                Err(error) => section.add(&load, RINGS[ring], Err(error)),
            }
        }
    }
}

fn load((sessions, nics, ports): Case) -> String {
    format!("{sessions} sessions, {nics} NICs, {ports} ports")
}

fn measure(
    settings: &Settings,
    direction: Direction,
    (sessions, nics, ports): Case,
    packed: bool,
) -> Result<JoinedReport> {
    let plan = JoinedPlan {
        direction,
        packed,
        sessions,
        nics,
        ports,
        queue_size: 1024,
        workers: 1,
        cpu: DEVICE_CPU,
        times: [
            // Every session is there before anything is counted.
            Duration::from_secs_f64(settings.warm_up() + f64::from(sessions) / 2e6),
            Duration::from_secs_f64(settings.seconds),
        ],
    };
    patiently(|| on_cpu(GENERATOR_CPU, || run_alone(&plan)))
}

/// Fails if anything else took much of the two CPUs, or the worker waited for the generator.
fn run_alone(plan: &JoinedPlan) -> Result<JoinedReport> {
    let report = run_joined(plan)?;
    ensure!(
        report.idle < MOST_IDLE,
        "the worker had nothing to do in {:.0} % of its turns",
        report.idle * 100.0
    );
    undisturbed("the generator and the worker", report.cpu_share)?;
    Ok(report)
}
