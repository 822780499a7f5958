//! What the XDP program of one NIC has counted.

use aya::maps::{Array, MapData};
use vnic_lb::MAX_NICS;
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

/// Words of one answer in the program's map: count, time, address.
const WORDS: usize = 3;

/// Answers that arrived by one NIC, to the probes of any.
pub struct Answers(Array<MapData, [u64; WORDS * MAX_NICS]>);

/// Answers to the probes of one NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answer {
    /// How many so far.
    pub count: u64,
    /// When the last one came: CLOCK_MONOTONIC, in nanoseconds.
    pub at_ns: u64,
    /// Who sent it.
    pub from: Mac,
}

impl Answers {
    pub(crate) fn new(map: Array<MapData, [u64; WORDS * MAX_NICS]>) -> Answers {
        Answers(map)
    }

    /// The answers to the probes of each NIC. One system call.
    #[must_use]
    pub fn read(&self) -> [Answer; MAX_NICS] {
        // The map has this one entry from the start.
        let words = self.0.get(&0, 0).unwrap_or([0; WORDS * MAX_NICS]);
        std::array::from_fn(|nic| {
            let [a, b, c, d, e, f, ..] = words[WORDS * nic + 2].to_ne_bytes();
            Answer {
                count: words[WORDS * nic],
                at_ns: words[WORDS * nic + 1],
                from: Mac([a, b, c, d, e, f]),
            }
        })
    }
}

impl Answer {
    /// This NIC's answers, which came partly by one NIC and partly by another.
    #[must_use]
    pub fn and(self, other: Answer) -> Answer {
        let last = if other.at_ns > self.at_ns { other } else { self };
        Answer {
            count: self.count.wrapping_add(other.count),
            ..last
        }
    }
}

/// The value of the program's map `probes`.
pub(crate) fn expected(nic: NicIndex, target: [u8; 16]) -> [u8; 20] {
    let mut value = [0; 20];
    value[..16].copy_from_slice(&target);
    value[16..].copy_from_slice(&u32::from(nic).to_ne_bytes());
    value
}
