use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..251)
        .map(|byte: u8| byte.wrapping_add(seed))
        .cycle()
        .take(len)
        .collect()
}

fn bytes_of(memory: &FrameMemory, frame: &Frame) -> Vec<u8> {
    memory.segments(frame).flatten().copied().collect()
}

fn frame_of(chunks: &mut ChunkCache, bytes: &[u8]) -> Frame {
    let mut frame = chunks.alloc(bytes.len()).unwrap();
    chunks.memory().write(&mut frame, 0, bytes);
    frame
}

#[test]
fn frames_of_every_size_hold_their_bytes() {
    let memory = FrameMemory::new(64).unwrap();
    let mut chunks = ChunkCache::new(memory.clone());
    for len in [
        0,
        1,
        60,
        1514,
        2048,
        2049,
        3500,
        SEGMENT_SIZE,
        SEGMENT_SIZE + 1,
        9014,
        MAX_SEGMENTS * SEGMENT_SIZE,
    ] {
        let bytes = pattern(len, 7);
        let mut frame = chunks.alloc(len).unwrap();
        // In two pieces, so that the second begins in the middle of a segment.
        let (first, second) = bytes.split_at(len / 3);
        memory.write(&mut frame, 0, first);
        memory.write(&mut frame, first.len(), second);
        assert_eq!(bytes_of(&memory, &frame), bytes, "{len}");
        assert_eq!(frame.len(), len);
        assert_eq!(frame.segment_count(), len.div_ceil(SEGMENT_SIZE).max(1));
        if len <= SEGMENT_SIZE {
            assert_eq!(memory.head(&frame), bytes);
        }
        let copy = memory.copy_of(&mut chunks, &frame).unwrap();
        assert_eq!(bytes_of(&memory, &copy), bytes, "{len}");
        chunks.free(frame);
        chunks.free(copy);
    }
    assert!(chunks.alloc(MAX_SEGMENTS * SEGMENT_SIZE + 1).is_none());
    assert_eq!(
        memory.census(),
        Census {
            free: 64,
            ..Census::default()
        }
    );
    assert_eq!(memory.state_errors(), 0);
}

#[test]
fn a_frame_grows_and_shrinks_in_front() {
    let memory = FrameMemory::new(64).unwrap();
    let mut chunks = ChunkCache::new(memory.clone());
    for len in [1, 60, 1514, 3840, 9014] {
        let bytes = pattern(len, 3);
        let mut frame = frame_of(&mut chunks, &bytes);
        assert!(memory.push_front(&mut frame, 4));
        memory.write(&mut frame, 0, b"tag!");
        assert_eq!(bytes_of(&memory, &frame), [b"tag!", &bytes[..]].concat());
        assert_eq!(frame.len(), len + 4);
        assert!(memory.pull_front(&mut frame, 4));
        assert_eq!(bytes_of(&memory, &frame), bytes);
        assert_eq!(frame.len(), len);
        chunks.free(frame);
    }
    let mut frame = frame_of(&mut chunks, &pattern(60, 0));
    assert!(!memory.pull_front(&mut frame, 60), "nothing would be left");
    let pushes = (0..u16::MAX).take_while(|_| memory.push_front(&mut frame, 4));
    let room = 4 * pushes.count();
    assert!((HEADROOM..CHUNK_SIZE).contains(&room), "{room}");
    assert_eq!(frame.len(), 60 + room);
    chunks.free(frame);
    assert_eq!(memory.state_errors(), 0);
}

#[test]
fn running_out_in_the_middle_of_a_frame_gives_back_what_was_taken() {
    let memory = FrameMemory::new(3).unwrap();
    let mut chunks = ChunkCache::new(memory.clone());
    let held = chunks.alloc(60).unwrap();
    assert!(chunks.alloc(9014).is_none());
    assert_eq!(
        memory.census(),
        Census {
            free: 2,
            held: 1,
            ..Census::default()
        }
    );
    chunks.free(held);
    let jumbo = chunks.alloc(9014).unwrap();
    assert!(chunks.alloc(60).is_none());
    chunks.free(jumbo);
}

#[test]
#[should_panic(expected = "past the end")]
fn writing_past_the_end_panics() {
    let memory = FrameMemory::new(1).unwrap();
    let mut frame = ChunkCache::new(memory.clone()).alloc(60).unwrap();
    memory.write(&mut frame, 59, &[0, 0]);
}

#[test]
#[should_panic(expected = "another frame memory")]
fn a_frame_of_another_memory_is_refused() {
    let frame = ChunkCache::new(FrameMemory::new(1).unwrap()).alloc(60).unwrap();
    let _ = FrameMemory::new(1).unwrap().head(&frame);
}

#[test]
fn no_chunks_is_an_error() {
    assert!(FrameMemory::new(0).is_err());
}

#[test]
fn a_dropped_cache_gives_its_chunks_to_others() {
    let memory = FrameMemory::new(8).unwrap();
    let mut first = ChunkCache::new(memory.clone());
    let frame = first.alloc(60).unwrap();
    let mut second = ChunkCache::new(memory.clone());
    assert!(second.alloc(60).is_none(), "the first cache took the whole batch");
    first.free(frame);
    drop(first);
    let frame = second.alloc(60).unwrap();
    second.free(frame);
    second.flush();
    assert_eq!(memory.pool().len(), 8);
}

