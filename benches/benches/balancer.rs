//! What the balancer costs: parsing, the session table with few and with many sessions, and what floods and storms do to it.
//!
//! Sessions are touched in a scattered order, so that a big table is not walked in the order of its making. Frames are made and
//! parsed in the caches, as they are in the frame loop behind the copy from the guest.
//!
//! Time is that of the thread and not of the clock on the wall unless a bench says so, so that what else runs on the machine counts only by the caches that
//! it takes.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Throughput, criterion_group, criterion_main};
use nix::time::{ClockId, clock_gettime};
use prefetch_index::prefetch_index;
use vnic_benches::{tcp_frame, udp_frame};
use vnic_lb::balancer::{Balancer, BalancerConfig, Burst};
use vnic_lb::key::SessionKey;
use vnic_lb::limits::{SessionLimits, Timeouts};
use vnic_lb::nics::NicInfo;
use vnic_lb::parse::parse;
use vnic_lb::policy::Algorithm;
use vnic_lb::state::{Progress, Timer};
use vnic_lb::table::{BATCH, Lookup, Meta, Search, SessionTable};

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

/// A burst of frames of `flows`, parsed. All are written before the first is read, as a worker copies a burst first.
fn collect(balancer: &Balancer, burst: &mut Burst, flows: &mut impl Iterator<Item = u32>) {
    collect_frames(balancer, burst, flows.take(BURST).map(udp_frame));
}

fn collect_frames(balancer: &Balancer, burst: &mut Burst, frames: impl Iterator<Item = [u8; 60]>) {
    burst.clear();
    let mut written = [[0; 60]; BURST];
    let count = written
        .iter_mut()
        .zip(frames)
        .map(|(slot, frame)| *slot = frame)
        .count();
    for frame in &black_box(&written)[..count] {
        balancer.collect(burst, frame, 60);
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
            table.insert(&key, hash, Meta::new(0, progress), flow / 1000, &mut |_| {});
        }
        for (name, offset) in [("hit", 0), ("miss", sessions)] {
            let keys: Vec<SessionKey> = scattered(sessions).map(|flow| key(flow + offset)).collect();
            let mut batches = keys.chunks_exact(BATCH).cycle();
            let mut found = [Lookup::NONE; BATCH];
            group.bench_function(BenchmarkId::new(name, sessions), |bencher| {
                bencher.iter(|| {
                    let Some(batch) = batches.next() else { return };
                    let searches: [Search; BATCH] = std::array::from_fn(|at| table.begin(&batch[at]));
                    table.finish(&searches, |&search| search, &mut found);
                    black_box(&found);
                });
            });
        }
    }
    group.finish();
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(u64);

