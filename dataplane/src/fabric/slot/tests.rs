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
    assert_eq!(
        outcome,
        PutOutcome {
            contended: true,
            handed_off: 200,
            ..PutOutcome::default()
        }
    );
    drop(held);
    let mut frames = burst(&mut stock, 201..=210);
    assert_eq!(
        shared.put(&mut stock, &mut frames, collect),
        PutOutcome::default()
    );
    assert_eq!(*shared.lock(), (1..=210).collect::<Vec<_>>());
}

#[test]
fn who_leaves_frames_behind_is_told_to_come_back() {
    let memory = FrameMemory::new(512).unwrap();
    let (mut mine, mut theirs) = (stock(&memory), stock(&memory));
    let shared = Shared::new(Vec::new(), 64);
    // Another worker pushes a frame whenever we hold the lock, without end.
    let mut pushed = 0;
    let mut push = || {
        pushed += 1;
        let mut frames = burst(&mut theirs, [pushed]);
        let outcome = shared.put(&mut theirs, &mut frames, collect);
        assert_eq!((outcome.handed_off, outcome.owing), (1, false), "it relies on us");
    };
    let mut frames = burst(&mut mine, [1000]);
    let outcome = shared.put(&mut mine, &mut frames, |seen, chunks, frames| {
        push();
        collect(seen, chunks, frames);
    });
    assert!(outcome.owing);
    assert!(shared.has_handed_off());
    assert_eq!(
        shared.put(&mut mine, &mut Vec::new(), collect),
        PutOutcome::default()
    );
    assert!(!shared.has_handed_off());
    let seen = shared.lock().clone();
    assert_eq!(seen, std::iter::once(1000).chain(1..=pushed).collect::<Vec<_>>());
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

/// The steps of [`Shared::put`] and [`Shared::drain`], and of a worker that looks at a queue before it sleeps. All orders in which
/// the steps of several threads may interleave are tried. Steps are sequentially consistent: the fences make the two reads that
/// matter so.
mod model {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    enum Step {
        /// `put`: take the lock, or push.
        Put,
        Push,
        Fill,
        /// Let go, then `drain` with that many rounds.
        Unlock(u8),
        Check(u8),
        Try(u8),
        Take(u8),
        /// `in_flight` and `has_handed_off`.
        Look,
        EndLook,
        LookBack,
        Done,
    }

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct State {
        locked: bool,
        handed_off: u8,
        threads: Vec<(Step, u8)>,
        /// A thread knows that it must come back.
        owing: bool,
    }

    /// What may be left out of the protocol, to see that it matters.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Omit {
        Nothing,
        LastCheck,
        DrainAfterUnlock,
        LookBack,
    }

    const ROUNDS: u8 = 2;

    fn next(state: &State, thread: usize, omit: Omit) -> Option<State> {
        let mut new = state.clone();
        let (step, bursts) = state.threads[thread];
        let done = |bursts| match bursts {
            0 => (Step::Done, 0),
            more => (Step::Put, more - 1),
        };
        new.threads[thread] = match step {
            Step::Put if state.locked => (Step::Push, bursts),
            Step::Put => {
                new.locked = true;
                (Step::Fill, bursts)
            }
            Step::Push => {
                new.handed_off += 1;
                (Step::Check(ROUNDS), bursts)
            }
            Step::Fill => {
                new.handed_off = 0;
                (Step::Unlock(ROUNDS), bursts)
            }
            Step::Unlock(rounds) => {
                new.locked = false;
                match omit {
                    Omit::DrainAfterUnlock => done(bursts),
                    _ => (Step::Check(rounds), bursts),
                }
            }
            Step::Check(_) if state.handed_off == 0 => done(bursts),
            Step::Check(0) => {
                new.owing |= omit != Omit::LastCheck;
                done(bursts)
            }
            Step::Check(rounds) => (Step::Try(rounds), bursts),
            Step::Try(_) if state.locked => done(bursts),
            Step::Try(rounds) => {
                new.locked = true;
                (Step::Take(rounds), bursts)
            }
            Step::Take(rounds) => {
                // A batch of one.
                new.handed_off = state.handed_off.saturating_sub(1);
                (Step::Unlock(rounds - 1), bursts)
            }
            Step::Look if state.locked => (Step::LookBack, bursts),
            Step::Look => {
                new.locked = true;
                (Step::EndLook, bursts)
            }
            Step::EndLook => {
                new.locked = false;
                match omit {
                    Omit::LookBack => (Step::Done, 0),
                    _ => (Step::LookBack, bursts),
                }
            }
            Step::LookBack => {
                new.owing |= state.handed_off > 0;
                (Step::Done, 0)
            }
            Step::Done => return None,
        };
        Some(new)
    }

    /// Whether some order leaves a frame behind that nobody will look for.
    fn leaves_frames_behind(threads: &[(Step, u8)], omit: Omit) -> bool {
        let mut todo = vec![State {
            locked: false,
            handed_off: 0,
            threads: threads.to_vec(),
            owing: false,
        }];
        let mut seen = HashSet::new();
        while let Some(state) = todo.pop() {
            if !seen.insert(state.clone()) {
                continue;
            }
            let all_done = state.threads.iter().all(|(step, _)| *step == Step::Done);
            if all_done && state.handed_off > 0 && !state.owing {
                return true;
            }
            todo.extend((0..threads.len()).filter_map(|thread| next(&state, thread, omit)));
        }
        false
    }

    #[test]
    fn no_order_of_steps_leaves_a_frame_behind() {
        let putters = [(Step::Put, 2), (Step::Put, 2), (Step::Put, 1)];
        let with_a_sleeper = [(Step::Put, 2), (Step::Put, 2), (Step::Look, 0)];
        for threads in [&putters, &with_a_sleeper] {
            assert!(!leaves_frames_behind(threads, Omit::Nothing));
            assert!(leaves_frames_behind(threads, Omit::LastCheck));
            assert!(leaves_frames_behind(threads, Omit::DrainAfterUnlock));
        }
        assert!(leaves_frames_behind(&with_a_sleeper, Omit::LookBack));
    }
}
