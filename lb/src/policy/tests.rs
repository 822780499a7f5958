use super::*;
use crate::nics::NicInfo;
use crate::slots::Server;

const IDS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A balancer's decision without a table: what is chosen is counted as a session at once.
struct Lab {
    slots: SlotTable,
    weights: [u32; MAX_NICS],
    loads: Loads,
    alive: NicSet,
    warming: NicSet,
    costs: [NicCost; MAX_NICS],
}

impl Lab {
    fn new(weights: &[u32]) -> Lab {
        let servers: Vec<_> = (0u8..)
            .zip(weights)
            .map(|(nic, &weight)| Server {
                nic,
                id: IDS[usize::from(nic)],
                weight,
            })
            .collect();
        let mut in_force = [0; MAX_NICS];
        in_force[..weights.len()].copy_from_slice(weights);
        let idle = NicCost {
            latency: 1.0,
            utilisation: 0.0,
            per_session: 1e-6,
            sessions: 0,
        };
        Lab {
            slots: SlotTable::new(&servers, &[3; 16]),
            weights: in_force,
            loads: Loads::default(),
            alive: (1 << weights.len()) - 1,
            warming: 0,
            costs: [idle; MAX_NICS],
        }
    }

    fn choose(&mut self, algorithm: Algorithm, slot: u16, opening: bool) -> Option<NicIndex> {
        let session = NewSession {
            slot,
            slots: &self.slots,
            alive: self.alive,
            warming: self.warming,
            weights: &self.weights,
            opening,
            loads: &self.loads,
        };
        let nic = choose(algorithm, &session, |nic| self.costs[usize::from(nic)])?;
        self.loads.place(nic, opening);
        Some(nic)
    }

    /// How many of a sweep over the slots go to each NIC.
    fn sweep(&mut self, algorithm: Algorithm, opening: bool) -> [u32; MAX_NICS] {
        let mut counts = [0; MAX_NICS];
        for slot in 0..=u16::MAX {
            let nic = self
                .choose(algorithm, slot.wrapping_mul(40_503), opening)
                .unwrap();
            counts[usize::from(nic)] += 1;
        }
        counts
    }
}

#[test]
fn names_round_trip_and_others_are_refused() {
    for algorithm in Algorithm::ALL {
        assert_eq!(algorithm.to_string().parse(), Ok(algorithm));
    }
    let refused = "dice".parse::<Algorithm>().unwrap_err().to_string();
    assert!(
        refused.contains("`dice`") && refused.contains("least_conn"),
        "{refused}"
    );
}

#[test]
fn hash_and_weighted_follow_the_slots_only() {
    for algorithm in [Algorithm::Hash, Algorithm::Weighted] {
        let mut lab = Lab::new(&[10, 25, 40, 100]);
        lab.loads.sessions[3] = 1_000_000;
        let counts = lab.sweep(algorithm, false);
        for (count, weight) in counts.into_iter().zip([10, 25, 40, 100]) {
            let exact = f64::from(weight) / 175.0 * 65536.0;
            assert!((f64::from(count) - exact).abs() < 1.0, "{count} of {exact}");
        }
    }
}

#[test]
fn least_conn_fills_in_proportion_to_weights() {
    let mut lab = Lab::new(&[1, 1, 2, 4]);
    assert_eq!(
        lab.sweep(Algorithm::LeastConn, false)[..4],
        [8192, 8192, 16384, 32768]
    );
    lab.loads = Loads::default();
    lab.loads.sessions[3] = 30_000;
    let counts = lab.sweep(Algorithm::LeastConn, false);
    assert_eq!(counts[..3], [11_942, 11_942, 23_884], "the others catch up first");
}

#[test]
fn the_least_loaded_gets_the_next_session() {
    let mut lab = Lab::new(&[1, 1, 1]);
    lab.loads.sessions = [5, 3, 4, 0, 0, 0, 0, 0];
    assert_eq!(lab.choose(Algorithm::LeastConn, 0, false), Some(1));
    lab.alive = 0b101;
    assert_eq!(lab.choose(Algorithm::LeastConn, 0, false), Some(2));
    lab.alive = 0;
    assert_eq!(lab.choose(Algorithm::LeastConn, 0, false), None);
}

#[test]
fn a_syn_flood_does_not_decide_where_sessions_go() {
    let mut lab = Lab::new(&[1, 1]);
    lab.loads.sessions = [110_000, 100, 0, 0, 0, 0, 0, 0];
    lab.loads.half_open = [100_000, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        lab.choose(Algorithm::LeastConn, 0, false),
        Some(1),
        "10,000 + cap against 100"
    );
    lab.loads.sessions = [100_100, 8_000, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        lab.choose(Algorithm::LeastConn, 0, false),
        Some(0),
        "all but the cap is noise"
    );
    // A flood on top of equal loads spreads like the slots.
    lab.loads = Loads {
        sessions: [5_000, 5_000, 0, 0, 0, 0, 0, 0],
        half_open: [0; MAX_NICS],
    };
    let counts = lab.sweep(Algorithm::LeastConn, true);
    assert!((32_700..32_836).contains(&counts[0]), "{counts:?}");
}

