//! Telling the driver of used buffers, without ever waiting for it.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::signal::signal;

/// Whether the move of an index from `old` to `new` passes the event index that the other side asked for
/// (virtio 1.2, 2.7.7.2 and 2.7.10: `vring_need_event`).
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The call eventfd of a ring.
pub(super) struct Call(Option<Arc<EventFd>>);

impl Call {
    pub(super) fn new(fd: Option<Arc<EventFd>>) -> Call {
        Call(fd)
    }

    /// Writes the eventfd if there is one; returns whether it did. One that cannot be written is the front-end's fault, and its guest's loss:
    /// no notification is counted.
    pub(super) fn signal(&self) -> bool {
        self.0.as_deref().is_some_and(|fd| signal(fd).is_ok())
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
}
