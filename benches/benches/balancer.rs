//! What the balancer costs: parsing, the session table with few and with many sessions, and what floods and storms do to it.
//!
//! Sessions are touched in a scattered order, so that a big table is not walked in the order of its making. Frames are made and
//! parsed in the caches, as they are in the frame loop behind the copy from the guest.
//!
//! Time is that of the thread and not of the clock on the wall, so that what else runs on the machine counts only by the caches that
//! it takes.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Throughput, criterion_group, criterion_main};
use nix::time::{ClockId, clock_gettime};
use vnic_benches::{tcp_frame, udp_frame};
use vnic_lb::Millis;
use vnic_lb::balancer::{Balancer, BalancerConfig, Burst};
use vnic_lb::key::SessionKey;
use vnic_lb::limits::{SessionLimits, Timeouts};
use vnic_lb::nics::NicInfo;
use vnic_lb::parse::parse;
use vnic_lb::policy::Algorithm;
use vnic_lb::state::{Progress, Timer};
use vnic_lb::table::{BATCH, Lookup, Meta, SessionTable};

/// Frames in a burst, as workers take them.
const BURST: usize = 32;
const SESSIONS: [u32; 3] = [1_000, 64_000, 1_000_000];
/// Sessions that the tables are sized for.
const CAPACITY: usize = 1 << 20;
const SYN: u8 = 2;

type Criterion = criterion::Criterion<ThreadTime>;

/// The processor time of the thread.
struct ThreadTime;

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

impl Measurement for ThreadTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_time()
    }

    fn end(&self, start: Duration) -> Duration {
        thread_time().saturating_sub(start)
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn balancer(capacity: usize, workers: usize) -> Arc<Balancer> {
    let balancer = Balancer::new(&BalancerConfig {
        nics: (0..8)
            .map(|nic| NicInfo {
                id: format!("nic{nic}"),
                weight: None,
            })
            .collect(),
        algorithm: Algorithm::Hash,
        session_capacity: capacity,
        workers,
        timeouts: Timeouts::default(),
        limits: SessionLimits {
            new_per_second: u32::MAX,
            ..SessionLimits::default()
        },
        hash_key: [7; 16],
    });
    for nic in 0..8 {
        balancer.alive().set(nic, true);
    }
    balancer
}

/// Numbers below `count`, each once, far from the one before.
fn scattered(count: u32) -> impl Iterator<Item = u32> + Clone {
    let stride = count / 3 * 2 + 1;
    (0..count).scan(0, move |at, _| {
        *at += stride;
        if *at >= count {
            *at -= count;
        }
        Some(*at)
    })
}

/// A burst of frames of `flows`, parsed.
fn collect(balancer: &Balancer, burst: &mut Burst, flows: &mut impl Iterator<Item = u32>) {
    burst.clear();
    for flow in flows.take(BURST) {
        balancer.collect(burst, &black_box(udp_frame(flow)), 60);
    }
}

fn parsing(criterion: &mut Criterion) {
    let tagged = |frame: [u8; 60]| [&frame[..12], &[0x81, 0, 0, 100], &frame[12..]].concat();
    let mut options = udp_frame(1);
    options[14] = 0x46;
    let frames = [
        ("udp4", udp_frame(1).to_vec()),
        ("tcp4", tcp_frame(1, 0x10).to_vec()),
        ("udp4, tagged", tagged(udp_frame(1))),
        ("udp4 with options: the general parser", options.to_vec()),
    ];
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(BURST as u64));
    let mut burst = Burst::with_capacity(BURST);
    for (name, frame) in &frames {
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                burst.clear();
                for _ in 0..BURST {
                    burst.push(black_box(frame), 60, false);
                }
                black_box(&burst);
            });
        });
    }
    group.finish();
}

fn key(flow: u32) -> SessionKey {
    *parse(&udp_frame(flow)).key()
}

/// The table alone: batches of keys that are there, and that are not.
fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    group.throughput(Throughput::Elements(BATCH as u64));
    for sessions in SESSIONS {
        let table = SessionTable::new(CAPACITY, 1, &Timeouts::default());
        let progress = Progress {
            timer: Timer::UdpTwoWay,
            spoke: 3,
            closed: 0,
        };
        for flow in 0..sessions {
            let key = key(flow);
            let hash = table.lookup(&key).hash;
            table.insert(&key, hash, Meta::new(0, 0, progress), flow / 1000, &mut |_| {});
        }
        for (name, offset) in [("hit", 0), ("miss", sessions)] {
            let keys: Vec<SessionKey> = scattered(sessions).map(|flow| key(flow + offset)).collect();
            let mut batches = keys.chunks_exact(BATCH).cycle();
            let mut found = [Lookup::NONE; BATCH];
            group.bench_function(BenchmarkId::new(name, sessions), |bencher| {
                bencher.iter(|| {
                    let Some(batch) = batches.next() else { return };
                    table.lookup_batch(batch, |key| key, &mut found);
                    black_box(&found);
                });
            });
        }
    }
    group.finish();
}

