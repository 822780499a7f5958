mod properties;

use super::*;
use crate::memory::frames::{ChunkCache, Frame, FrameMemory, MAX_SEGMENTS, SEGMENT_SIZE};
use crate::virtq::testing::{Driver, Kind, MEMORY_END};
use crate::virtq::{Ring, RingError};

/// Bytes of the longest frame.
const LONGEST: usize = MAX_SEGMENTS * SEGMENT_SIZE;

/// The header of a frame that asks for nothing, with VERSION_1 or MRG_RXBUF.
const PLAIN: [u8; 12] = [0; 12];

fn chunks(count: u32) -> ChunkCache {
    ChunkCache::new(FrameMemory::new(count).unwrap())
}

fn bytes_of(memory: &FrameMemory, frame: &Frame) -> Vec<u8> {
    memory.segments(frame).flatten().copied().collect()
}

/// Bytes that differ by frame and place.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 7 + at / 251 + usize::from(seed) * 31) % 256).unwrap())
        .collect()
}

fn make_frame(cache: &mut ChunkCache, bytes: &[u8]) -> Frame {
    let mut frame = cache.alloc(bytes.len()).unwrap();
    cache.memory().write(&mut frame, 0, bytes);
    frame
}

/// Cuts bytes at the given places (taken modulo what is left).
fn cut<'a>(mut bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    for &at in cuts {
        let (part, rest) = bytes.split_at(at % (bytes.len() + 1));
        parts.push(part);
        bytes = rest;
    }
    parts.push(bytes);
    parts
}

/// Makes a test of a function for each kind of ring.
macro_rules! for_both_kinds {
    ($($test:ident),+ $(,)?) => {$(
        mod $test {
            use super::Kind;

            #[test]
            fn split() {
                super::$test(Kind::Split);
            }

            #[test]
            fn packed() {
                super::$test(Kind::Packed);
            }
        }
    )+};
}

for_both_kinds!(
    a_header_may_be_spread_over_up_to_twelve_descriptors,
    every_reason_to_drop_is_counted_and_the_chain_completed,
    the_longest_frame_passes_and_an_absurdly_cut_one_is_dropped,
    legacy_rings_have_a_header_of_ten_bytes,
    a_broken_chain_ends_the_burst_and_then_the_ring,
    discarding_completes_without_looking,
    without_enough_buffers_none_is_consumed,
    frames_that_can_never_fit_are_skipped,
    more_chains_than_a_batch_holds,
    a_guest_whose_memory_shrinks_does_not_take_the_daemon_along,
);

/// What a burst from a guest gave beside its frames.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct GuestTxBurst {
    chains: usize,
    bytes: u64,
    no_chunk: usize,
    too_short: usize,
    too_long: usize,
    bad_header: usize,
}

/// Takes a burst into frame memory, as a worker does where all of it goes there.
fn take_from_guest(
    ring: &mut Ring,
    chunks: &mut ChunkCache,
    out: &mut Vec<Frame>,
    max: usize,
) -> Result<GuestTxBurst, RingError> {
    let mut looks = Vec::new();
    look(ring, max, &mut looks)?;
    let flawed = |flaw| looks.iter().filter(|look| look.flaw() == Some(flaw)).count();
    let picks: Vec<_> = looks
        .iter()
        .enumerate()
        .filter(|(_, look)| look.flaw().is_none())
        .collect();
    let before = out.len();
    let taken = super::take(ring, picks.iter().copied(), chunks, out);
    finish(ring);
    Ok(GuestTxBurst {
        chains: looks.len(),
        bytes: out[before..].iter().map(|frame| frame.len() as u64).sum(),
        no_chunk: picks.len() - taken,
        too_short: flawed(Flaw::TooShort),
        too_long: flawed(Flaw::TooLong),
        bad_header: flawed(Flaw::BadHeader),
    })
}

