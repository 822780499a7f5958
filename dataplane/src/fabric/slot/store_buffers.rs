//! The hand-off of [`Shared`](super::Shared) on a machine whose stores become visible late.

use crate::interleavings::{Step, Thread, View, always};

const LOCK: usize = 0;
/// Frames that each producer has pushed in all, and frames of each that were taken. Whoever counts in a real hand-off ring does so with
/// exchanges, which are fences; here the pushes are plain stores, which is weaker.
const PUSHED: usize = 1;
const TAKEN: usize = PUSHED + THREADS;
const THREADS: usize = 2;
const BURSTS: u8 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum At {
    /// `put`: take the lock, or push.
    Put,
    Push,
    /// Take what was handed off by this thread, and further ones.
    Take {
        from: usize,
    },
    Unlock,
    /// `has_handed_off`, its fence first.
    Fence,
    Check {
        from: usize,
    },
    /// `drain`: somebody else will look if it is taken.
    Try,
    Done,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Worker {
    me: usize,
    fence: bool,
    at: At,
    bursts: u8,
    pushed: u8,
}

impl Worker {
    fn to(&self, at: At) -> Step<Worker> {
        Step::To(Worker { at, ..self.clone() })
    }

    fn next_burst(&self) -> Step<Worker> {
        Step::To(match self.bursts {
            0 => Worker {
                at: At::Done,
                ..self.clone()
            },
            more => Worker {
                at: At::Put,
                bursts: more - 1,
                ..self.clone()
            },
        })
    }

    fn look(&self) -> At {
        match self.fence {
            true => At::Fence,
            false => At::Check { from: 0 },
        }
    }
}

impl Thread for Worker {
    fn step(&self, memory: &mut View<'_>) -> Step<Worker> {
        match self.at {
            // A failed attempt is no fence everywhere; so it is a load here.
            At::Put if memory.load(LOCK) == 1 => self.to(At::Push),
            At::Try if memory.load(LOCK) == 1 => self.next_burst(),
            At::Put | At::Try => match memory.swap(LOCK, 1) {
                Some(_) => self.to(At::Take { from: 0 }),
                None => Step::Blocked,
            },
            At::Push => {
                memory.store(PUSHED + self.me, self.pushed + 1);
                Step::To(Worker {
                    pushed: self.pushed + 1,
                    at: self.look(),
                    ..self.clone()
                })
            }
            At::Take { from: THREADS } => self.to(At::Unlock),
            At::Take { from } => {
                // Two accesses in one step, but all to what the lock protects, or to a counter that only grows.
                let pushed = memory.load(PUSHED + from);
                memory.store(TAKEN + from, pushed);
                self.to(At::Take { from: from + 1 })
            }
            At::Unlock => {
                memory.store(LOCK, 0);
                self.to(self.look())
            }
            At::Fence if !memory.is_drained() => Step::Blocked,
            At::Fence => self.to(At::Check { from: 0 }),
            At::Check { from: THREADS } => self.next_burst(),
            At::Check { from } if memory.load(PUSHED + from) != memory.load(TAKEN + from) => self.to(At::Try),
            At::Check { from } => self.to(At::Check { from: from + 1 }),
            At::Done => Step::Blocked,
        }
    }
}

fn nothing_is_left_behind(fence: bool) -> bool {
    let worker = |me| Worker {
        me,
        fence,
        at: At::Put,
        bursts: BURSTS,
        pushed: 0,
    };
    always(&[worker(0), worker(1)], 1 + 2 * THREADS, |_, memory| {
        memory[PUSHED..TAKEN] == memory[TAKEN..]
    })
}

#[test]
fn no_frame_is_left_behind_because_of_the_fence() {
    assert!(nothing_is_left_behind(true));
    assert!(!nothing_is_left_behind(false), "without it one can be");
}