#[test]
fn drained_nics_take_nothing_unless_all_are() {
    for algorithm in Algorithm::ALL {
        let mut lab = Lab::new(&[0, 1, 1]);
        lab.loads.sessions = [0, 1000, 1000, 0, 0, 0, 0, 0];
        assert_eq!(lab.sweep(algorithm, false)[0], 0, "{algorithm}");
        lab.alive = 0b001;
        assert_eq!(
            lab.choose(algorithm, 7, false),
            Some(0),
            "{algorithm}: nobody else"
        );
        let mut all = Lab::new(&[0, 0]);
        let counts = all.sweep(algorithm, false);
        assert!(
            counts[0] > 32_000 && counts[1] > 32_000,
            "{algorithm}: {counts:?}"
        );
    }
}

#[test]
fn in_slow_start_a_nic_gets_at_most_twice_its_fair_share() {
    for algorithm in Algorithm::ALL {
        let mut lab = Lab::new(&[1; 8]);
        lab.loads.sessions = [0, 50_000, 50_000, 50_000, 50_000, 50_000, 50_000, 50_000];
        lab.costs[1..].iter_mut().for_each(|cost| cost.utilisation = 0.9);
        lab.warming = 1;
        let counts = lab.sweep(algorithm, false);
        assert!(counts[0] <= 16_384, "{algorithm}: {counts:?}");
        if algorithm.uses_load() {
            assert!(
                counts[0] > 15_500,
                "{algorithm}: and not much less, having no load: {counts:?}"
            );
        }
        lab.warming = 0xff;
        lab.loads = Loads::default();
        let counts = lab.sweep(algorithm, false);
        assert!(
            counts.iter().all(|count| (4_000..=16_384).contains(count)),
            "{algorithm}: {counts:?}"
        );
    }
}

#[test]
fn in_slow_start_a_nic_that_is_no_better_gets_its_fair_share() {
    let mut lab = Lab::new(&[1; 8]);
    lab.warming = 1;
    let counts = lab.sweep(Algorithm::Adaptive, false);
    assert!((8_192..=10_000).contains(&counts[0]), "{counts:?}");
    // Also beside NICs of other weights, and of many in slow start.
    let mut lab = Lab::new(&[1, 2, 1]);
    lab.warming = 0b011;
    let counts = lab.sweep(Algorithm::Adaptive, false);
    assert!((15_000..=24_000).contains(&counts[0]), "{counts:?}");
    assert!((30_000..=40_000).contains(&counts[1]), "{counts:?}");
    // One that is dearer gets less.
    let mut lab = Lab::new(&[1; 8]);
    lab.warming = 1;
    lab.costs[0].latency = 2.0;
    assert_eq!(lab.sweep(Algorithm::Adaptive, false)[0], 0);
}

#[test]
fn adaptive_goes_where_latency_and_load_are_low() {
    let mut lab = Lab::new(&[1, 1, 1]);
    lab.costs[0].latency = 3.0;
    lab.costs[1].utilisation = 0.5;
    assert_eq!(lab.choose(Algorithm::Adaptive, 9, false), Some(2), "3, 2 and 1");
    lab.costs[2].latency = 2.5;
    assert_eq!(lab.choose(Algorithm::Adaptive, 9, false), Some(1), "3, 2 and 2.5");
    lab.costs[1].utilisation = 5.0;
    assert_eq!(
        lab.choose(Algorithm::Adaptive, 9, false),
        Some(2),
        "beyond its capacity, but not beyond reason"
    );
}

#[test]
fn adaptive_spreads_over_equals() {
    let mut lab = Lab::new(&[1, 1]);
    lab.costs[1].latency = 1.09;
    let counts = lab.sweep(Algorithm::Adaptive, false);
    assert!(counts.iter().take(2).all(|&count| count > 20_000), "{counts:?}");
    // Sessions since the last tick count, so that even a much better NIC does not take the whole herd.
    lab.loads = Loads::default();
    lab.costs[1].latency = 1.5;
    lab.costs[0].per_session = 1e-5;
    lab.costs[1].per_session = 1e-5;
    let counts = lab.sweep(Algorithm::Adaptive, false);
    assert!(counts[0] > counts[1] && counts[1] > 10_000, "{counts:?}");
}

#[test]
fn weights_come_from_the_operator_or_the_links() {
    let state = |nic: NicIndex, weight, speed_mbps| NicState {
        nic,
        info: NicInfo {
            id: IDS[usize::from(nic)].to_owned(),
            weight,
        },
        drained: false,
        speed_mbps,
        weight: 0,
    };
    let mut nics = vec![
        state(0, None, Some(25_000)),
        state(1, None, Some(10_000)),
        state(5, None, None),
    ];
    let of = |algorithm, nics: &[NicState]| {
        let weights = weights_in_force(algorithm, nics);
        [weights[0], weights[1], weights[5]]
    };
    assert_eq!(of(Algorithm::Hash, &nics), [1, 1, 1], "no link decides");
    assert_eq!(of(Algorithm::Weighted, &nics), [25_000, 10_000, 10_000]);
    assert_eq!(of(Algorithm::LeastConn, &nics), [25_000, 10_000, 10_000]);
    nics[1].info.weight = Some(0);
    assert_eq!(of(Algorithm::Weighted, &nics), [25_000, 0, 10_000]);
    assert_eq!(of(Algorithm::Hash, &nics), [1, 0, 1]);
    nics[0].info.weight = Some(3);
    assert_eq!(of(Algorithm::Weighted, &nics), [3, 0, 1]);
    nics[0].drained = true;
    assert_eq!(of(Algorithm::Weighted, &nics), [0, 0, 1]);
}
