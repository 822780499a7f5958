//! Tries all orders in which a few threads may run on a machine with store buffers, for tests of protocols that rest on fences.
//!
//! Each thread's stores go through a queue of its own before others see them, while its loads go past that queue: that is x86's memory
//! model (TSO), and the one reordering that a full fence is for. (loom explores more of C11, but treats sequentially
//! consistent accesses as acquire and release, and would need the rings' memory, which belongs to a guest, behind its own types.)
//! What is tried here are models of the protocols; each test also leaves a fence out and sees that this is found.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;

/// What a thread does next.
pub(crate) enum Step<T> {
    /// One step, with at most one access to memory; the thread is this then.
    To(T),
    /// It cannot go on before something changes.
    Blocked,
}

/// A thread: where it is, and what it knows.
pub(crate) trait Thread: Clone + Eq + Hash {
    /// Makes a step. Nothing may have been done to `memory` if it is [`Step::Blocked`].
    fn step(&self, memory: &mut View<'_>) -> Step<Self>;
}

/// Memory as one thread sees it.
pub(crate) struct View<'a> {
    memory: &'a mut [u8],
    buffer: &'a mut VecDeque<(usize, u8)>,
}

impl View<'_> {
    pub(crate) fn load(&self, at: usize) -> u8 {
        let own = self.buffer.iter().rev().find(|(stored, _)| *stored == at);
        own.map_or(self.memory[at], |(_, value)| *value)
    }

    pub(crate) fn store(&mut self, at: usize, value: u8) {
        self.buffer.push_back((at, value));
    }

    /// Whether all stores are where others see them: what a full fence waits for.
    pub(crate) fn is_drained(&self) -> bool {
        self.buffer.is_empty()
    }

    /// An exchange, if the buffer is drained: it waits for that.
    pub(crate) fn swap(&mut self, at: usize, value: u8) -> Option<u8> {
        self.is_drained()
            .then(|| std::mem::replace(&mut self.memory[at], value))
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct State<T> {
    memory: Vec<u8>,
    threads: Vec<(T, VecDeque<(usize, u8)>)>,
}

/// Whether each order of steps and of stores becoming visible ends in a state that is `good`: one in which no thread can go on. `size`
/// bytes of memory begin as 0.
pub(crate) fn always<T: Thread>(threads: &[T], size: usize, good: impl Fn(&[T], &[u8]) -> bool) -> bool {
    let threads = threads
        .iter()
        .map(|thread| (thread.clone(), VecDeque::new()))
        .collect();
    let mut todo = vec![State {
        memory: vec![0; size],
        threads,
    }];
    let mut seen = HashSet::new();
    while let Some(state) = todo.pop() {
        if seen.contains(&state) {
            continue;
        }
        let mut stuck = true;
        for at in 0..state.threads.len() {
            let mut visible = state.clone();
            if let Some((place, value)) = visible.threads[at].1.pop_front() {
                visible.memory[place] = value;
                todo.push(visible);
                stuck = false;
            }
            let mut stepped = state.clone();
            let (thread, buffer) = &mut stepped.threads[at];
            let mut view = View {
                memory: &mut stepped.memory,
                buffer,
            };
            if let Step::To(next) = thread.step(&mut view) {
                *thread = next;
                todo.push(stepped);
                stuck = false;
            }
        }
        if stuck {
            let threads: Vec<T> = state.threads.iter().map(|(thread, _)| thread.clone()).collect();
            if !good(&threads, &state.memory) {
                return false;
            }
        }
        seen.insert(state);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dekker's: each stores to its own place, and looks at the other's.
    #[derive(Clone, PartialEq, Eq, Hash)]
    enum Dekker {
        Store { me: usize, fence: bool },
        Fence { me: usize },
        Load { me: usize },
        Done(u8),
    }

    impl Thread for Dekker {
        fn step(&self, memory: &mut View<'_>) -> Step<Dekker> {
            match *self {
                Dekker::Store { me, fence } => {
                    memory.store(me, 1);
                    Step::To(match fence {
                        true => Dekker::Fence { me },
                        false => Dekker::Load { me },
                    })
                }
                Dekker::Fence { me } if memory.is_drained() => Step::To(Dekker::Load { me }),
                Dekker::Load { me } => Step::To(Dekker::Done(memory.load(1 - me))),
                Dekker::Fence { .. } | Dekker::Done(_) => Step::Blocked,
            }
        }
    }

    #[test]
    fn a_store_may_be_seen_after_a_later_load_unless_a_fence_is_between() {
        let both = |first, second| {
            let threads = [
                Dekker::Store { me: 0, fence: first },
                Dekker::Store { me: 1, fence: second },
            ];
            always(&threads, 2, |threads, _| threads.contains(&Dekker::Done(1)))
        };
        assert!(both(true, true));
        assert!(!both(false, true) && !both(true, false) && !both(false, false));
    }
}
