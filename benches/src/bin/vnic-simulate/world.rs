//! Frames, NICs and chance.

use std::sync::Arc;

use vnic_benches::udp_frame;
use vnic_lb::balancer::{Balancer, BalancerConfig, Burst, Observed};
use vnic_lb::limits::SessionLimits;
use vnic_lb::nics::{NicIndex, NicInfo};
use vnic_lb::parse::parse;
use vnic_lb::policy::Algorithm;

/// Sessions of the large scenarios.
pub const MILLION: u32 = 1_000_000;
/// NICs, unless a scenario says otherwise.
pub const NICS: u8 = 8;
/// Frames in a burst, as workers take them.
pub const BURST: usize = 32;

/// Key of the slot hash in every scenario.
pub const HASH_KEY: [u8; 16] = *b"vnic-simulate-01";

/// SplitMix64.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform below a limit.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit as u64).max(1)).unwrap_or(0)
    }
}

/// A balancer with `weights.len()` NICs, all alive.
pub fn balancer(algorithm: Algorithm, weights: &[Option<u32>], capacity: usize) -> Arc<Balancer> {
    let info = |(number, &weight): (usize, &Option<u32>)| NicInfo {
        id: format!("nic{number}"),
        weight,
    };
    let balancer = Balancer::new(&BalancerConfig {
        nics: weights.iter().enumerate().map(info).collect(),
        algorithm,
        session_capacity: capacity,
        workers: 1,
        hash_key: HASH_KEY,
        timeouts: Default::default(),
        // A scenario's million may come at once.
        limits: SessionLimits {
            new_per_second: u32::MAX,
            ..SessionLimits::default()
        },
    });
    for nic in balancer.nics() {
        balancer.set_alive(nic.nic, true, 0);
    }
    balancer
}

/// [`NICS`] NICs without weights.
pub fn eight(algorithm: Algorithm, capacity: usize) -> Arc<Balancer> {
    balancer(algorithm, &[None; NICS as usize], capacity)
}

/// A frame of a session.
pub fn frame(session: u32, frame_len: u32) -> Observed {
    Observed::new(parse(&udp_frame(session)), frame_len)
}

/// One frame of each session, and the NICs that they left by.
pub fn steer_each(balancer: &Balancer, now: u32, sessions: impl Iterator<Item = u32>) -> Vec<NicIndex> {
    let (mut all, mut out, mut burst) = (Vec::new(), Vec::new(), Burst::with_capacity(BURST));
    let mut sessions = sessions.peekable();
    while let Some(session) = sessions.next() {
        burst.push_parsed(&frame(session, 100));
        if burst.len() == BURST || sessions.peek().is_none() {
            balancer.steer(0, now, &mut burst, &mut out);
            all.extend(out.iter().map(|nic| nic.unwrap_or(0)));
            burst.clear();
        }
    }
    all
}

/// The largest over the mean of the first `nics`; 1 is perfect.
pub fn imbalance(loads: &[f64], nics: usize) -> f64 {
    let loads = &loads[..nics];
    let total: f64 = loads.iter().sum();
    loads.iter().copied().fold(0.0, f64::max) * nics as f64 / total.max(f64::MIN_POSITIVE)
}

/// What each NIC carries if session i weighs `weight(i)`.
pub fn loads(nics: &[NicIndex], weight: impl Fn(usize) -> f64) -> [f64; 16] {
    let mut loads = [0.0; 16];
    for (session, &nic) in nics.iter().enumerate() {
        loads[usize::from(nic) % 16] += weight(session);
    }
    loads
}
