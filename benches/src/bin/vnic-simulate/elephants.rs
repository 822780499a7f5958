//! A million sessions whose rates follow Zipf's law: the first sends twice as much as the second, and so on.

use std::sync::Arc;

use vnic_lb::balancer::{Balancer, Observed};
use vnic_lb::policy::Algorithm;

use crate::plot::Plots;
use crate::references::{best_possible, hash, maglev, maglev_choice, modulo};
use crate::world::{BURST, Chance, MILLION, NICS, eight, frame, imbalance, loads};

const ALL: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Sessions arrive over so many steps of 100 ms.
const ARRIVAL_STEPS: u32 = 100;
/// Steps after that.
const STEPS: u32 = 600;
/// Frames a step, all sessions together: 3 Gb/s with the frames' length, of the 8 Gb/s that the NICs have.
const FRAMES_A_STEP: usize = 25_000;
const FRAME_LEN: u32 = 1500;

/// Who sends how much.
struct Rates {
    /// Sums of the rates up to each rank.
    sums: Vec<f64>,
    /// The rank of each session.
    ranks: Vec<usize>,
    /// The session of each rank.
    sessions: Vec<u32>,
}

impl Rates {
    fn new(chance: &mut Chance) -> Rates {
        let mut sum = 0.0;
        let sums = (1..=MILLION)
            .map(|rank| {
                sum += 1.0 / f64::from(rank);
                sum
            })
            .collect();
        // A heavy session may come at any time.
        let mut sessions: Vec<u32> = (0..MILLION).collect();
        for at in (1..sessions.len()).rev() {
            sessions.swap(at, chance.below(at + 1));
        }
        let mut ranks = vec![0; sessions.len()];
        for (rank, &session) in sessions.iter().enumerate() {
            ranks[session as usize] = rank;
        }
        Rates {
            sums,
            ranks,
            sessions,
        }
    }

    fn rate(&self, session: usize) -> f64 {
        1.0 / (self.ranks[session] + 1) as f64
    }

    /// The sender of the next frame.
    fn draw(&self, chance: &mut Chance) -> u32 {
        let total = self.sums.last().copied().unwrap_or(1.0);
        let rank = self.sums.partition_point(|&sum| sum <= chance.unit() * total);
        self.sessions[rank.min(self.sessions.len() - 1)]
    }
}

/// One run: imbalance by step, and sessions moved.
struct Run {
    name: String,
    at_arrival: f64,
    at_end: f64,
    moved: u64,
    line: Vec<(f64, f64)>,
}

pub fn run(plots: &Plots) -> Result<(), String> {
    let rates = Rates::new(&mut Chance::new(11));
    let best = best_possible((1..=MILLION).map(|rank| 1.0 / f64::from(rank)), NICS);
    let runs: Vec<_> = Algorithm::ALL
        .into_iter()
        .map(|algorithm| simulate(algorithm, &rates))
        .collect();
    println!("## A million sessions by Zipf's law (exponent 1) on eight NICs\n");
    println!(
        "| | bytes, max/mean, when all have come | a minute later | sessions moved |\n|---|---|---|---|"
    );
    println!("| best possible (longest processing time) | {best:.4} | {best:.4} | - |");
    for run in &runs {
        println!(
            "| `{}` | {:.3} | {:.3} | {} |",
            run.name, run.at_arrival, run.at_end, run.moved
        );
    }
    let table = maglev(&ALL, &[1; 8]);
    for (name, choice) in [
        ("modulo", &(|hash| modulo(hash, &ALL)) as &dyn Fn(u64) -> u8),
        ("Maglev", &|hash| maglev_choice(&table, hash)),
    ] {
        let nics: Vec<u8> = (0..MILLION).map(|session| choice(hash(session))).collect();
        let value = imbalance(&loads(&nics, |session| rates.rate(session)), usize::from(NICS));
        println!("| {name} | {value:.3} | {value:.3} | 0 |");
    }
    println!();
    let lines: Vec<_> = runs.into_iter().map(|run| (run.name, run.line)).collect();
    plots.lines(
        "elephants.svg",
        "1M Zipf(1.0) sessions on 8 NICs: bytes, max/mean",
        ("seconds", "max/mean"),
        &lines,
        (1.0, 1.6),
    )
}

fn simulate(algorithm: Algorithm, rates: &Rates) -> Run {
    let balancer = eight(algorithm, 1_200_000);
    for nic in 0..NICS {
        // The index is there: it was made just now.
        let _ = balancer.set_link_speed(nic, Some(1000));
    }
    let mut chance = Chance::new(12);
    let mut world = World {
        balancer,
        nics: vec![u8::MAX; MILLION as usize],
        burst: Vec::with_capacity(BURST),
        senders: Vec::with_capacity(BURST),
        out: Vec::new(),
    };
    let (mut line, mut at_arrival) = (Vec::new(), 0.0);
    for step in 0..ARRIVAL_STEPS + STEPS {
        let now = step * 100;
        let come = MILLION / ARRIVAL_STEPS;
        let arrived = (step + 1).min(ARRIVAL_STEPS) * come;
        if step < ARRIVAL_STEPS {
            (step * come..arrived).for_each(|session| world.send(now, session, 100));
        }
        for _ in 0..FRAMES_A_STEP {
            let session = rates.draw(&mut chance);
            // Who has not come yet does not send.
            if session < arrived {
                world.send(now, session, FRAME_LEN);
            }
        }
        world.flush(now);
        world.balancer.tick(now + 99);
        if step + 1 >= ARRIVAL_STEPS {
            let value = imbalance(
                &loads(&world.nics, |session| rates.rate(session)),
                usize::from(NICS),
            );
            line.push((f64::from(now) / 1000.0, value));
            if step + 1 == ARRIVAL_STEPS {
                at_arrival = value;
            }
        }
    }
    Run {
        name: algorithm.to_string(),
        at_arrival,
        at_end: line.last().map_or(0.0, |&(_, value)| value),
        moved: world.balancer.stats().moved,
        line,
    }
}

/// The frames on their way into the balancer, and what came out for each session last.
struct World {
    balancer: Arc<Balancer>,
    nics: Vec<u8>,
    burst: Vec<Observed>,
    senders: Vec<u32>,
    out: Vec<Option<u8>>,
}

impl World {
    fn send(&mut self, now: u32, session: u32, len: u32) {
        self.burst.push(frame(session, len));
        self.senders.push(session);
        if self.burst.len() == BURST {
            self.flush(now);
        }
    }

    fn flush(&mut self, now: u32) {
        self.balancer.steer(0, now, &self.burst, &mut self.out);
        for (&session, nic) in self.senders.iter().zip(&self.out) {
            self.nics[session as usize] = nic.unwrap_or(0);
        }
        self.burst.clear();
        self.senders.clear();
    }
}
