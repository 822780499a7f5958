//! Asking for notifications and giving them, in every order: nobody sleeps while something is there to be done.
//!
//! The same protocol runs twice in a ring, with the roles exchanged. The driver makes buffers available and the device sleeps until it is
//! kicked: `arm` of the engines is [`Sleeper`], the driver's side [`Waker`]. The device uses buffers and the driver sleeps until it is
//! called: `publish` and `notify` are [`Waker`], the driver's "enable callbacks, then look again" [`Sleeper`].

use crate::interleavings::{Step, Thread, View, always};

/// How far the waker came: the available index, the used index, or flags in a packed ring's descriptors.
const INDEX: usize = 0;
/// What the sleeper asks for.
const WISH: usize = 1;
/// The eventfd.
const EVENT: usize = 2;

/// Entries that the waker makes.
const ENTRIES: u8 = 3;

/// How a wish is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    /// 1: always; 0: never. NO_NOTIFY, NO_INTERRUPT, a packed ring's ENABLE and DISABLE.
    Flag,
    /// One more than the entry that is waited for, which may be out of date. EVENT_IDX, and a packed ring's DESC.
    Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Setting {
    form: Form,
    /// A full fence between the own store and the load of the other's.
    sleeper_fence: bool,
    waker_fence: bool,
    /// The sleeper looks again after it asked.
    looks_again: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum At {
    // Sleeper.
    Disarm,
    Look,
    Arm,
    SleeperFence,
    LookAgain,
    Sleep,
    // Waker, with the number of entries that it has made.
    Publish,
    WakerFence,
    Ask,
    Wake,
    Done,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Side {
    setting: Setting,
    at: At,
    /// Entries seen, or made.
    count: u8,
}

impl Side {
    fn to(&self, at: At) -> Step<Side> {
        Step::To(Side { at, ..self.clone() })
    }
}

impl Thread for Side {
    fn step(&self, memory: &mut View<'_>) -> Step<Side> {
        let Setting { form, .. } = self.setting;
        match self.at {
            At::Disarm => {
                if form == Form::Flag {
                    memory.store(WISH, 0);
                }
                self.to(At::Look)
            }
            At::Look => match memory.load(INDEX) {
                index if index == self.count => self.to(At::Arm),
                index => Step::To(Side {
                    count: index,
                    ..self.clone()
                }),
            },
            At::Arm => {
                let wish = match form {
                    Form::Flag => 1,
                    Form::Index => self.count + 1,
                };
                memory.store(WISH, wish);
                self.to(match (self.setting.sleeper_fence, self.setting.looks_again) {
                    (true, _) => At::SleeperFence,
                    (false, true) => At::LookAgain,
                    (false, false) => At::Sleep,
                })
            }
            At::SleeperFence if !memory.is_drained() => Step::Blocked,
            At::SleeperFence => self.to(match self.setting.looks_again {
                true => At::LookAgain,
                false => At::Sleep,
            }),
            At::LookAgain if memory.load(INDEX) == self.count => self.to(At::Sleep),
            At::LookAgain => self.to(At::Disarm),
            At::Sleep if memory.load(EVENT) == 0 => Step::Blocked,
            At::Sleep => match memory.swap(EVENT, 0) {
                Some(_) => self.to(At::Disarm),
                None => Step::Blocked,
            },
            At::Publish if self.count == ENTRIES => self.to(At::Done),
            At::Publish => {
                memory.store(INDEX, self.count + 1);
                Step::To(Side {
                    count: self.count + 1,
                    at: match self.setting.waker_fence {
                        true => At::WakerFence,
                        false => At::Ask,
                    },
                    ..self.clone()
                })
            }
            At::WakerFence if !memory.is_drained() => Step::Blocked,
            At::WakerFence => self.to(At::Ask),
            At::Ask => {
                let wanted = match form {
                    Form::Flag => memory.load(WISH) == 1,
                    Form::Index => memory.load(WISH) == self.count,
                };
                self.to(if wanted { At::Wake } else { At::Publish })
            }
            At::Wake => match memory.swap(EVENT, 1) {
                Some(_) => self.to(At::Publish),
                None => Step::Blocked,
            },
            At::Done => Step::Blocked,
        }
    }
}

fn nobody_oversleeps(setting: Setting) -> bool {
    let side = |at| Side {
        setting,
        at,
        count: 0,
    };
    always(&[side(At::Disarm), side(At::Publish)], 3, |sides, _| {
        sides[0].count == ENTRIES
    })
}

#[test]
fn who_asks_and_looks_again_misses_nothing() {
    for form in [Form::Flag, Form::Index] {
        let right = Setting {
            form,
            sleeper_fence: true,
            waker_fence: true,
            looks_again: true,
        };
        assert!(nobody_oversleeps(right), "{right:?}");
        for wrong in [
            Setting {
                sleeper_fence: false,
                ..right
            },
            Setting {
                waker_fence: false,
                ..right
            },
            Setting {
                looks_again: false,
                ..right
            },
        ] {
            assert!(!nobody_oversleeps(wrong), "{wrong:?} should be found wrong");
        }
    }
}
