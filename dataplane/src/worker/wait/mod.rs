//! What a worker does when a turn moved nothing: a policy beside the loop.

mod epoll;
mod uring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use self::epoll::EpollSleeper;
use self::uring::UringSleeper;
use super::Context;
use super::held::Held;
use crate::engine::SharedState;
use crate::fabric::Fabric;

/// How workers wait for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Spin: lowest latency, a whole core.
    Busy,
    /// Spin for a little while, then ask for notifications and sleep.
    Adaptive,
}

/// What idle workers sleep in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SleepIn {
    /// io_uring where the kernel has it and allows it, else epoll.
    #[default]
    Auto,
    /// epoll.
    Epoll,
}

/// How a descriptor ends a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    /// Each event once: an eventfd that is never read.
    Edge,
    /// As long as it is readable.
    Level,
}

enum Sleeper {
    Epoll(EpollSleeper),
    /// `None` until the worker's own thread makes it.
    Uring(Option<Box<UringSleeper>>),
}

/// Idle time spent spinning before going to sleep; several times what a wake-up costs.
const SPIN: Duration = Duration::from_micros(50);

/// Idle turns between two looks at the clock.
const IDLE_CLOCK_TURNS: u32 = 8;

/// Longest sleep: session timers must go on. In unit tests so long that a lost wake-up shows.
const SLEEP: Duration = Duration::from_millis(if cfg!(test) { 120_000 } else { 100 });

/// Longest sleep while sent frames are in flight: their chunks must come back, and nothing announces that.
const SLEEP_IN_FLIGHT: Duration = Duration::from_millis(1);

pub(crate) struct Waiter {
    poll: Poll,
    shared: Arc<SharedState>,
    worker: usize,
    sleeper: Sleeper,
    /// A ring of the share has no kick fd, or a NIC queue nothing to wait for, and must be polled; or an fd could not be watched.
    must_poll: bool,
    idle_since: Option<Instant>,
    /// Idle turns since the last look at the clock.
    idle_turns: u32,
}

/// Decides what the workers will sleep in, and says so.
pub(crate) fn choose(poll: Poll, sleep_in: SleepIn) -> SleepIn {
    if poll == Poll::Busy || sleep_in == SleepIn::Epoll {
        return SleepIn::Epoll;
    }
    match UringSleeper::new() {
        Ok(_) => {
            info!("idle workers sleep in io_uring");
            SleepIn::Auto
        }
        Err(error) => {
            info!(
                "idle workers sleep in epoll: there is no io_uring, or none of Linux 6.1 and later: {error}"
            );
            SleepIn::Epoll
        }
    }
}

impl Waiter {
    /// `sleep_in`: from [`choose`].
    pub(crate) fn new(
        shared: &Arc<SharedState>,
        worker: usize,
        poll: Poll,
        sleep_in: SleepIn,
    ) -> io::Result<Waiter> {
        Ok(Waiter {
            poll,
            shared: Arc::clone(shared),
            worker,
            sleeper: match sleep_in {
                SleepIn::Auto => Sleeper::Uring(None),
                SleepIn::Epoll => Sleeper::Epoll(EpollSleeper::new()?),
            },
            must_poll: false,
            idle_since: None,
            idle_turns: 0,
        })
    }

    /// Watches the fds of this worker's share from now on, and no others.
    pub(super) fn watch(&mut self, fabric: &Fabric) {
        if self.poll == Poll::Busy {
            return;
        }
        let fds = self.fds(fabric);
        let must_poll = fds.is_none();
        // Who must poll watches nothing; a poll that is still under way would keep what it is for open after it is gone.
        let fds = fds.unwrap_or_default();
        if let Sleeper::Uring(sleeper) = &mut self.sleeper {
            let watched = match sleeper {
                Some(sleeper) => sleeper.watch(&fds),
                None => UringSleeper::new()
                    .and_then(|mut new| new.watch(&fds).map(|()| new))
                    .map(|new| *sleeper = Some(Box::new(new))),
            };
            match watched {
                Ok(()) => {
                    self.must_poll = must_poll;
                    return;
                }
                Err(error) => {
                    warn!(
                        worker = self.worker,
                        "cannot sleep in io_uring any more, using epoll: {error}"
                    );
                }
            }
        }
        self.must_poll = self.watch_by_epoll(&fds).is_err() || must_poll;
    }

    fn watch_by_epoll(&mut self, fds: &[(RawFd, Trigger)]) -> io::Result<()> {
        if let Sleeper::Uring(_) = self.sleeper {
            self.sleeper = Sleeper::Epoll(EpollSleeper::new()?);
        }
        match &mut self.sleeper {
            Sleeper::Epoll(sleeper) => sleeper.watch(fds),
            Sleeper::Uring(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// What may bring this worker work; `None` if something of its share cannot be waited for.
    fn fds(&self, fabric: &Fabric) -> Option<Vec<(RawFd, Trigger)>> {
        let share = &fabric.shares[self.worker];
        let mut fds = vec![(self.shared.wake[self.worker].as_raw_fd(), Trigger::Level)];
        for &(port, pair) in &share.guest_tx {
            let kick = fabric.ports[port].pairs[pair].tx_kick.as_ref()?;
            // Edge-triggered and never read: each write to an eventfd is an edge, and a read could block for ever if the
            // front-end read first.
            fds.push((kick.as_raw_fd(), Trigger::Edge));
        }
        for &(nic, queue) in &share.nic_queues {
            fds.push((fabric.nics[nic].queues[queue].wait_fd?, Trigger::Level));
        }
        for &nic in &share.groups {
            if let Some(group) = &fabric.nics[nic].group {
                fds.push((group.wait_fd, Trigger::Level));
            }
        }
        Some(fds)
    }

    /// A turn moved frames.
    pub(super) fn busy(&mut self) {
        self.idle_since = None;
    }

    /// A turn moved nothing; returns whether it slept.
    pub(super) fn idle(&mut self, fabric: &Fabric, context: &mut Context, held: &mut Held<'_>) -> bool {
        if self.poll == Poll::Busy || self.must_poll {
            std::hint::spin_loop();
            return false;
        }
        // A look at the clock costs as much as a look at a ring.
        self.idle_turns = (self.idle_turns + 1) % IDLE_CLOCK_TURNS;
        if self.idle_turns != 0 {
            std::hint::spin_loop();
            return false;
        }
        let now = Instant::now();
        if now.duration_since(*self.idle_since.get_or_insert(now)) < SPIN {
            std::hint::spin_loop();
            return false;
        }
        // Ask for kicks, then look again: a buffer made available before the driver saw the request is found here, one made
        // available after it is announced. NIC sockets and the wake eventfd are level-triggered, so they cannot be missed.
        let owing = context.service_senders(fabric);
        let armed = !held.arm();
        let timeout = if context.in_flight(fabric) {
            SLEEP_IN_FLIGHT
        } else {
            SLEEP
        };
        let slept = armed && !owing;
        if slept {
            let failed = match &mut self.sleeper {
                Sleeper::Epoll(sleeper) => sleeper.sleep(timeout),
                Sleeper::Uring(Some(sleeper)) => sleeper.sleep(timeout),
                Sleeper::Uring(None) => false,
            };
            if failed {
                context.clear_errors(fabric);
            }
            // Non-blocking: fails when somebody else's event woke us.
            let _ = self.shared.wake[self.worker].read();
        }
        held.disarm();
        self.idle_since = None;
        slept
    }
}