#[test]
fn a_mismatch_is_counted_and_the_chunk_is_not_used_again() {
    let memory = FrameMemory::new(2).unwrap();
    let mut chunks = ChunkCache::new(memory.clone());
    let (one, other) = (QueueOwner::new(3), QueueOwner::new(3));
    let address = chunks.take_for_fill(one).unwrap();
    // Another queue of the same NIC, a completion, an address out of the region, a length past the chunk.
    assert!(memory.take_received(other, None, address, 60).is_err());
    memory.take_completed(one, &mut chunks, address);
    memory.take_completed(one, &mut chunks, 1 << 40);
    assert!(memory.take_received(one, None, address + 4000, 97).is_err());
    assert_eq!(memory.state_errors(), 4);
    let frame = memory.take_received(one, None, address + 256, 60).unwrap();
    // The kernel says the same thing twice.
    assert!(memory.take_received(one, None, address + 256, 60).is_err());
    assert_eq!(memory.state_errors(), 5);
    chunks.free(frame);
    assert_eq!(
        memory.census(),
        Census {
            free: 2,
            ..Census::default()
        }
    );
}

#[test]
fn a_retired_queue_keeps_its_chunks_until_they_are_released() {
    let memory = FrameMemory::new(4).unwrap();
    let mut chunks = ChunkCache::new(memory.clone());
    let (gone, living) = (QueueOwner::new(1), QueueOwner::new(1));
    let _ = chunks.take_for_fill(gone).unwrap();
    let kept = chunks.take_for_fill(living).unwrap();
    let sent = chunks.alloc(60).unwrap();
    let mut address = 0;
    memory.give_to_nic(gone, sent, |at, _, _| address = at);
    assert_eq!(memory.quarantine(gone), 2);
    assert_eq!(
        memory.census(),
        Census {
            free: 1,
            fill: 1,
            quarantined: 2,
            ..Census::default()
        }
    );
    // A completion that comes too late changes nothing.
    memory.take_completed(gone, &mut chunks, address);
    assert_eq!(memory.state_errors(), 1);
    assert_eq!(memory.release(gone), 2);
    memory.skip_received(living, &mut chunks, kept);
    assert_eq!(
        memory.census(),
        Census {
            free: 4,
            ..Census::default()
        }
    );
}

#[derive(Debug, Clone)]
enum Step {
    Alloc(usize),
    Free,
    Send,
    Complete,
    Fill,
    Receive(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..16_000usize).prop_map(Step::Alloc),
        Just(Step::Free),
        Just(Step::Send),
        Just(Step::Complete),
        Just(Step::Fill),
        (0..3840u32).prop_map(Step::Receive),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Whatever the order, chunks are neither lost nor doubled, and frames keep their bytes.
    #[test]
    fn chunks_are_conserved(steps in steps()) {
        const CHUNKS: u32 = 24;
        let memory = FrameMemory::new(CHUNKS).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        let owner = QueueOwner::new(0);
        let mut frames: VecDeque<(Frame, Vec<u8>)> = VecDeque::new();
        let (mut sent, mut filled) = (VecDeque::new(), VecDeque::new());
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Alloc(len) => {
                    if let Some(mut frame) = chunks.alloc(len) {
                        let bytes = pattern(len, u8::try_from(number).unwrap());
                        memory.write(&mut frame, 0, &bytes);
                        frames.push_back((frame, bytes));
                    }
                }
                Step::Free => if let Some((frame, bytes)) = frames.pop_front() {
                    prop_assert_eq!(bytes_of(&memory, &frame), bytes);
                    chunks.free(frame);
                },
                Step::Send => if let Some((frame, bytes)) = frames.pop_back() {
                    let mut total = 0;
                    memory.give_to_nic(owner, frame, |address, len, _| {
                        total += len as usize;
                        sent.push_back(address);
                    });
                    prop_assert_eq!(total, bytes.len());
                },
                Step::Complete => if let Some(address) = sent.pop_front() {
                    memory.take_completed(owner, &mut chunks, address);
                },
                Step::Fill => filled.extend(chunks.take_for_fill(owner)),
                Step::Receive(len) => if let Some(address) = filled.pop_front() {
                    let frame = memory.take_received(owner, None, address + 256, len).unwrap();
                    let bytes = bytes_of(&memory, &frame);
                    frames.push_back((frame, bytes));
                },
            }
            let census = memory.census();
            prop_assert_eq!(census.free + census.held + census.fill + census.tx, CHUNKS);
            let held: usize = frames.iter().map(|(frame, _)| frame.segment_count()).sum();
            prop_assert_eq!(census.held as usize, held);
            prop_assert_eq!(census.tx as usize, sent.len());
            prop_assert_eq!(census.fill as usize, filled.len());
        }
        prop_assert_eq!(memory.state_errors(), 0);
        for (frame, bytes) in frames {
            prop_assert_eq!(bytes_of(&memory, &frame), bytes);
            chunks.free(frame);
        }
    }
}

#[test]
fn caches_of_two_threads_share_one_pool() {
    let memory = FrameMemory::new(1024).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..2u8 {
            let memory = &memory;
            scope.spawn(move || {
                let mut chunks = ChunkCache::new(memory.clone());
                for _ in 0..50 {
                    let frames: Vec<_> = (0..300)
                        .map(|_| frame_of(&mut chunks, &pattern(100, seed)))
                        .collect();
                    for frame in frames {
                        assert_eq!(memory.head(&frame), pattern(100, seed));
                        chunks.free(frame);
                    }
                }
            });
        }
    });
    assert_eq!(memory.state_errors(), 0);
    assert_eq!(memory.pool().len(), 1024);
}
