//! The slot table: exact weighted quotas and fallbacks.
//!
//! A key hashes to one of [`SLOTS`] slots, and a slot lists the NICs in the order in which they serve it. The
//! first NIC, the primary, is dealt by quota: a NIC with a share w of the weight is the primary of w * [`SLOTS`]
//! slots, rounded to a whole slot. The others follow in weighted highest-random-weight order. Both depend
//! on the NICs' ids and never on their positions, so the loss of a NIC moves its own slots only, and adding one
//! takes from the others little more than its quota.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use siphasher::sip::SipHasher13;

use crate::MAX_NICS;
use crate::key::SessionKey;
use crate::nics::NicIndex;

/// Slots of the table.
pub const SLOTS: usize = 1 << 16;

/// Bits of a NIC's position in a slot's ranking.
const RANK_BITS: u32 = 4;

/// Who serves each slot. Immutable: a change of NICs builds another one.
pub struct SlotTable {
    /// Ranking of each slot: [`RANK_BITS`] bits a NIC, the primary lowest.
    ranks: Box<[u32]>,
    nics: u32,
    hasher: SipHasher13,
}

/// A NIC as the slots know it.
#[derive(Debug, Clone, Copy)]
pub struct Server<'a> {
    /// The number that the table answers with; below [`MAX_NICS`].
    pub nic: NicIndex,
    /// The stable id that decides which slots it serves.
    pub id: &'a str,
    /// Relative share of the slots.
    pub weight: u32,
}

/// One NIC while the table is built.
struct Candidate {
    nic: NicIndex,
    weight: u32,
    quota: usize,
    seed: u64,
}