/// A frame of a known session, from its bytes to its NIC.
fn steering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse and steer");
    group.throughput(Throughput::Elements(BURST as u64));
    for workers in [1, 2] {
        for sessions in SESSIONS {
            let balancer = balancer(CAPACITY, workers);
            let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
            let mut flows = scattered(sessions).cycle();
            let mut now = 0;
            let mut turn = || {
                collect(&balancer, &mut burst, &mut flows);
                // A millisecond of a worker that takes ten million frames a second.
                now += 1;
                balancer.steer(0, now / 300, &burst, &mut choices);
                balancer.upkeep(now / 300);
                black_box(&choices);
            };
            (0..sessions as usize / BURST + 1).for_each(|_| turn());
            let name = if workers == 1 {
                "sole worker"
            } else {
                "shared table"
            };
            group.bench_function(BenchmarkId::new(name, sessions), |bencher| {
                bencher.iter(&mut turn)
            });
        }
    }
    group.finish();
}

/// New sessions, up to the capacity of the table, from the frame's bytes.
fn opening(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("open");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(BURST as u64));
    group.bench_function("new sessions", |bencher| {
        bencher.iter_custom(|bursts| {
            let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
            let (mut spent, mut left) = (Duration::ZERO, bursts);
            while left > 0 {
                let balancer = balancer(CAPACITY, 1);
                let mut flows = 0..u32::try_from(CAPACITY).unwrap_or(0);
                let bursts = left.min((CAPACITY / BURST) as u64);
                let started = thread_time();
                for now in 0..bursts {
                    collect(&balancer, &mut burst, &mut flows);
                    let now = Millis::try_from(now / 32).unwrap_or(0);
                    balancer.steer(0, now, &burst, &mut choices);
                }
                spent += thread_time() - started;
                left -= bursts;
            }
            spent
        });
    });
    group.finish();
}

/// SYNs from a million addresses, once their cap is reached.
fn flood(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flood");
    group.throughput(Throughput::Elements(BURST as u64));
    let balancer = balancer(CAPACITY, 1);
    let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
    let mut flows = scattered(1_000_000).cycle();
    let mut turn = || {
        burst.clear();
        for flow in flows.by_ref().take(BURST) {
            balancer.collect(&mut burst, &black_box(tcp_frame(flow, SYN)), 60);
        }
        balancer.steer(0, 1, &burst, &mut choices);
        black_box(&choices);
    };
    while turn_until_full(&balancer, &mut turn) {}
    group.bench_function("a SYN beyond the cap", |bencher| bencher.iter(&mut turn));
    group.finish();
}

fn turn_until_full(balancer: &Balancer, turn: &mut impl FnMut()) -> bool {
    turn();
    balancer.stats().half_open_full == 0
}

/// A million sessions that expire in the same millisecond: the longest call, which is the longest that it delays a frame, and
/// all calls together. The least of several runs is the program's, the others are the machine's.
fn storm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("expiry storm");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    let run = || {
        let balancer = balancer(CAPACITY, 1);
        let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
        let mut flows = 0..1_000_000;
        while !flows.is_empty() {
            collect(&balancer, &mut burst, &mut flows);
            balancer.steer(0, 0, &burst, &mut choices);
        }
        let sessions = balancer.stats().sessions;
        let (mut longest, mut all) = (Duration::ZERO, Duration::ZERO);
        loop {
            let started = thread_time();
            let more = balancer.upkeep(40_000);
            let took = thread_time() - started;
            (longest, all) = (longest.max(took), all + took);
            if !more {
                break;
            }
        }
        assert_eq!(balancer.stats().expired, sessions);
        (longest, all)
    };
    group.bench_function("longest call", |bencher| {
        bencher.iter_custom(|runs| (0..runs).map(|_| run().0).sum());
    });
    group.bench_function("all calls", |bencher| {
        bencher.iter_custom(|runs| (0..runs).map(|_| run().1).sum());
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion::Criterion::default().with_measurement(ThreadTime);
    targets = parsing, lookups, steering, opening, flood, storm
}
criterion_main!(benches);