/// Takes one burst and frees its frames; returns their bytes.
fn take(ring: &mut Ring, cache: &mut ChunkCache) -> (GuestTxBurst, Vec<Vec<u8>>) {
    let mut out = Vec::new();
    let burst = take_from_guest(ring, cache, &mut out, 64).unwrap();
    let taken = out.iter().map(|frame| bytes_of(cache.memory(), frame)).collect();
    out.into_iter().for_each(|frame| cache.free(frame));
    (burst, taken)
}

fn a_header_may_be_spread_over_up_to_twelve_descriptors(kind: Kind) {
    let frame = pattern(100, 1);
    let whole = [&PLAIN[..], &frame].concat();
    for pieces in 1..=12 {
        let mut cuts = vec![1; pieces - 1];
        cuts.push(12 - (pieces - 1));
        for indirect in [None, Some(0), Some(pieces)] {
            let mut driver = Driver::of(kind, 32, 65535);
            let head = driver.send(&cut(&whole, &cuts), indirect);
            let mut cache = chunks(8);
            let (burst, taken) = take(&mut driver.ring(), &mut cache);
            assert_eq!(
                burst,
                GuestTxBurst {
                    chains: 1,
                    bytes: 100,
                    ..GuestTxBurst::default()
                }
            );
            assert_eq!(taken, std::slice::from_ref(&frame), "{pieces} pieces");
            assert_eq!(driver.used(), [(head, 0)]);
        }
    }
}

fn every_reason_to_drop_is_counted_and_the_chain_completed(kind: Kind) {
    let mut driver = Driver::of(kind, 64, 0);
    let needs_csum = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let gso = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let data_valid = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9];
    let long = pattern(LONGEST + 1, 2);
    let frame = pattern(64, 3);
    let mut heads = vec![
        driver.send(&[&PLAIN[..11]], None),
        driver.send(&[&[], &[]], None),
        driver.offer(&[(MEMORY_END, 64, true)], None),
        driver.send(&[&needs_csum, &frame], None),
        driver.send(&[&gso, &frame], None),
        driver.send(&[&PLAIN], None),
        driver.send(&[&PLAIN, &frame[..13]], None),
        driver.send(&[&PLAIN, &long], None),
    ];
    heads.push(driver.send(&[&data_valid, &frame[..14]], None));
    let mut ring = driver.ring();
    let mut cache = chunks(8);
    let (burst, taken) = take(&mut ring, &mut cache);
    let expected = GuestTxBurst {
        chains: 9,
        bytes: 60,
        no_chunk: 0,
        too_short: 2,
        too_long: 1,
        bad_header: 5,
    };
    assert_eq!(burst, expected);
    assert_eq!(
        taken,
        [[&frame[..14], &[0; 46]].concat()],
        "padded with zeros to 60 bytes"
    );
    assert_eq!(
        driver.used(),
        heads.iter().map(|&head| (head, 0)).collect::<Vec<_>>()
    );

    let mut none = chunks(1);
    let only = none.alloc(60).unwrap();
    driver.send(&[&PLAIN, &frame], None);
    let (burst, _) = take(&mut ring, &mut none);
    assert_eq!(
        burst,
        GuestTxBurst {
            chains: 1,
            no_chunk: 1,
            ..GuestTxBurst::default()
        }
    );
    none.free(only);
    assert_eq!(driver.used().len(), 1);
}

fn the_longest_frame_passes_and_an_absurdly_cut_one_is_dropped(kind: Kind) {
    let longest = pattern(LONGEST, 4);
    let mut driver = Driver::of(kind, 2048, 0);
    driver.send(&[&PLAIN, &longest], None);
    let crumbs = pattern(1100, 5);
    driver.send(&[&PLAIN, &crumbs[..20]], None);
    let in_crumbs: Vec<&[u8]> = std::iter::once(&PLAIN[..]).chain(crumbs.chunks(1)).collect();
    driver.send(&in_crumbs, None);
    let mut ring = driver.ring();
    let mut cache = chunks(8);
    let (first, taken) = take(&mut ring, &mut cache);
    assert_eq!((first.chains, taken[0].len()), (2, LONGEST));
    assert_eq!(taken[0], longest);
    // The third did not fit beside the others, and does not fit alone.
    let (second, _) = take(&mut ring, &mut cache);
    assert_eq!(
        second,
        GuestTxBurst {
            chains: 1,
            too_long: 1,
            ..GuestTxBurst::default()
        }
    );
    assert_eq!(driver.used().len(), 3);
}

