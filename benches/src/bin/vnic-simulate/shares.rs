//! How exact shares are.

use vnic_lb::policy::Algorithm;
use vnic_lb::slots::{SLOTS, Server, SlotTable};

use crate::references::{hash, maglev, maglev_choice, modulo};
use crate::world::{Chance, HASH_KEY, MILLION, NICS, eight, imbalance, loads, steer_each};

const ALL: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

pub fn run() {
    println!("## A million equal sessions on eight NICs\n");
    println!("| | sessions, max/mean |\n|---|---|");
    println!("| best possible | 1.0000 |");
    println!(
        "| sampling floor (mean of 100 fair draws) | {:.4} |",
        sampling_floor()
    );
    for algorithm in Algorithm::ALL {
        let balancer = eight(algorithm, 1_200_000);
        let nics = steer_each(&balancer, 0, 0..MILLION);
        println!(
            "| `{algorithm}` | {:.4} |",
            imbalance(&loads(&nics, |_| 1.0), usize::from(NICS))
        );
    }
    let of = |choice: &dyn Fn(u64) -> u8| {
        let nics: Vec<u8> = (0..MILLION).map(|session| choice(hash(session))).collect();
        imbalance(&loads(&nics, |_| 1.0), usize::from(NICS))
    };
    let table = maglev(&ALL, &[1; 8]);
    println!("| modulo | {:.4} |", of(&|hash| modulo(hash, &ALL)));
    println!(
        "| Maglev, 65,537 buckets | {:.4} |\n",
        of(&|hash| maglev_choice(&table, hash))
    );
    weights();
}

/// What chance alone makes of fair shares.
fn sampling_floor() -> f64 {
    let mut chance = Chance::new(7);
    let draws = (0..100).map(|_| {
        let mut loads = [0.0; 16];
        (0..MILLION).for_each(|_| loads[chance.below(usize::from(NICS))] += 1.0);
        imbalance(&loads, usize::from(NICS))
    });
    draws.sum::<f64>() / 100.0
}

fn weights() {
    println!("## Weights 10, 25, 40, 100\n");
    println!("| | largest error of a share |\n|---|---|");
    let weights = [10u32, 25, 40, 100];
    let error = |counts: [f64; 4]| {
        let total: f64 = counts.iter().sum();
        let errors = counts
            .iter()
            .zip(weights)
            .map(|(count, weight)| (count / total - f64::from(weight) / 175.0).abs());
        errors.fold(0.0, f64::max)
    };
    let servers: Vec<_> = (0u8..)
        .zip(weights)
        .map(|(nic, weight)| Server {
            nic,
            id: ["nic0", "nic1", "nic2", "nic3"][usize::from(nic)],
            weight,
        })
        .collect();
    let slots = SlotTable::new(&servers, &HASH_KEY);
    let mut counts = [0.0; 4];
    (0..=u16::MAX).for_each(|slot| counts[usize::from(slots.primary(slot).unwrap_or(0))] += 1.0);
    println!(
        "| slots of `hash` and `weighted` | {:.2} / {SLOTS} |",
        error(counts) * SLOTS as f64
    );
    let mut counts = [0.0; 4];
    maglev(&[0, 1, 2, 3], &weights)
        .iter()
        .for_each(|&nic| counts[usize::from(nic)] += 1.0);
    println!(
        "| buckets of Maglev | {:.2} / {SLOTS} |\n",
        error(counts) * SLOTS as f64
    );
}
