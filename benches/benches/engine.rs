//! The frame path in one process: a worker on CPU 1 and drivers that cost next to nothing on CPU 0. Rings and the copy from guest to guest
//! by frame size; the joined loop between guest and NIC.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vnic_benches::joined::{Direction, JoinedPlan, Way, timed};

/// Frames of an iteration: enough that what is under way at its ends does not count.
const FRAMES: u64 = 4096;

fn plan(direction: Direction, packed: bool, sessions: u32) -> JoinedPlan {
    JoinedPlan {
        direction,
        packed,
        sessions,
        nics: 2,
        ports: 1,
        queue_size: 1024,
        workers: 1,
        cpu: 1,
        times: [Duration::ZERO; 2],
    }
}

/// Adds one bench; its iterations are of [`FRAMES`] frames.
fn add(criterion: &mut Criterion, group: &str, id: BenchmarkId, plan: &JoinedPlan, way: Way) {
    let mut group = criterion.benchmark_group(group);
    group.throughput(Throughput::Elements(FRAMES));
    group.measurement_time(Duration::from_secs(3));
    timed(plan, way, |time| {
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|iterations| time(iterations * FRAMES).expect("a worker that works"));
        });
    })
    .expect("memory for guests and a worker on CPU 1");
    group.finish();
}

fn engine(criterion: &mut Criterion) {
    let mut cpus = CpuSet::new();
    cpus.set(0).expect("CPU 0 fits in a set");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("this machine has a CPU 0");
    for (ring, packed) in [("split", false), ("packed", true)] {
        for size in [60, 1514, 9014] {
            let id = BenchmarkId::new(ring, size);
            let plan = plan(Direction::ToNics, packed, 1024);
            add(criterion, "guest to guest", id, &plan, Way::Guests(size));
        }
        for (group, direction) in [
            ("guest to NIC, sessions", Direction::ToNics),
            ("NIC to guest, sessions", Direction::FromNics),
        ] {
            for sessions in [1024, 1 << 20] {
                let id = BenchmarkId::new(ring, sessions);
                add(
                    criterion,
                    group,
                    id,
                    &plan(direction, packed, sessions),
                    Way::Nics,
                );
            }
        }
    }
}

criterion_group!(benches, engine);
criterion_main!(benches);
