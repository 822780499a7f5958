//! What others do, and the best that can be done.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::world::Chance;

/// Buckets of Maglev's table: the size in its paper.
const MAGLEV_SIZE: usize = 65_537;

/// A session's hash, of no relation to the balancer's.
pub fn hash(session: u32) -> u64 {
    Chance::new(u64::from(session) << 20 ^ 0x5e55).next()
}

/// hash mod the number of alive NICs, as Linux bonding and ECMP without resilience do it.
pub fn modulo(hash: u64, alive: &[u8]) -> u8 {
    alive[usize::try_from(hash % alive.len() as u64).unwrap_or(0)]
}

/// The lookup table of Maglev (Eisenbud et al., NSDI 2016, section 3.4): the NICs take turns, each taking the next bucket
/// of its own permutation that is free; `weights` are how many turns a NIC has in a round.
pub fn maglev(alive: &[u8], weights: &[u32]) -> Vec<u8> {
    let mut permutations: Vec<(usize, usize, usize)> = alive
        .iter()
        .map(|&nic| {
            let mut chance = Chance::new(u64::from(nic) + 1);
            (chance.below(MAGLEV_SIZE), chance.below(MAGLEV_SIZE - 1) + 1, 0)
        })
        .collect();
    let mut table = vec![u8::MAX; MAGLEV_SIZE];
    let mut filled = 0;
    while filled < MAGLEV_SIZE {
        for ((offset, skip, next), (&nic, &weight)) in permutations.iter_mut().zip(alive.iter().zip(weights))
        {
            for _ in 0..weight {
                if filled == MAGLEV_SIZE {
                    break;
                }
                let mut bucket = (*offset + *next * *skip) % MAGLEV_SIZE;
                while table[bucket] != u8::MAX {
                    *next += 1;
                    bucket = (*offset + *next * *skip) % MAGLEV_SIZE;
                }
                table[bucket] = nic;
                *next += 1;
                filled += 1;
            }
        }
    }
    table
}

/// The NIC of a hash in such a table.
pub fn maglev_choice(table: &[u8], hash: u64) -> u8 {
    table[usize::try_from(hash % MAGLEV_SIZE as u64).unwrap_or(0)]
}

/// Imbalance of the longest-processing-time assignment: the heaviest session first, each to the NIC with the least. No
/// assignment of whole sessions is better by more than a third, and with many small ones none is better at all.
pub fn best_possible(rates: impl Iterator<Item = f64>, nics: u8) -> f64 {
    let mut rates: Vec<f64> = rates.collect();
    rates.sort_by(|a, b| b.total_cmp(a));
    // Rates in whole millionths of the total, as floats have no order that a heap takes.
    let total: f64 = rates.iter().sum();
    let mut heap: BinaryHeap<Reverse<(u64, u8)>> = (0..nics).map(|nic| Reverse((0, nic))).collect();
    for rate in rates {
        if let Some(Reverse((load, nic))) = heap.pop() {
            heap.push(Reverse((load + quantum(rate / total), nic)));
        }
    }
    let loads: Vec<f64> = heap.iter().map(|Reverse((load, _))| *load as f64).collect();
    crate::world::imbalance(&loads, usize::from(nics))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of 1, in 2^-52"
)]
fn quantum(part: f64) -> u64 {
    (part * (1u64 << 52) as f64) as u64
}
