//! docs/performance.md, "What memory gives": what it takes to copy frames of guests' memory and nothing else, by how many bytes are moved at a
//! time and which lines of the next frame are asked for meanwhile. Needs `--release`, x86-64 with AVX2, and a core to itself
//! (`taskset -c 1`).

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use vnic_evidence::{Claims, quantile};

const LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
const RUNS: usize = 9;
/// What is not slower by more is as fast.
const MARGIN: f64 = 1.1;

/// Lines that are read all over this memory, so many at a time.
const SCATTERED: usize = 84 << 20;
const BATCH: usize = 64;
const BATCHES: usize = 30_000;

/// Memory on huge pages that never goes back.
fn memory(bytes: usize) -> *mut u8 {
    let bytes = bytes.next_multiple_of(HUGE_PAGE);
    let layout = std::alloc::Layout::from_size_align(bytes, HUGE_PAGE).expect("a power of two");
    // SAFETY: the layout is not empty; all of it is written here.
    unsafe {
        let at = std::alloc::alloc(layout);
        assert!(!at.is_null(), "{bytes} bytes of memory");
        libc::madvise(at.cast(), bytes, libc::MADV_HUGEPAGE);
        at.write_bytes(1, bytes);
        at
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
fn scattered(memory: *const u8, ask: fn(*const u8)) -> [f64; 2] {
    let lines = SCATTERED / LINE;
    let mut state = 1u64;
    let mut anywhere = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        memory.wrapping_add(((state >> 32) as usize * lines >> 32) * LINE)
    };
    time(BATCH * BATCHES, || {
        let mut sum = 0u64;
        for _ in 0..BATCHES {
            let batch: [*const u8; BATCH] = std::array::from_fn(|_| anywhere());
            batch.iter().for_each(|&at| ask(at));
            // SAFETY: `anywhere` stays within the memory.
            sum += batch
                .iter()
                .map(|&at| u64::from(unsafe { at.read() }))
                .sum::<u64>();
        }
        black_box(sum);
    })
}

/// What of the next frame is asked for, a line with each line that is copied.
const NOTHING: u8 = 0;
const READ: u8 = 1;
const READ_AND_WRITTEN: u8 = 2;

/// Copies a frame's whole lines: from, to, where the next one's lie, and how many.
type Copy = unsafe fn([*const u8; 2], [*mut u8; 2], usize);

#[inline(always)]
fn ask<const NEXT: u8>(read: *const u8, written: *const u8) {
    if NEXT >= READ {
        ask_first_level(read);
    }
    if NEXT == READ_AND_WRITTEN {
        ask_to_write(written);
    }
}

/// Moves a line, `N` bytes at a time.
///
/// # Safety
/// Both places have a line.
#[inline(always)]
unsafe fn line<const N: usize>(from: *const u8, to: *mut u8) {
    let mut at = 0;
    while at < LINE {
        // SAFETY: as the caller vouches.
        unsafe {
            let part = from.add(at).cast::<[u8; N]>().read_unaligned();
            to.add(at).cast::<[u8; N]>().write_unaligned(part);
        }
        at += N;
    }
}

/// # Safety
/// Both frames have so many lines.
#[inline(always)]
unsafe fn by<const N: usize, const NEXT: u8>(
    [from, read]: [*const u8; 2],
    [to, written]: [*mut u8; 2],
    lines: usize,
) {
    for at in (0..lines).map(|line| line * LINE) {
        ask::<NEXT>(read.wrapping_add(at), written.wrapping_add(at));
        // SAFETY: as the caller vouches.
        unsafe { line::<N>(from.add(at), to.add(at)) };
    }
}

/// # Safety
/// As for [`by`].
#[inline(never)]
unsafe fn by_16<const NEXT: u8>(from: [*const u8; 2], to: [*mut u8; 2], lines: usize) {
    // SAFETY: as the caller vouches.
    unsafe { by::<16, NEXT>(from, to, lines) };
}

/// # Safety
/// As for [`by`]; and the processor must have AVX2.
#[inline(never)]
#[target_feature(enable = "avx2")]
unsafe fn by_32<const NEXT: u8>(from: [*const u8; 2], to: [*mut u8; 2], lines: usize) {
    // SAFETY: as the caller vouches.
    unsafe { by::<32, NEXT>(from, to, lines) };
}

/// Frames as `vnic-load` lays them out.
struct Shape {
    name: &'static str,
    bytes: usize,
    /// From one to the next.
    stride: usize,
    sent: usize,
    /// Buffers that they are copied to.
    received: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "1514 bytes, from 1024 places to 1024",
        bytes: 1514,
        stride: 2304,
        sent: 1024,
        received: 1024,
    },
    Shape {
        name: "1514 bytes, from 65,536 places to 1024",
        bytes: 1514,
        stride: 2304,
        sent: 65_536,
        received: 1024,
    },
    Shape {
        name: "9014 bytes, from 8192 places to 256",
        bytes: 9014,
        stride: 9472,
        sent: 8192,
        received: 256,
    },
];

