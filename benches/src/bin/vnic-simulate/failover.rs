//! One of eight NICs is lost and comes back, under a million sessions.

use vnic_lb::policy::Algorithm;

use crate::plot::Plots;
use crate::references::{hash, maglev, maglev_choice, modulo};
use crate::world::{MILLION, eight, steer_each};

const LOST: u8 = 3;
const ALL: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const SEVEN: [u8; 7] = [0, 1, 2, 4, 5, 6, 7];

struct Row {
    name: String,
    /// Sessions that moved though they were not on the lost NIC.
    needless: usize,
    others: usize,
    /// Sessions that moved when it came back.
    on_return: usize,
}

pub fn run(plots: &Plots) -> Result<(), String> {
    let mut rows = Vec::new();
    for algorithm in Algorithm::ALL {
        let balancer = eight(algorithm, 1_200_000);
        let before = steer_each(&balancer, 0, 0..MILLION);
        balancer.set_alive(LOST, false, 10);
        let during = steer_each(&balancer, 10, 0..MILLION);
        balancer.set_alive(LOST, true, 20);
        let after = steer_each(&balancer, 20, 0..MILLION);
        rows.push(row(&format!("`{algorithm}`"), &before, &during, &after));
    }
    let stateless = |name: &str, with: &dyn Fn(u64) -> u8, without: &dyn Fn(u64) -> u8| {
        let nics = |choice: &dyn Fn(u64) -> u8| -> Vec<u8> {
            (0..MILLION).map(|session| choice(hash(session))).collect()
        };
        row(name, &nics(with), &nics(without), &nics(with))
    };
    rows.push(stateless(
        "modulo, stateless",
        &|hash| modulo(hash, &ALL),
        &|hash| modulo(hash, &SEVEN),
    ));
    let (with, without) = (maglev(&ALL, &[1; 8]), maglev(&SEVEN, &[1; 7]));
    rows.push(stateless(
        "Maglev, stateless",
        &|hash| maglev_choice(&with, hash),
        &|hash| maglev_choice(&without, hash),
    ));
    println!("## One of eight NICs is lost and returns, a million sessions\n");
    println!("| | moved at the loss though on another NIC | moved at the return |\n|---|---|---|");
    for row in &rows {
        let part = row.needless as f64 * 100.0 / row.others as f64;
        println!(
            "| {} | {} ({part:.2} %) | {} |",
            row.name, row.needless, row.on_return
        );
    }
    println!();
    let bars: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row.name.replace('`', ""),
                (row.needless + row.on_return) as f64 * 100.0 / f64::from(MILLION),
            )
        })
        .collect();
    plots.bars(
        "failover-moves.svg",
        "Sessions moved needlessly when 1 of 8 NICs is lost and returns",
        "% of 1M sessions",
        &bars,
        0.0,
    )
}

fn row(name: &str, before: &[u8], during: &[u8], after: &[u8]) -> Row {
    let moves = |from: &[u8], to: &[u8]| from.iter().zip(to).filter(|(was, is)| was != is).count();
    let others = before.iter().filter(|&&nic| nic != LOST).count();
    let needless = before
        .iter()
        .zip(during)
        .filter(|&(&was, &is)| was != LOST && was != is);
    Row {
        name: name.to_owned(),
        needless: needless.count(),
        others,
        on_return: moves(during, after),
    }
}