/// The least that memory lets a lookup cost: cache lines all over as much memory as the buckets have, each batch asked for before the
/// first of it is read. Most lookups need one of them.
fn lines(criterion: &mut Criterion) {
    let [buckets, _] = SessionTable::new(CAPACITY, 1, &Timeouts::default()).addresses();
    let bytes = buckets.len();
    let lines: Vec<Line> = (0..).map(Line).take(bytes / size_of::<Line>()).collect();
    let mut state = 1_u64;
    let mut anywhere = || {
        // Knuth's multiplier for linear congruential generators; its upper half is good enough to choose by.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(((state >> 32) * lines.len() as u64) >> 32).unwrap_or(0)
    };
    let mut group = criterion.benchmark_group("lookup");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("lines of as much memory", |bencher| {
        bencher.iter(|| {
            let batch: [usize; BATCH] = std::array::from_fn(|_| anywhere());
            for at in batch {
                prefetch_index(&lines, at);
            }
            batch.iter().fold(0, |sum, &at| sum ^ lines[at].0)
        });
    });
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
                balancer.steer(0, now / 300, &mut burst, &mut choices);
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

/// New sessions, from the frame's bytes: the mean over a table that goes from empty to full.
fn opening(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("open");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(BURST as u64));
    group.bench_function("new sessions", |bencher| {
        bencher.iter_custom(|bursts| {
            let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
            let balancer = balancer(CAPACITY, 1);
            let mut flows = 0..u32::try_from(CAPACITY).unwrap_or(0);
            let (started, mut made) = (thread_time(), 0u32);
            while !flows.is_empty() {
                collect(&balancer, &mut burst, &mut flows);
                made += 1;
                balancer.steer(0, made / 32, &mut burst, &mut choices);
            }
            (thread_time() - started).mul_f64(bursts as f64 / f64::from(made))
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
        let syns = flows.by_ref().take(BURST).map(|flow| tcp_frame(flow, SYN));
        collect_frames(&balancer, &mut burst, syns);
        balancer.steer(0, 1, &mut burst, &mut choices);
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

/// What a million sessions that expire in the same millisecond make of the calls that see to it, by wall clock. The longest
/// call is the longest that it delays a frame; an empty loop of the same length tells how much of that the machine's own
/// interrupts make.
fn storm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("expiry storm");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    let calls = || {
        let balancer = balancer(CAPACITY, 1);
        let (mut burst, mut choices) = (Burst::with_capacity(BURST), Vec::with_capacity(BURST));
        let mut flows = 0..1_000_000;
        while !flows.is_empty() {
            collect(&balancer, &mut burst, &mut flows);
            balancer.steer(0, 0, &mut burst, &mut choices);
        }
        let sessions = balancer.stats().sessions;
        let calls = pauses(|| balancer.upkeep(40_000));
        assert_eq!(balancer.stats().expired, sessions);
        calls
    };
    let empty = || {
        let mut left = 10_000;
        pauses(|| {
            let started = Instant::now();
            while started.elapsed() < Duration::from_micros(6) {}
            left -= 1;
            left > 0
        })
    };
    let longest = |calls: &Vec<Duration>| calls[calls.len() - 1];
    let most = |calls: &Vec<Duration>| calls[calls.len() * 99 / 100];
    let of = |runs: u64, make: &dyn Fn() -> Vec<Duration>, pick: &dyn Fn(&Vec<Duration>) -> Duration| {
        (0..runs).map(|_| pick(&make())).sum::<Duration>()
    };
    group.bench_function("99 % of calls", |bencher| {
        bencher.iter_custom(|runs| of(runs, &calls, &most));
    });
    group.bench_function("longest call", |bencher| {
        bencher.iter_custom(|runs| of(runs, &calls, &longest));
    });
    group.bench_function("longest of 10,000 rounds of 6 us of an empty loop", |bencher| {
        bencher.iter_custom(|runs| of(runs, &empty, &longest));
    });
    group.bench_function("all calls", |bencher| {
        bencher.iter_custom(|runs| of(runs, &calls, &|calls| calls.iter().sum()));
    });
    group.finish();
}

/// Losses in one measurement of [`failover`].
const LOSSES: usize = 2000;

/// What the loss of a NIC costs with a million sessions in the table, by wall clock: to say it, and the first burst after it,
/// whose sessions were all on that NIC, so that each is pinned anew; beside them the same burst just before. Other
/// programs on the machine make the highest of such short times meaningless, hence two quantiles.
fn failover(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("failover with 1,000,000 sessions");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    let balancer = balancer(CAPACITY, 4);
    let mut sessions = Placed::new(&balancer, 1_000_000);
    let quantiles = [("median", LOSSES / 2), ("99 %", LOSSES * 99 / 100)];
    let times = [
        ("the burst before", 0),
        ("set_alive", 1),
        ("the first burst after", 2),
    ];
    for ((name, time), (quantile, rank)) in times
        .into_iter()
        .flat_map(|time| quantiles.map(|quantile| (time, quantile)))
    {
        group.bench_function(format!("{name}, {quantile}"), |bencher| {
            bencher.iter_custom(|runs| {
                (0..runs)
                    .map(|_| {
                        let mut all: Vec<Duration> = (0..LOSSES)
                            .map(|number| sessions.lose(&balancer, number % 8)[time])
                            .collect();
                        all.sort_unstable();
                        all[rank]
                    })
                    .sum()
            });
        });
    }
    group.finish();
    assert_eq!(balancer.stats().sessions, 1_000_000, "all are pinned still");
}

/// The sessions of each NIC, the one that was used longest ago first.
struct Placed {
    by_nic: [VecDeque<u32>; 8],
    burst: Burst,
    choices: Vec<Option<u8>>,
}

impl Placed {
    fn new(balancer: &Balancer, sessions: u32) -> Placed {
        let mut placed = Placed {
            by_nic: Default::default(),
            burst: Burst::with_capacity(BURST),
            choices: Vec::with_capacity(BURST),
        };
        let mut flows = scattered(sessions);
        loop {
            let some: Vec<u32> = flows.by_ref().take(BURST).collect();
            if some.is_empty() {
                return placed;
            }
            placed.steer(balancer, &some);
            placed.note(&some);
        }
    }

    fn steer(&mut self, balancer: &Balancer, flows: &[u32]) -> Duration {
        collect(balancer, &mut self.burst, &mut flows.iter().copied());
        let started = Instant::now();
        balancer.steer(0, 1, &mut self.burst, &mut self.choices);
        started.elapsed()
    }

    fn note(&mut self, flows: &[u32]) {
        for (&flow, nic) in flows.iter().zip(&self.choices) {
            self.by_nic[usize::from(nic.unwrap_or(0))].push_back(flow);
        }
    }

    /// Loses a NIC and has it back: how long its sessions' burst took before, the loss, and the burst after it. The two
    /// bursts are of different sessions, so that neither finds the other's in the cache.
    fn lose(&mut self, balancer: &Balancer, nic: usize) -> [Duration; 3] {
        let lost = u8::try_from(nic).unwrap_or(0);
        let before: Vec<u32> = self.by_nic[nic].drain(..BURST).collect();
        let after: Vec<u32> = self.by_nic[nic].drain(..BURST).collect();
        let usual = self.steer(balancer, &before);
        assert!(self.choices.iter().all(|&choice| choice == Some(lost)));
        self.note(&before);
        let started = Instant::now();
        balancer.set_alive(lost, false, 1);
        let loss = started.elapsed();
        let moving = self.steer(balancer, &after);
        assert!(
            self.choices
                .iter()
                .all(|&choice| choice.is_some_and(|choice| choice != lost))
        );
        self.note(&after);
        balancer.set_alive(lost, true, 1);
        [usual, loss, moving]
    }
}

/// How long each call takes until one returns false, in ascending order.
fn pauses(mut call: impl FnMut() -> bool) -> Vec<Duration> {
    let mut pauses = Vec::new();
    loop {
        let started = Instant::now();
        let more = call();
        pauses.push(started.elapsed());
        if !more {
            break;
        }
    }
    pauses.sort_unstable();
    pauses
}

criterion_group! {
    name = benches;
    config = criterion::Criterion::default().with_measurement(ThreadTime);
    targets = parsing, lookups, lines, steering, opening, flood, storm, failover
}
criterion_main!(benches);
