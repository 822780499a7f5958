//! Sleeping in io_uring: one system call arms what must be armed, sleeps, and has the timer. Linux 6.1 and later.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::Trigger;

/// Polls that are armed with one system call; more take several.
const ENTRIES: u32 = 256;

/// User data of requests whose outcome does not matter.
const NOBODY: u64 = u64::MAX;

struct Watched {
    fd: RawFd,
    trigger: Trigger,
    /// A poll is under way.
    armed: bool,
}

/// To be used by the thread that made it only: the kernel refuses all others.
pub(super) struct UringSleeper {
    ring: IoUring,
    watched: Vec<Watched>,
    /// Tells the polls of the present set from those of earlier ones: the upper half of their user data; the lower is a position
    /// in `watched`.
    round: u32,
}

impl UringSleeper {
    pub(super) fn new() -> io::Result<UringSleeper> {
        // With DEFER_TASKRUN completions are prepared only while we are in the kernel anyway; a busy worker is not interrupted
        // for them.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)?;
        Ok(UringSleeper {
            ring,
            watched: Vec::new(),
            round: 0,
        })
    }

    /// Watches these from now on, and no others.
    pub(super) fn watch(&mut self, fds: &[(RawFd, Trigger)]) -> io::Result<()> {
        let armed: Vec<u64> = (0..)
            .zip(&self.watched)
            .filter(|(_, watched)| watched.armed)
            .map(|(at, _)| self.user_data(at))
            .collect();
        let any = !armed.is_empty();
        for user_data in armed {
            // A poll holds its file open.
            self.push(&opcode::PollRemove::new(user_data).build().user_data(NOBODY))?;
        }
        if any {
            self.enter(Duration::ZERO)?;
        }
        self.round = self.round.wrapping_add(1);
        self.watched = fds
            .iter()
            .map(|&(fd, trigger)| Watched {
                fd,
                trigger,
                armed: false,
            })
            .collect();
        Ok(())
    }

    /// Returns whether a descriptor has an error.
    pub(super) fn sleep(&mut self, most: Duration) -> bool {
        let mut failed = self.arm().is_err() || self.enter(most).is_err();
        for event in self.ring.completion() {
            let [low, high] = [event.user_data(), event.user_data() >> 32].map(|word| word & 0xffff_ffff);
            let at = usize::try_from(low).unwrap_or(usize::MAX);
            let Some(watched) = self.watched.get_mut(at).filter(|_| high == u64::from(self.round)) else {
                continue;
            };
            if !cqueue::more(event.flags()) {
                watched.armed = false;
            }
            failed |= event.result() < 0 || event.result() & i32::from(libc::POLLERR) != 0;
        }
        failed
    }

    /// Arms what is not: an edge-triggered poll stays until it is removed, a level-triggered one is made anew once it has fired, and
    /// then fires at once while the descriptor is still readable.
    fn arm(&mut self) -> io::Result<()> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        for at in 0..self.watched.len() {
            let Watched { fd, trigger, armed } = self.watched[at];
            if armed {
                continue;
            }
            let poll = opcode::PollAdd::new(Fd(fd), events).multi(trigger == Trigger::Edge);
            let poll = poll
                .build()
                .user_data(self.user_data(u32::try_from(at).map_err(io::Error::other)?));
            self.push(&poll)?;
            self.watched[at].armed = true;
        }
        Ok(())
    }

    fn user_data(&self, at: u32) -> u64 {
        u64::from(self.round) << 32 | u64::from(at)
    }

    fn push(&mut self, request: &squeue::Entry) -> io::Result<()> {
        // SAFETY: requests to add and remove polls refer to no memory of ours, only to a descriptor by number.
        if unsafe { self.ring.submission().push(request) }.is_ok() {
            return Ok(());
        }
        self.ring.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(request) }.map_err(io::Error::other)
    }

    /// Submits what was pushed, and waits for one completion at least, or until the time is up.
    fn enter(&mut self, most: Duration) -> io::Result<()> {
        let time = Timespec::from(most);
        let arguments = SubmitArgs::new().timespec(&time);
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            // The time is up; a signal; completions that must be taken first: all are wake-ups like any other.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn an_edge_wakes_once_and_a_level_until_it_is_read() {
        let (edge, level) = (event(), event());
        let mut sleeper = UringSleeper::new().expect("io_uring is allowed where this is tested");
        let fds = [
            (edge.as_raw_fd(), Trigger::Edge),
            (level.as_raw_fd(), Trigger::Level),
        ];
        sleeper.watch(&fds).unwrap();
        // Written before it was watched or after: either wakes.
        for _ in 0..3 {
            edge.write(1).unwrap();
            assert!(!sleeper.sleep(LONG));
            let fired = |sleeper: &UringSleeper| sleeper.watched.iter().any(|watched| !watched.armed);
            assert!(!fired(&sleeper), "the edge's poll stays");
            level.write(1).unwrap();
            for _ in 0..2 {
                assert!(!sleeper.sleep(LONG));
                assert!(fired(&sleeper));
            }
            level.read().unwrap();
            sleeper.sleep(Duration::ZERO);
            assert!(!fired(&sleeper), "nothing is there to wake us");
        }
    }

    #[test]
    fn what_is_not_watched_any_more_does_not_wake_and_is_let_go() {
        let (old, new) = (event(), event());
        let mut sleeper = UringSleeper::new().unwrap();
        for _ in 0..100 {
            sleeper.watch(&[(old.as_raw_fd(), Trigger::Edge)]).unwrap();
            sleeper.sleep(Duration::ZERO);
            old.write(1).unwrap();
            sleeper.watch(&[(new.as_raw_fd(), Trigger::Level)]).unwrap();
            old.write(1).unwrap();
            new.write(1).unwrap();
            while sleeper.watched[0].armed || new.read().is_err() {
                sleeper.sleep(LONG);
            }
        }
        // A pipe's reader is told when the last writer is gone: here, that a poll holds it.
        let (reader, writer) = std::io::pipe().unwrap();
        sleeper.watch(&[(writer.as_raw_fd(), Trigger::Level)]).unwrap();
        sleeper.sleep(Duration::ZERO);
        drop(writer);
        sleeper.watch(&[]).unwrap();
        assert_eq!(std::io::Read::read(&mut &reader, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn more_than_the_submission_queue_holds_can_be_watched() {
        let events: Vec<EventFd> = (0..ENTRIES + 50).map(|_| event()).collect();
        let fds: Vec<_> = events
            .iter()
            .map(|event| (event.as_raw_fd(), Trigger::Edge))
            .collect();
        let mut sleeper = UringSleeper::new().unwrap();
        for _ in 0..3 {
            sleeper.watch(&fds).unwrap();
            sleeper.sleep(Duration::ZERO);
            events.last().unwrap().write(1).unwrap();
            assert!(!sleeper.sleep(LONG));
        }
    }

    #[test]
    fn a_descriptor_that_cannot_be_watched_is_an_error_and_no_sleep() {
        let mut sleeper = UringSleeper::new().unwrap();
        sleeper.watch(&[(99_999, Trigger::Edge)]).unwrap();
        assert!(sleeper.sleep(LONG));
        assert!(sleeper.sleep(LONG), "again and again: the worker polls");
    }
}