impl SlotTable {
    /// Deals the slots to the first [`MAX_NICS`] of `servers`. The same ids, weights and key give the same table on
    /// any host and in any order of the list. A weight of 0 makes a NIC the last resort; if every weight is 0,
    /// they count as equal. Takes some ten milliseconds, so it is no work for a frame loop.
    #[must_use]
    pub fn new(servers: &[Server<'_>], hash_key: &[u8; 16]) -> SlotTable {
        let hasher = SipHasher13::new_with_key(hash_key);
        let candidates = candidates(servers, &hasher);
        let rankings: Vec<Ranking> = (0..SLOTS).map(|slot| ranking(&candidates, slot)).collect();
        let primaries = deal(&candidates, &rankings);
        let ranks = rankings
            .iter()
            .zip(primaries)
            .map(|(ranking, primary)| {
                let ranking = &ranking[..candidates.len()];
                let others = ranking.iter().copied().filter(|&rank| Some(rank) != primary);
                let order = primary.into_iter().chain(others);
                order
                    .zip((0u32..).step_by(4))
                    .fold(0u32, |packed, (rank, shift)| {
                        packed | u32::from(candidates[usize::from(rank)].nic) << shift
                    })
            })
            .collect();
        SlotTable {
            ranks,
            nics: u32::try_from(candidates.len()).unwrap_or(0),
            hasher,
        }
    }

    /// The slot of a key.
    #[must_use]
    pub fn slot(&self, key: &SessionKey) -> u16 {
        let [.., high, low] = self.hasher.hash(&key.bytes()).to_be_bytes();
        u16::from_be_bytes([high, low])
    }

    /// The NIC that a slot belongs to while all are alive; `None` without NICs.
    #[must_use]
    pub fn primary(&self, slot: u16) -> Option<NicIndex> {
        self.choose(slot, u32::MAX)
    }

    /// All NICs in the order in which they serve a slot, the primary first.
    pub fn order(&self, slot: u16) -> impl Iterator<Item = NicIndex> + use<> {
        let ranks = self.ranks.get(usize::from(slot)).copied().unwrap_or(0);
        (0..self.nics).map(move |at| {
            let [nic, ..] = (ranks >> (at * RANK_BITS) & ((1 << RANK_BITS) - 1)).to_le_bytes();
            nic
        })
    }

    /// The first NIC in the slot's order that is in `alive` (bit i is NIC i).
    #[must_use]
    pub fn choose(&self, slot: u16, alive: u32) -> Option<NicIndex> {
        let mut ranks = *self.ranks.get(usize::from(slot))?;
        for _ in 0..self.nics {
            let [nic, ..] = (ranks & ((1 << RANK_BITS) - 1)).to_le_bytes();
            if alive >> nic & 1 == 1 {
                return Some(nic);
            }
            ranks >>= RANK_BITS;
        }
        None
    }
}

/// The NICs in the order of their ids, with their exact share of the slots (largest remainders rounded up).
fn candidates(servers: &[Server<'_>], hasher: &SipHasher13) -> Vec<Candidate> {
    let mut servers: Vec<_> = servers.iter().take(MAX_NICS).collect();
    servers.sort_by_key(|server| server.id);
    let drained = servers.iter().all(|server| server.weight == 0);
    let weight = |server: &Server<'_>| if drained { 1 } else { server.weight };
    let total: u64 = servers.iter().map(|server| u64::from(weight(server))).sum();
    let total = total.max(1);
    let share = |server: &Server<'_>| u64::from(weight(server)) * SLOTS as u64;
    let mut candidates: Vec<_> = servers
        .iter()
        .map(|server| Candidate {
            nic: server.nic,
            weight: weight(server),
            quota: usize::try_from(share(server) / total).unwrap_or(SLOTS),
            seed: hasher.hash(server.id.as_bytes()),
        })
        .collect();
    let mut by_remainder: Vec<_> = (0..servers.len()).collect();
    by_remainder.sort_by_key(|&rank| Reverse(share(servers[rank]) % total));
    let dealt: usize = candidates.iter().map(|candidate| candidate.quota).sum();
    for &rank in by_remainder.iter().take(SLOTS.saturating_sub(dealt)) {
        candidates[rank].quota += 1;
    }
    candidates
}

/// The random number of a NIC for a slot (the finaliser of SplitMix64 over the NIC's keyed hash).
fn draw(seed: u64, slot: usize) -> u64 {
    let mut x = seed ^ (slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Positions in the list of candidates, as many as there are, in a slot's order of preference.
type Ranking = [u8; MAX_NICS];

/// The candidates in a slot's order of preference: weighted highest random weight, those of weight 0 last.
fn ranking(candidates: &[Candidate], slot: usize) -> Ranking {
    let mut scored = [(f64::NEG_INFINITY, 0u64, 0u8); MAX_NICS];
    for ((scored, candidate), rank) in scored.iter_mut().zip(candidates).zip(0u8..) {
        let draw = draw(candidate.seed, slot);
        // A uniform number in (0, 1); 53 bits are what an f64 holds.
        let uniform = ((draw >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let score = if candidate.weight == 0 {
            f64::NEG_INFINITY
        } else {
            f64::from(candidate.weight) / -uniform.ln()
        };
        *scored = (score, draw, rank);
    }
    scored[..candidates.len()]
        .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2)));
    scored.map(|(_, _, rank)| rank)
}

/// Gives every slot a primary within the quotas, by deferred acceptance: a slot asks the candidates in its order
/// of preference, and a full candidate keeps the slots with its highest draws. The outcome is stable and unique, so it
/// does not depend on any order here, and few slots move when the quotas change.
fn deal(candidates: &[Candidate], rankings: &[Ranking]) -> Vec<Option<u8>> {
    let mut held: Vec<BinaryHeap<Reverse<(u64, usize)>>> = candidates
        .iter()
        .map(|candidate| BinaryHeap::with_capacity(candidate.quota + 1))
        .collect();
    let mut next = vec![0usize; rankings.len()];
    let mut waiting: Vec<usize> = (0..rankings.len()).rev().collect();
    while let Some(slot) = waiting.pop() {
        let Some(&rank) = rankings[slot][..candidates.len()].get(next[slot]) else {
            continue;
        };
        next[slot] += 1;
        let (candidate, heap) = (&candidates[usize::from(rank)], &mut held[usize::from(rank)]);
        heap.push(Reverse((draw(candidate.seed, slot), slot)));
        if heap.len() > candidate.quota
            && let Some(Reverse((_, refused))) = heap.pop()
        {
            waiting.push(refused);
        }
    }
    let mut primaries = vec![None; rankings.len()];
    for (heap, rank) in held.into_iter().zip(0u8..) {
        for Reverse((_, slot)) in heap {
            primaries[slot] = Some(rank);
        }
    }
    primaries
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 16] = *b"0123456789abcdef";

    fn nics(weights: &[(&'static str, u32)]) -> Vec<Server<'static>> {
        (0u8..)
            .zip(weights)
            .map(|(nic, &(id, weight))| Server { nic, id, weight })
            .collect()
    }

    fn equal(ids: &[&'static str]) -> Vec<Server<'static>> {
        nics(&ids.iter().map(|&id| (id, 1)).collect::<Vec<_>>())
    }

    fn slots() -> impl Iterator<Item = u16> {
        0..=u16::MAX
    }

    fn quotas(table: &SlotTable) -> [usize; MAX_NICS] {
        let mut quotas = [0; MAX_NICS];
        for slot in slots() {
            quotas[usize::from(table.primary(slot).unwrap())] += 1;
        }
        quotas
    }

    /// Who serves a slot, by id.
    fn owner<'a>(table: &SlotTable, nics: &[Server<'a>], slot: u16, alive: u32) -> &'a str {
        nics[usize::from(table.choose(slot, alive).unwrap())].id
    }

    #[test]
    fn quotas_are_exact() {
        let weighted = nics(&[("a", 10), ("b", 25), ("c", 40), ("d", 100)]);
        let quotas_of_four = quotas(&SlotTable::new(&weighted, &KEY));
        for (nic, quota) in weighted.iter().zip(quotas_of_four) {
            let exact = f64::from(nic.weight) / 175.0 * 65536.0;
            assert!(
                (f64::from(u32::try_from(quota).unwrap()) - exact).abs() < 1.0,
                "{nic:?} has {quota} of {exact}"
            );
        }
        let eight = equal(&["a", "b", "c", "d", "e", "f", "g", "h"]);
        assert_eq!(quotas(&SlotTable::new(&eight, &KEY)), [8192; 8]);
    }

    #[test]
    fn losing_a_nic_moves_only_its_slots_and_spreads_them() {
        let eight = equal(&["a", "b", "c", "d", "e", "f", "g", "h"]);
        let table = SlotTable::new(&eight, &KEY);
        let mut heirs = [0u32; MAX_NICS];
        for slot in slots() {
            let (before, after) = (
                table.primary(slot).unwrap(),
                table.choose(slot, 0xff & !8).unwrap(),
            );
            if before == 3 {
                heirs[usize::from(after)] += 1;
            } else {
                assert_eq!(before, after);
            }
        }
        assert!(slots().all(|slot| {
            let mut order: Vec<_> = table.order(slot).collect();
            let first = order.first().copied();
            order.sort_unstable();
            first == table.primary(slot) && order == [0, 1, 2, 3, 4, 5, 6, 7]
        }));
        assert_eq!(heirs[3], 0);
        let shares = heirs.iter().enumerate().filter(|&(nic, _)| nic != 3);
        assert!(
            shares.clone().all(|(_, heir)| (900..1450).contains(heir)),
            "fair is 1170: {heirs:?}"
        );
    }

    #[test]
    fn the_order_of_the_list_does_not_matter() {
        let forward = nics(&[("a", 10), ("b", 25), ("c", 40)]);
        let backward = nics(&[("c", 40), ("b", 25), ("a", 10)]);
        let tables = (SlotTable::new(&forward, &KEY), SlotTable::new(&backward, &KEY));
        for slot in slots() {
            assert_eq!(
                owner(&tables.0, &forward, slot, 7),
                owner(&tables.1, &backward, slot, 7)
            );
            assert_eq!(
                owner(&tables.0, &forward, slot, 5),
                owner(&tables.1, &backward, slot, 5)
            );
        }
    }

    #[test]
    fn adding_a_nic_takes_little_more_than_its_quota() {
        let before = equal(&["a", "b", "c", "d", "e", "f", "g"]);
        let after = equal(&["new", "a", "b", "c", "d", "e", "f", "g"]);
        let tables = (SlotTable::new(&before, &KEY), SlotTable::new(&after, &KEY));
        let moved = slots().filter(|&slot| {
            owner(&tables.0, &before, slot, u32::MAX) != owner(&tables.1, &after, slot, u32::MAX)
        });
        let moved = moved.count();
        assert!(
            (8192..8192 + SLOTS / 50).contains(&moved),
            "{moved} slots moved; the quota is 8192"
        );
    }

    #[test]
    fn weight_zero_is_the_last_resort() {
        let drained = nics(&[("a", 0), ("b", 1), ("c", 1)]);
        let table = SlotTable::new(&drained, &KEY);
        assert_eq!(quotas(&table), [0, 32768, 32768, 0, 0, 0, 0, 0]);
        for slot in slots() {
            assert_ne!(table.choose(slot, 0b011), Some(0));
            assert_eq!(table.choose(slot, 0b001), Some(0));
        }
        let all = nics(&[("a", 0), ("b", 0)]);
        assert_eq!(quotas(&SlotTable::new(&all, &KEY))[..2], [32768, 32768]);
    }

    #[test]
    fn without_nics_there_is_no_choice() {
        assert_eq!(SlotTable::new(&[], &KEY).primary(7), None);
        assert_eq!(SlotTable::new(&equal(&["a", "b"]), &KEY).choose(7, 0), None);
    }

    #[test]
    fn the_key_decides_the_slots() {
        let key = |port| {
            let (src, dst) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
            SessionKey::of_packet([0, 0], 6, src, dst, crate::key::Selector::Ports(port, 80)).0
        };
        let (one, same) = (SlotTable::new(&[], &KEY), SlotTable::new(&[], &KEY));
        let other = SlotTable::new(&[], b"fedcba9876543210");
        assert!((0..100).all(|port| one.slot(&key(port)) == same.slot(&key(port))));
        assert!(
            (0..100)
                .filter(|&port| one.slot(&key(port)) == other.slot(&key(port)))
                .count()
                < 3
        );
    }
}
