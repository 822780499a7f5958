//! Telling the driver of used buffers, without ever waiting for it.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Whether the move of an index from `old` to `new` passes the event index that the other side asked for
/// (virtio 1.2, 2.7.7.2 and 2.7.10: `vring_need_event`).
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The call eventfd of a ring.
pub(super) struct Call {
    fd: Option<Arc<EventFd>>,
    errors: u64,
}

impl Call {
    pub(super) fn new(fd: Option<Arc<EventFd>>) -> Call {
        if let Some(fd) = &fd {
            set_nonblocking(fd);
        }
        Call { fd, errors: 0 }
    }

    pub(super) fn replace(&mut self, fd: Option<Arc<EventFd>>) {
        let errors = self.errors;
        *self = Call {
            errors,
            ..Call::new(fd)
        };
    }

    pub(super) fn errors(&self) -> u64 {
        self.errors
    }

    /// Writes the eventfd if there is one; returns whether it did.
    pub(super) fn signal(&mut self) -> bool {
        let Some(fd) = &self.fd else { return false };
        match fd.write(1) {
            Ok(()) => true,
            // The counter is at its maximum: the driver has more than enough notifications waiting.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => true,
            Err(_) => {
                self.errors += 1;
                false
            }
        }
    }
}

/// The front-end chose the flags of its eventfd; a full counter must not block a worker. A failure leaves things as they are.
///
/// The flags belong to the open file, which the front-end shares: one that clears the flag again and fills the counter can still block
/// a worker. Asking first (poll, or the flags once more) would leave the same gap, eventfds cannot be opened anew, and their write
/// takes no RWF_NOWAIT.
fn set_nonblocking(fd: &EventFd) {
    // SAFETY: fcntl with these commands touches no memory of ours.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags >= 0 && flags & libc::O_NONBLOCK == 0 {
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn need_event_matches_a_step_by_step_oracle_around_the_wrap() {
        for old in (0..8).map(|d: u16| d.wrapping_sub(4)) {
            for moved in 0..6u16 {
                let new = old.wrapping_add(moved);
                for event in (0..24).map(|d: u16| d.wrapping_sub(12)) {
                    // The event fires when the entry with index `event` is among those just published.
                    let oracle = (0..moved).any(|step| old.wrapping_add(step) == event);
                    assert_eq!(
                        need_event(event, new, old),
                        oracle,
                        "event {event}, {old} -> {new}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_full_blocking_eventfd_does_not_block() {
        let fd = Arc::new(EventFd::new(0).unwrap());
        fd.write(u64::MAX - 1).unwrap();
        let mut call = Call::new(Some(fd));
        assert!(call.signal());
        assert_eq!(call.errors(), 0);
    }
}
