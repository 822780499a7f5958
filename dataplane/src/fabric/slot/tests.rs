use std::collections::HashSet;
use std::sync::Arc;

use super::*;
use crate::memory::frames::FrameMemory;

fn stock(memory: &Arc<FrameMemory>) -> Stock {
    Stock::new(ChunkCache::new(Arc::clone(memory)))
}

/// Frames of `lens` bytes, by which they are told apart.
fn burst(stock: &mut Stock, lens: impl IntoIterator<Item = usize>) -> Vec<Frame> {
    lens.into_iter()
        .map(|len| stock.chunks.alloc(len).expect("a chunk"))
        .collect()
}

fn collect(seen: &mut Vec<usize>, chunks: &mut ChunkCache, frames: &mut Vec<Frame>) {
    for frame in frames.drain(..) {
        seen.push(frame.len());
        chunks.free(frame);
    }
}

#[test]
fn a_burst_comes_after_all_that_was_handed_off_before_it() {
    let memory = FrameMemory::new(512).unwrap();
    let mut stock = stock(&memory);
    let shared = Shared::new(Vec::new(), 256);
    let held = shared.try_lock().unwrap();
    let mut frames = burst(&mut stock, 1..=200);
    let outcome = shared.put(&mut stock, &mut frames, collect);
    assert_eq!((outcome.handed_off, outcome.owing), (200, true));
    assert!(outcome.is_contended());
    drop(held);
    let mut frames = burst(&mut stock, 201..=210);
    assert_eq!(
        shared.put(&mut stock, &mut frames, collect),
        PutOutcome::default()
    );
    assert_eq!(*shared.lock(), (1..=210).collect::<Vec<_>>());
}

#[test]
fn who_leaves_frames_behind_is_told_to_come_back_until_they_are_taken() {
    let memory = FrameMemory::new(512).unwrap();
    let (mut mine, mut theirs) = (stock(&memory), stock(&memory));
    let shared = Shared::new(Vec::new(), 64);
    let held = shared.try_lock().unwrap();
    let mut frames = burst(&mut mine, [1]);
    assert!(shared.put(&mut mine, &mut frames, collect).owing);
    let back = shared.put(&mut mine, &mut Vec::new(), collect);
    assert!(back.owing && !back.is_contended(), "nothing new was put");
    drop(held);
    // Another worker, whoever it is, takes them with its own, and holds the lock again when the first comes back.
    let mut frames = burst(&mut theirs, [2]);
    assert_eq!(
        shared.put(&mut theirs, &mut frames, collect),
        PutOutcome::default()
    );
    let held = shared.try_lock().unwrap();
    assert!(!shared.put(&mut mine, &mut Vec::new(), collect).owing);
    assert_eq!(*held, [1, 2]);
}

#[test]
fn a_full_hand_off_ring_frees_the_rest() {
    let memory = FrameMemory::new(64).unwrap();
    let mut stock = stock(&memory);
    let shared: Shared<Vec<usize>> = Shared::new(Vec::new(), 4);
    let held = shared.try_lock().unwrap();
    let mut frames = burst(&mut stock, 1..=6);
    let outcome = shared.put(&mut stock, &mut frames, collect);
    assert_eq!((outcome.handed_off, outcome.dropped), (4, 2));
    drop(held);
    shared.clear(&mut stock.chunks);
    drop(stock);
    assert_eq!(memory.census().free, 64);
}

/// The steps of workers that put bursts and come back. All orders in which the steps of several threads may interleave are tried. What
/// one thread writes others may see later on a real machine; that changes nothing, as each looks for its own frames.
mod model {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    enum Step {
        /// `put`: take the lock, or push.
        Put,
        Push,
        /// After a push, or an attempt to come back: whether frames are left.
        Look,
        /// `put` of nothing.
        ComeBack,
        Fill,
        Leave,
        Done,
    }

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct State {
        locked: bool,
        handed_off: u8,
        threads: Vec<(Step, u8)>,
    }

    fn next(state: &State, thread: usize, comes_back: bool) -> Option<State> {
        let mut new = state.clone();
        let (step, bursts) = state.threads[thread];
        let done = match bursts {
            0 => (Step::Done, 0),
            more => (Step::Put, more - 1),
        };
        new.threads[thread] = match step {
            Step::Put if state.locked => (Step::Push, bursts),
            Step::ComeBack if state.locked => (Step::Look, bursts),
            Step::Put | Step::ComeBack => {
                new.locked = true;
                (Step::Fill, bursts)
            }
            Step::Push => {
                new.handed_off += 1;
                (Step::Look, bursts)
            }
            Step::Look if state.handed_off > 0 && comes_back => (Step::ComeBack, bursts),
            Step::Look => done,
            Step::Fill => {
                new.handed_off = 0;
                (Step::Leave, bursts)
            }
            Step::Leave => {
                new.locked = false;
                done
            }
            Step::Done => return None,
        };
        Some(new)
    }

    /// Whether some order leaves a frame behind that nobody will look for.
    fn leaves_frames_behind(threads: &[(Step, u8)], comes_back: bool) -> bool {
        let mut todo = vec![State {
            locked: false,
            handed_off: 0,
            threads: threads.to_vec(),
        }];
        let mut seen = HashSet::new();
        while let Some(state) = todo.pop() {
            if !seen.insert(state.clone()) {
                continue;
            }
            let all_done = state.threads.iter().all(|(step, _)| *step == Step::Done);
            if all_done && state.handed_off > 0 {
                return true;
            }
            todo.extend((0..threads.len()).filter_map(|thread| next(&state, thread, comes_back)));
        }
        false
    }

    #[test]
    fn no_order_of_steps_leaves_a_frame_behind() {
        let threads = [(Step::Put, 2), (Step::Put, 2), (Step::Put, 1)];
        assert!(!leaves_frames_behind(&threads, true));
        assert!(leaves_frames_behind(&threads, false));
    }
}