/// Frames in less memory than that are not claimed to come from memory.
const CACHED: usize = 64 << 20;

/// Behind a virtio-net header.
const OFFSET: usize = 12;

fn copied(shape: &Shape, from: *const u8, to: *mut u8, copy: Copy) -> [f64; 2] {
    let rounds = (16_384 / shape.sent).max(1);
    time(shape.sent * rounds, || {
        for frame in 0..shape.sent * rounds {
            let read = |frame: usize| from.wrapping_add(frame % shape.sent * shape.stride + OFFSET);
            let written = |frame: usize| to.wrapping_add(frame % shape.received * shape.stride + OFFSET);
            // SAFETY: both memories have a stride for each place; `main` has looked for AVX2.
            unsafe {
                copy(
                    [read(frame), read(frame + 1)],
                    [written(frame), written(frame + 1)],
                    shape.bytes / LINE,
                );
            }
        }
        black_box(to);
    })
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    assert!(
        is_x86_feature_detected!("avx2"),
        "this needs a processor with AVX2"
    );
    let seen = |[median, best]: [f64; 2]| format!("{median:.1} (best {best:.1})");

    let lines = memory(SCATTERED);
    let first = scattered(lines, ask_first_level);
    let second = scattered(lines, ask_second_level);
    claims.check(
        "64 lines at a time come into the second-level cache as fast as into the first, or faster",
        second[0] < MARGIN * first[0],
        format!(
            "ns a line: prefetcht0 {}, prefetcht1 {}",
            seen(first),
            seen(second)
        ),
    );

    let ways: [(&str, Copy); 6] = [
        ("32 bytes at a time, what is read next asked for", by_32::<READ>),
        ("32, what is read and written next", by_32::<READ_AND_WRITTEN>),
        ("32, nothing", by_32::<NOTHING>),
        ("16, what is read next", by_16::<READ>),
        ("16, what is read and written next", by_16::<READ_AND_WRITTEN>),
        ("16, nothing", by_16::<NOTHING>),
    ];
    for shape in &SHAPES {
        let (from, to) = (
            memory(shape.sent * shape.stride),
            memory(shape.received * shape.stride),
        );
        let times = ways.map(|(_, copy)| copied(shape, from, to, copy));
        let all: Vec<String> = ways
            .iter()
            .zip(times)
            .map(|((way, _), time)| format!("\n        {way}: {} ns", seen(time)))
            .collect();
        if shape.sent * shape.stride < CACHED {
            println!("[ - ] {}, no claim\n      seen: {}", shape.name, all.concat());
            continue;
        }
        let least = times
            .iter()
            .map(|[median, _]| *median)
            .fold(f64::INFINITY, f64::min);
        claims.check(
            &format!(
                "{}: 32 at a time, with what is read next asked for, is as fast as any other way",
                shape.name
            ),
            times[0][0] < MARGIN * least,
            all.concat(),
        );
    }
    claims.exit()
}
