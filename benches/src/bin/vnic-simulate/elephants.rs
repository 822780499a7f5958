//! A million sessions whose rates follow Zipf's law: the first sends twice as much as the second, and so on.

use std::sync::Arc;

use vnic_lb::balancer::{Balancer, Burst};
use vnic_lb::policy::Algorithm;

use crate::plot::Plots;
use crate::references::{best_possible, hash, maglev, maglev_choice, modulo};
use crate::world::{BURST, Chance, MILLION, NICS, eight, frame, imbalance, loads, steer_each};

const ALL: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Sessions arrive over so many steps of 100 ms.
const ARRIVAL_STEPS: u32 = 100;
/// Steps after that.
const STEPS: u32 = 300;
/// Orders in which the heavy and the light come, for the figures that need no traffic.
const ORDERS: u64 = 20;
/// Orders for `adaptive`.
const ADAPTIVE_ORDERS: u64 = 3;
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
        let target = chance.unit() * total;
        let rank = self.sums.partition_point(|&sum| sum <= target);
        self.sessions[rank.min(self.sessions.len() - 1)]
    }
}

/// Mean, lowest and highest of some figures.
struct Figures(Vec<f64>);

impl std::fmt::Display for Figures {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mean = self.0.iter().sum::<f64>() / self.0.len() as f64;
        let low = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.0.iter().copied().fold(0.0, f64::max);
        write!(out, "{mean:.3} ({low:.3} to {high:.3})")
    }
}

pub fn run(plots: &Plots) -> Result<(), String> {
    let best = best_possible((1..=MILLION).map(|rank| 1.0 / f64::from(rank)), NICS);
    let table = maglev(&ALL, &[1; 8]);
    let stateless = |choice: &dyn Fn(u64) -> u8| -> Vec<u8> {
        (0..MILLION).map(|session| choice(hash(session))).collect()
    };
    let mut fixed: Vec<(String, Vec<u8>, Vec<f64>)> =
        [Algorithm::Hash, Algorithm::LeastConn, Algorithm::Weighted]
            .into_iter()
            .map(|algorithm| {
                let nics = steer_each(&eight(algorithm, 1_200_000), 0, 0..MILLION);
                (format!("`{algorithm}`"), nics, Vec::new())
            })
            .collect();
    fixed.push((
        "modulo".to_owned(),
        stateless(&|hash| modulo(hash, &ALL)),
        Vec::new(),
    ));
    let by_maglev = stateless(&|hash| maglev_choice(&table, hash));
    fixed.push(("Maglev".to_owned(), by_maglev, Vec::new()));
    let mut runs = Vec::new();
    for order in 0..ORDERS {
        let rates = Rates::new(&mut Chance::new(100 + order));
        for (_, nics, figures) in &mut fixed {
            figures.push(imbalance(
                &loads(nics, |session| rates.rate(session)),
                usize::from(NICS),
            ));
        }
        if order < ADAPTIVE_ORDERS {
            runs.push(adaptive(&rates));
        }
    }
    println!("## A million sessions by Zipf's law (exponent 1) on eight NICs\n");
    println!(
        "Bytes, max/mean: mean (lowest to highest) of {ORDERS} orders of arrival, of `adaptive` {ADAPTIVE_ORDERS}.\n"
    );
    println!(
        "| | when all have come | {} s later | sessions moved |\n|---|---|---|---|",
        STEPS / 10
    );
    println!("| best possible (longest processing time) | {best:.4} | {best:.4} | - |");
    let mut lines = Vec::new();
    for (name, _, figures) in fixed {
        let end = f64::from(ARRIVAL_STEPS + STEPS) / 10.0;
        if let Some(&first) = figures.first() {
            let line = vec![(f64::from(ARRIVAL_STEPS) / 10.0, first), (end, first)];
            lines.push((name.replace('`', ""), line));
        }
        let figures = Figures(figures);
        println!("| {name} | {figures} | the same | 0 |");
    }
    let at_arrival = runs
        .iter()
        .filter_map(|run| run.line.first())
        .map(|&(_, value)| value);
    let at_end = runs
        .iter()
        .filter_map(|run| run.line.last())
        .map(|&(_, value)| value);
    println!(
        "| `adaptive` | {} | {} | {} |\n",
        Figures(at_arrival.collect()),
        Figures(at_end.collect()),
        runs.iter().map(|run| run.moved).max().unwrap_or(0)
    );
    let moving = runs.into_iter().next().map(|run| run.line).unwrap_or_default();
    lines.push(("adaptive".to_owned(), moving));
    plots.lines(
        "elephants.svg",
        "1M Zipf(1.0) sessions on 8 NICs: bytes, max/mean",
        ("seconds", "max/mean"),
        &lines,
        (1.0, 1.8),
    )
}

/// One run of `adaptive`.
struct Run {
    moved: u64,
    /// Imbalance by time, from when all have come.
    line: Vec<(f64, f64)>,
}

/// Sessions come over [`ARRIVAL_STEPS`], the heavy among the light, and send from then on.
fn adaptive(rates: &Rates) -> Run {
    let balancer = eight(Algorithm::Adaptive, 1_200_000);
    for nic in 0..NICS {
        // The index is there: it was made just now.
        let _ = balancer.set_link_speed(nic, Some(1000));
    }
    let mut chance = Chance::new(12);
    let mut world = World {
        balancer,
        nics: vec![u8::MAX; MILLION as usize],
        burst: Burst::with_capacity(BURST),
        senders: Vec::with_capacity(BURST),
        out: Vec::new(),
    };
    let mut line = Vec::new();
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
        if step + 1 >= ARRIVAL_STEPS && (step + 1) % 10 == 0 {
            let loads = loads(&world.nics, |session| rates.rate(session));
            line.push((f64::from(step + 1) / 10.0, imbalance(&loads, usize::from(NICS))));
        }
    }
    Run {
        moved: world.balancer.stats().moved,
        line,
    }
}

/// The frames on their way into the balancer, and what came out for each session last.
struct World {
    balancer: Arc<Balancer>,
    nics: Vec<u8>,
    burst: Burst,
    senders: Vec<u32>,
    out: Vec<Option<u8>>,
}

impl World {
    fn send(&mut self, now: u32, session: u32, len: u32) {
        self.burst.push_parsed(&frame(session, len));
        self.senders.push(session);
        if self.burst.len() == BURST {
            self.flush(now);
        }
    }

    fn flush(&mut self, now: u32) {
        self.balancer.steer(0, now, &mut self.burst, &mut self.out);
        for (&session, nic) in self.senders.iter().zip(&self.out) {
            self.nics[session as usize] = nic.unwrap_or(0);
        }
        self.burst.clear();
        self.senders.clear();
    }
}
