//! What the balancer costs a frame: parsing, and a burst through the session table with few and with many sessions.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use vnic_benches::udp_frame;
use vnic_lb::balancer::{Balancer, BalancerConfig, Observed};
use vnic_lb::nics::NicInfo;
use vnic_lb::parse::parse;
use vnic_lb::policy::Algorithm;

/// Frames in a burst, as workers take them.
const BURST: usize = 32;

fn parsing(criterion: &mut Criterion) {
    let frame = udp_frame(1);
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(1));
    group.bench_function("udp4", |bencher| bencher.iter(|| parse(black_box(&frame))));
    group.finish();
}

fn steering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("steer");
    group.throughput(Throughput::Elements(BURST as u64));
    for sessions in [1_000u32, 1_000_000] {
        let balancer = Balancer::new(&BalancerConfig {
            nics: (0..8)
                .map(|nic| NicInfo {
                    id: format!("nic{nic}"),
                    weight: None,
                })
                .collect(),
            algorithm: Algorithm::Hash,
            session_capacity: 1 << 21,
            workers: 1,
            hash_key: [7; 16],
        });
        for nic in 0..8 {
            balancer.alive().set(nic, true);
        }
        let frames: Vec<Observed> = (0..sessions)
            .map(|flow| Observed {
                parsed: parse(&udp_frame(flow)),
                frame_len: 60,
                timestamps: [0; 2],
            })
            .collect();
        // Scattered, so that a big table is not walked in the order of its making.
        let stride = frames.len() / 3 * 2 + 1;
        let scattered: Vec<Observed> = (0..frames.len())
            .map(|at| frames[at * stride % frames.len()])
            .collect();
        let mut choices = Vec::with_capacity(BURST);
        for burst in frames.chunks(BURST) {
            balancer.steer(0, 0, burst, &mut choices);
        }
        let mut bursts = scattered.chunks_exact(BURST).cycle();
        group.bench_function(BenchmarkId::new("known sessions", sessions), |bencher| {
            bencher.iter(|| {
                let Some(burst) = bursts.next() else { return };
                choices.clear();
                balancer.steer(0, 1, burst, &mut choices);
                black_box(&choices);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, parsing, steering);
criterion_main!(benches);