fn legacy_rings_have_a_header_of_ten_bytes(kind: Kind) {
    let mut driver = Driver::of(kind, 8, 0);
    (driver.spec.version_1, driver.spec.mergeable) = (false, false);
    let frame = pattern(80, 6);
    driver.send(&[&PLAIN[..10], &frame], None);
    let mut cache = chunks(8);
    assert_eq!(
        take(&mut driver.ring(), &mut cache).1,
        std::slice::from_ref(&frame)
    );

    let mut driver = Driver::of(kind, 8, 0);
    (driver.spec.version_1, driver.spec.mergeable) = (false, false);
    let (head, buffers) = driver.post(&[10, 100], None);
    let frames = [make_frame(&mut cache, &frame)];
    let burst = give_to_guest(&mut driver.ring(), cache.memory(), &frames).unwrap();
    assert_eq!(
        burst,
        GuestRxBurst {
            delivered: 1,
            bytes: 80,
            too_long: 0
        }
    );
    assert_eq!(driver.used(), [(head, 90)]);
    assert_eq!(driver.read(buffers[0].0, 90), [&PLAIN[..10], &frame].concat());
}

fn a_broken_chain_ends_the_burst_and_then_the_ring(kind: Kind) {
    let mut driver = Driver::of(kind, 8, 0);
    driver.send(&[&PLAIN, &pattern(60, 1)], None);
    driver.offer(&[(MEMORY_END - 1, 2, false)], None);
    let mut ring = driver.ring();
    let mut cache = chunks(8);
    assert_eq!(take(&mut ring, &mut cache).0.chains, 1);
    let mut out = Vec::new();
    let error = take_from_guest(&mut ring, &mut cache, &mut out, 64).unwrap_err();
    assert_eq!(
        error,
        RingError::BufferOutsideMemory {
            head: 2,
            addr: MEMORY_END - 1,
            len: 2
        }
    );
    assert_eq!(discard_from_guest(&mut ring, 64), Err(error));
    assert_eq!(driver.used().len(), 1);
    assert_eq!(ring.base(), driver.settled_base());

    let mut driver = Driver::of(kind, 8, 0);
    driver.post(&[200], None);
    driver.offer(&[(0, 100, false)], None);
    let mut ring = driver.ring();
    let frames = [
        make_frame(&mut cache, &pattern(60, 1)),
        make_frame(&mut cache, &pattern(60, 2)),
    ];
    assert_eq!(
        give_to_guest(&mut ring, cache.memory(), &frames)
            .unwrap()
            .delivered,
        1
    );
    let error = give_to_guest(&mut ring, cache.memory(), &frames[1..]).unwrap_err();
    assert_eq!(error, RingError::NothingWritable { head: 1 });
    assert_eq!(driver.used().len(), 1);
    assert_eq!(ring.base(), driver.settled_base());
}

fn discarding_completes_without_looking(kind: Kind) {
    let mut driver = Driver::of(kind, 8, 65534);
    let heads = [(); 4].map(|()| driver.send(&[b"not even a header"], None));
    let mut ring = driver.ring();
    assert_eq!(discard_from_guest(&mut ring, 3), Ok(3));
    assert_eq!(discard_from_guest(&mut ring, 3), Ok(1));
    assert_eq!(discard_from_guest(&mut ring, 3), Ok(0));
    assert_eq!(driver.used(), heads.map(|head| (head, 0)));
}

