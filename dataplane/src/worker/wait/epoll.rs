//! Sleeping in epoll: where io_uring is forbidden, or the kernel is older than 6.1.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Trigger;

pub(super) struct EpollSleeper(Epoll);

impl EpollSleeper {
    pub(super) fn new() -> io::Result<EpollSleeper> {
        Epoll::new().map(EpollSleeper)
    }

    /// Watches these from now on, and no others.
    pub(super) fn watch(&mut self, fds: &[(RawFd, Trigger)]) -> io::Result<()> {
        // A fresh set each time: the old one may hold descriptors that mean something else by now.
        self.0 = Epoll::new()?;
        for &(fd, trigger) in fds {
            let events = match trigger {
                Trigger::Edge => EventSet::IN | EventSet::EDGE_TRIGGERED,
                Trigger::Level => EventSet::IN,
            };
            match self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0)) {
                // Two rings may share one kick eventfd.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Returns whether a descriptor has an error.
    pub(super) fn sleep(&mut self, most: Duration) -> bool {
        let mut events = [EpollEvent::default(); 16];
        let most = i32::try_from(most.as_millis()).unwrap_or(i32::MAX);
        // An error (EINTR) is a wake-up like any other: the next turn looks at everything.
        let count = self.0.wait(most, &mut events).unwrap_or(0);
        events[..count]
            .iter()
            .any(|event| event.event_set().contains(EventSet::ERROR))
    }
}
