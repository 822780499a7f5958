//! The frame loop at steady state takes no memory and waits for nobody: both are counted here.
//!
//! One test a process: whatever allocates on a thread that is neither the test's nor the process's first (the test runner's), is a
//! worker.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::{getpid, gettid};
use vnic_benches::joined::{Direction, JoinedPlan, Way, timed};

/// Allocations, enlargements and releases of workers.
static ELSEWHERE: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static OURS: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

fn count() {
    // A thread that is ending has no such variable any more.
    let ours = OURS.try_with(Cell::get).unwrap_or(true);
    if !ours && gettid() != getpid() {
        ELSEWHERE.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: all is left to the system's allocator; counting takes no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often the workers have given up their CPUs to wait: what a lock that somebody holds, or any sleep, would make them do.
fn waits_of_workers() -> Vec<u64> {
    let tasks = fs::read_dir("/proc/self/task").expect("this process has threads");
    let workers = tasks
        .filter_map(|task| Some(task.ok()?.path()))
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("worker-")));
    workers.map(|worker| waits_of(&worker)).collect()
}

fn waits_of(thread: &Path) -> u64 {
    let status = fs::read_to_string(thread.join("status")).expect("a thread has a status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|count| count.trim().parse().ok())
        .expect("a number")
}

#[test]
fn the_frame_loop_neither_allocates_nor_waits() {
    const FRAMES: u64 = 500_000;
    OURS.set(true);
    for (packed, workers) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
        for (way, direction) in [
            (Way::Nics, Direction::ToNics),
            (Way::Nics, Direction::FromNics),
            (Way::Guests(60), Direction::ToNics),
            (Way::Guests(1514), Direction::ToNics),
        ] {
            let plan = JoinedPlan {
                direction,
                packed,
                sessions: 1024,
                nics: 2,
                ports: 2,
                queue_size: 256,
                workers,
                cpu: 0,
                times: [Duration::ZERO; 2],
            };
            timed(&plan, way, |run| {
                // Every list has its room after that: also those of a worker that shares its CPU with the generator.
                run(3 * FRAMES).expect("warm workers");
                let before = (ELSEWHERE.load(Ordering::Relaxed), waits_of_workers());
                assert_eq!(before.1.len(), workers);
                run(FRAMES).expect("busy workers");
                let after = (ELSEWHERE.load(Ordering::Relaxed), waits_of_workers());
                assert_eq!(after, before, "(allocations, waits), {plan:?}, {way:?}");
            })
            .expect("a joined loop");
        }
    }
    assert!(
        ELSEWHERE.load(Ordering::Relaxed) > 0,
        "workers allocate when they start"
    );
}
