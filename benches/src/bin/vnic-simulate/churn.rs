//! Sessions come and go; a NIC is lost, comes back, and another gets a larger weight.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use vnic_lb::policy::Algorithm;

use crate::plot::Plots;
use crate::world::{Chance, NICS, eight, steer_each};

/// New sessions a second.
const ARRIVALS: u32 = 10_000;
/// Mean life of a session, exponential.
const LIFE_S: f64 = 10.0;
const SECONDS: u32 = 140;
const LOST: u8 = 3;
const LOST_AT: u32 = 40;
const BACK_AT: u32 = 60;
const HEAVIER: u8 = 0;
const HEAVIER_AT: u32 = 90;

/// What was seen of one algorithm.
struct Run {
    name: String,
    /// Share of the new sessions that the NIC which returned got, and that of all sessions, by second.
    new: Vec<(f64, f64)>,
    all: Vec<(f64, f64)>,
    heavier: f64,
    needless: u64,
}

pub fn run(plots: &Plots) -> Result<(), String> {
    let runs: Vec<_> = Algorithm::ALL.into_iter().map(simulate).collect();
    println!(
        "## Churn: {ARRIVALS} new sessions a second; NIC {LOST} is lost at {LOST_AT} s, returns at {BACK_AT} s; \
         NIC {HEAVIER} gets weight 2 at {HEAVIER_AT} s\n"
    );
    println!(
        "| | largest share of new sessions in 10 s of slow start (fair: 12.5 %) | share of NIC {HEAVIER} in new \
         sessions with weight 2 (fair: 22.2 %) | moved though their NIC was alive |\n|---|---|---|---|"
    );
    for run in &runs {
        let slow_start = run
            .new
            .iter()
            .filter(|&&(at, _)| (f64::from(BACK_AT)..f64::from(BACK_AT) + 10.0).contains(&at))
            .map(|&(_, share)| share)
            .fold(0.0, f64::max);
        println!(
            "| `{}` | {slow_start:.1} % | {:.1} % | {} |",
            run.name, run.heavier, run.needless
        );
    }
    println!();
    let title = format!("Share of the NIC that is lost ({LOST_AT} s) and returns ({BACK_AT} s)");
    let lines = |of: fn(&Run) -> &Vec<(f64, f64)>| -> Vec<(String, Vec<(f64, f64)>)> {
        runs.iter()
            .map(|run| (run.name.clone(), of(run).clone()))
            .collect()
    };
    plots.lines(
        "churn-new.svg",
        &format!("{title}: new sessions"),
        ("seconds", "%"),
        &lines(|run| &run.new),
        (0.0, 30.0),
    )?;
    plots.lines(
        "churn-all.svg",
        &format!("{title}: all sessions"),
        ("seconds", "%"),
        &lines(|run| &run.all),
        (0.0, 20.0),
    )
}

fn simulate(algorithm: Algorithm) -> Run {
    let balancer = eight(algorithm, 1_000_000);
    let mut chance = Chance::new(21);
    // Sessions by the second in which they end.
    let mut ends: BinaryHeap<Reverse<(u32, u32)>> = BinaryHeap::new();
    let mut nics: Vec<u8> = Vec::new();
    let mut run = Run {
        name: algorithm.to_string(),
        new: Vec::new(),
        all: Vec::new(),
        heavier: 0.0,
        needless: 0,
    };
    for second in 0..SECONDS {
        let now = second * 1000;
        match second {
            LOST_AT => drop(balancer.set_alive(LOST, false, now)),
            BACK_AT => drop(balancer.set_alive(LOST, true, now)),
            HEAVIER_AT => drop(balancer.set_weight(HEAVIER, Some(2))),
            _ => {}
        }
        while ends.peek().is_some_and(|Reverse((end, _))| *end <= second) {
            ends.pop();
        }
        // Each session that lives sends once a second, and the others time out.
        let alive: Vec<u32> = ends.iter().map(|Reverse((_, session))| *session).collect();
        let is = steer_each(&balancer, now, alive.iter().copied());
        for (&session, &nic) in alive.iter().zip(&is) {
            let was = std::mem::replace(&mut nics[session as usize], nic);
            run.needless += u64::from(was != nic && balancer.alive().contains(was));
        }
        let first = second * ARRIVALS;
        // In ten parts, between which the balancer looks at its counters.
        let mut come = Vec::new();
        for part in 0..10 {
            let from = first + part * ARRIVALS / 10;
            come.extend(steer_each(
                &balancer,
                now + part * 100,
                from..from + ARRIVALS / 10,
            ));
            balancer.tick(now + part * 100 + 99);
            while balancer.upkeep(now + part * 100 + 99) {}
        }
        for session in first..first + ARRIVALS {
            let life = -LIFE_S * (1.0 - chance.unit()).ln();
            ends.push(Reverse((second + whole_seconds(life), session)));
        }
        let share =
            |nic: u8| come.iter().filter(|&&one| one == nic).count() as f64 * 100.0 / f64::from(ARRIVALS);
        run.new.push((f64::from(second), share(LOST)));
        run.heavier = share(HEAVIER);
        nics.extend(come);
        let sessions = balancer.sessions_per_nic();
        let total: u64 = sessions.iter().take(usize::from(NICS)).sum();
        let of_lost = sessions[usize::from(LOST)] as f64 * 100.0 / total.max(1) as f64;
        run.all.push((f64::from(second), of_lost));
    }
    run
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at least 1, and some hundred at most"
)]
fn whole_seconds(life: f64) -> u32 {
    life.max(1.0).ceil() as u32
}