fn without_enough_buffers_none_is_consumed(kind: Kind) {
    let mut driver = Driver::of(kind, 8, 65535);
    let mut cache = chunks(8);
    let bytes = pattern(300, 7);
    let frames = [make_frame(&mut cache, &bytes)];
    let mut ring = driver.ring();
    let mut posted = vec![
        driver.post(&[100], None),
        driver.post(&[100], None),
        driver.post(&[111], None),
    ];
    assert_eq!(
        give_to_guest(&mut ring, cache.memory(), &frames),
        Ok(GuestRxBurst::default())
    );
    assert_eq!(
        (ring.base(), ring.has_available(), driver.used().len()),
        (driver.spec.base, true, 0)
    );

    posted.push(driver.post(&[50], None));
    assert_eq!(
        give_to_guest(&mut ring, cache.memory(), &frames)
            .unwrap()
            .delivered,
        1
    );
    let used: Vec<_> = posted
        .iter()
        .zip([100, 100, 111, 1])
        .map(|((head, _), len)| (*head, len))
        .collect();
    assert_eq!(driver.used(), used);
    let got: Vec<u8> = posted
        .iter()
        .zip(&used)
        .flat_map(|((_, b), u)| driver.read(b[0].0, u.1 as usize))
        .collect();
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0], "num_buffers");
    assert_eq!(got[12..], bytes);
}

fn frames_that_can_never_fit_are_skipped(kind: Kind) {
    // Mergeable, but all buffers of the ring together are too small.
    let mut driver = Driver::of(kind, 4, 0);
    let mut cache = chunks(8);
    for _ in 0..4 {
        driver.post(&[50], None);
    }
    let frames = [189, 188].map(|len| make_frame(&mut cache, &pattern(len, 8)));
    let mut ring = driver.ring();
    let burst = give_to_guest(&mut ring, cache.memory(), &frames).unwrap();
    assert_eq!(
        burst,
        GuestRxBurst {
            delivered: 1,
            bytes: 188,
            too_long: 1
        }
    );
    assert_eq!(driver.used().len(), 4);

    // Not mergeable: one chain a frame, num_buffers 1, and a chain that is too small stays.
    let mut driver = Driver::of(kind, 8, 0);
    driver.spec.mergeable = false;
    let (head, buffers) = driver.post(&[100], None);
    let (second, _) = driver.post(&[1000], None);
    let frames = [89, 88, 988].map(|len| make_frame(&mut cache, &pattern(len, 9)));
    let mut ring = driver.ring();
    let burst = give_to_guest(&mut ring, cache.memory(), &frames).unwrap();
    assert_eq!(
        burst,
        GuestRxBurst {
            delivered: 2,
            bytes: 1076,
            too_long: 1
        }
    );
    assert_eq!(driver.used(), [(head, 100), (second, 1000)]);
    assert_eq!(driver.read(buffers[0].0, 12)[10..], [1, 0]);
}

fn more_chains_than_a_batch_holds(kind: Kind) {
    // 800 tiny buffers: a frame that needs 250 of them fits a batch only when the batch is begun anew for it.
    let mut driver = Driver::of(kind, 1024, 65000);
    let mut cache = chunks(16);
    for _ in 0..800 {
        driver.post(&[10], None);
    }
    let frames = [2488, 2488, 2550].map(|len| make_frame(&mut cache, &pattern(len, 1)));
    let mut ring = driver.ring();
    let burst = give_to_guest(&mut ring, cache.memory(), &frames).unwrap();
    assert_eq!(
        burst,
        GuestRxBurst {
            delivered: 2,
            bytes: 4976,
            too_long: 1
        }
    );
    assert_eq!(driver.used().len(), 500);
    assert_eq!(ring.base(), driver.settled_base());
}

fn a_guest_whose_memory_shrinks_does_not_take_the_daemon_along(kind: Kind) {
    let mut driver = Driver::of(kind, 8, 0);
    driver.send(&[&PLAIN, &pattern(64, 1)], None);
    let mut ring = driver.ring();
    driver.shrink();
    let mut cache = chunks(4);
    // The whole ring is gone; what replaces it reads as zeros, so nothing is available or it is an error.
    let mut out = Vec::new();
    let result = take_from_guest(&mut ring, &mut cache, &mut out, 8);
    assert_eq!(result, Ok(GuestTxBurst::default()));
}
