//! docs/performance.md, "What memory gives": what asking for cache lines ahead costs and gains, by where they are asked into and how many
//! are asked for at a time. Needs `--release`, x86-64, and a core to itself (`taskset -c 1`).

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use vnic_evidence::{Claims, quantile};

const LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
const RUNS: usize = 9;

/// Lines that are read all over this memory, so many at a time.
const SCATTERED: usize = 84 << 20;
const BATCH: usize = 64;
const BATCHES: usize = 30_000;

/// Jumbo frames are copied from so many places to so many.
const FRAME: usize = 141 * LINE;
const STRIDE: usize = 9216;
const SENT: usize = 8192;
const RECEIVED: usize = 256;

/// Memory on huge pages that never goes back.
fn memory(bytes: usize) -> &'static mut [u8] {
    let bytes = bytes.next_multiple_of(HUGE_PAGE);
    let layout = std::alloc::Layout::from_size_align(bytes, HUGE_PAGE).expect("a power of two");
    // SAFETY: the layout is not empty; the memory is written before it is handed out, and is nobody else's.
    unsafe {
        let at = std::alloc::alloc(layout);
        assert!(!at.is_null(), "{bytes} bytes of memory");
        libc::madvise(at.cast(), bytes, libc::MADV_HUGEPAGE);
        at.write_bytes(1, bytes);
        std::slice::from_raw_parts_mut(at, bytes)
    }
}

fn ask_first_level(at: *const u8) {
    // SAFETY: a prefetch has no effect but on the caches, whatever the address.
    unsafe { _mm_prefetch(at.cast(), _MM_HINT_T0) };
}

fn ask_second_level(at: *const u8) {
    // SAFETY: as above.
    unsafe { _mm_prefetch(at.cast(), _MM_HINT_T1) };
}

fn ask_to_write(at: *const u8) {
    // SAFETY: as above.
    unsafe { asm!("prefetchw [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags)) };
}

/// Median and best nanoseconds of an item, of several runs of so many items.
fn time(items: usize, mut run: impl FnMut()) -> [f64; 2] {
    let mut samples: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e9 / items as f64
        })
        .collect();
    [quantile(&mut samples, 0.5), quantile(&mut samples, 0.0)]
}

/// A line anywhere, each batch asked for before the first of it is read.
fn scattered(memory: &[u8], ask: fn(*const u8)) -> [f64; 2] {
    let lines = memory.len() / LINE;
    let mut state = 1u64;
    let mut anywhere = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 32) as usize * lines >> 32) * LINE
    };
    time(BATCH * BATCHES, || {
        let mut sum = 0u64;
        for _ in 0..BATCHES {
            let batch: [usize; BATCH] = std::array::from_fn(|_| anywhere());
            batch.iter().for_each(|&at| ask(&raw const memory[at]));
            sum += batch.iter().map(|&at| u64::from(memory[at])).sum::<u64>();
        }
        black_box(sum);
    })
}

/// When the next frame's lines are asked for.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    /// All of both buffers before a frame is copied.
    AtOnce,
    /// One, to be read, with each line that is copied.
    LineByLine,
    /// Never.
    Not,
}

fn copied(from: &[u8], to: &mut [u8], next: Next) -> [f64; 2] {
    time(SENT, || {
        for frame in 0..SENT {
            let read = &from[frame * STRIDE..][..FRAME];
            let read_next = &from[(frame + 1) % SENT * STRIDE..][..FRAME];
            if next == Next::AtOnce {
                let write_next = &to[(frame + 1) % RECEIVED * STRIDE..][..FRAME];
                for at in (0..FRAME).step_by(LINE) {
                    ask_second_level(&raw const read_next[at]);
                    ask_to_write(&raw const write_next[at]);
                }
            }
            let written = &mut to[frame % RECEIVED * STRIDE..][..FRAME];
            for at in (0..FRAME).step_by(LINE) {
                if next == Next::LineByLine {
                    ask_second_level(&raw const read_next[at]);
                }
                written[at..at + LINE].copy_from_slice(&read[at..at + LINE]);
            }
        }
        black_box(&to);
    })
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    let seen = |[median, best]: [f64; 2]| format!("{median:.1} (best {best:.1})");

    let lines = memory(SCATTERED);
    let first = scattered(lines, ask_first_level);
    let second = scattered(lines, ask_second_level);
    claims.check(
        "64 lines at a time come faster into the second-level cache than into the first",
        second[0] < first[0],
        format!(
            "ns a line: prefetcht0 {}, prefetcht1 {}",
            seen(first),
            seen(second)
        ),
    );

    let (from, to) = (memory(SENT * STRIDE), memory(RECEIVED * STRIDE));
    let [at_once, line_by_line, not] =
        [Next::AtOnce, Next::LineByLine, Next::Not].map(|next| copied(from, to, next));
    claims.check(
        "a jumbo frame is copied faster if the next one is asked for line by line than at once",
        line_by_line[0] < at_once[0],
        format!(
            "ns a frame: at once {}, line by line {}, not at all {}",
            seen(at_once),
            seen(line_by_line),
            seen(not)
        ),
    );
    claims.exit()
}
