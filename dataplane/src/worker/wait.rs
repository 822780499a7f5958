//! What a worker does when a turn moved nothing: a policy beside the loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Context;
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

/// Idle time spent spinning before going to sleep; several times what a wake-up costs.
const SPIN: Duration = Duration::from_micros(50);

/// Longest sleep: session timers must go on. In unit tests so long that a lost wake-up shows.
const SLEEP_MS: i32 = if cfg!(test) { 120_000 } else { 100 };

/// Longest sleep while sent frames are in flight: their chunks must come back, and nothing announces that.
const SLEEP_IN_FLIGHT_MS: i32 = 1;

pub(crate) struct Waiter {
    poll: Poll,
    shared: Arc<SharedState>,
    worker: usize,
    epoll: Epoll,
    /// A ring of the share has no kick fd, or a NIC queue nothing to wait for, and must be polled; or an fd could not be watched.
    must_poll: bool,
    idle_since: Option<Instant>,
}

impl Waiter {
    pub(crate) fn new(shared: &Arc<SharedState>, worker: usize, poll: Poll) -> io::Result<Waiter> {
        Ok(Waiter {
            poll,
            shared: Arc::clone(shared),
            worker,
            epoll: Epoll::new()?,
            must_poll: false,
            idle_since: None,
        })
    }

    /// Watches the fds of this worker's share from now on, and no others.
    pub(super) fn watch(&mut self, fabric: &Fabric) {
        if self.poll == Poll::Busy {
            return;
        }
        self.must_poll = self.try_watch(fabric).is_err();
    }

    fn try_watch(&mut self, fabric: &Fabric) -> io::Result<()> {
        // A fresh set each time: the old one may hold descriptors that mean something else by now.
        self.epoll = Epoll::new()?;
        let share = &fabric.shares[self.worker];
        self.add(self.shared.wake[self.worker].as_raw_fd(), EventSet::IN)?;
        for &(port, pair) in &share.guest_tx {
            let Some(kick) = &fabric.ports[port].pairs[pair].tx_kick else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            // Edge-triggered and never read: each write to an eventfd is an edge, and a read could block for ever if the
            // front-end read first.
            self.add(kick.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        for &(nic, queue) in &share.nic_queues {
            let rx = fabric.nics[nic].queues[queue]
                .rx
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(fd) = rx.wait_fd() else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            self.add(fd.as_raw_fd(), EventSet::IN)?;
        }
        for &nic in &share.groups {
            if let Some(group) = &fabric.nics[nic].group {
                let tap = group.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                self.add(tap.wait_fd().as_raw_fd(), EventSet::IN)?;
            }
        }
        Ok(())
    }

    fn add(&self, fd: RawFd, events: EventSet) -> io::Result<()> {
        match self
            .epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
        {
            // Two rings may share one kick eventfd.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// A turn moved frames.
    pub(super) fn busy(&mut self) {
        self.idle_since = None;
    }

    /// A turn moved nothing; returns whether it slept.
    pub(super) fn idle(&mut self, fabric: &Fabric, context: &mut Context) -> bool {
        if self.poll == Poll::Busy || self.must_poll {
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
        let armed = !context.arm(fabric);
        let timeout = if context.in_flight(fabric) {
            SLEEP_IN_FLIGHT_MS
        } else {
            SLEEP_MS
        };
        // Last: the looks above hold locks for a moment, in which another worker may have left us frames.
        let slept = armed && !owing && !context.handed_off(fabric);
        if slept {
            let mut events = [EpollEvent::default(); 16];
            // An error (EINTR) is a wake-up like any other: the next turn looks at everything.
            let count = self.epoll.wait(timeout, &mut events).unwrap_or(0);
            if events[..count]
                .iter()
                .any(|event| event.event_set().contains(EventSet::ERROR))
            {
                context.clear_errors(fabric);
            }
            // Non-blocking: fails when somebody else's event woke us.
            let _ = self.shared.wake[self.worker].read();
        }
        context.disarm(fabric);
        self.idle_since = None;
        slept
    }
}
