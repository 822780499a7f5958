//! The control thread's epoll set, by source.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// SIGTERM or SIGINT.
    Signals,
    /// A worker.
    Engine,
    /// Some guest's memory is gone from its file.
    Memory,
    /// The host's interfaces.
    Links,
    /// The thread that watches the NICs.
    Health,
    /// The thread that opens and closes NICs.
    Keeper,
    /// A front-end wants to connect to the port at this position.
    Listener(usize),
    /// The front-end of the port at this position.
    FrontEnd(usize),
    /// The control server's own epoll set.
    Control,
}

/// What a source waits for: its fd, for reading, for writing.
pub(super) type Interest = (RawFd, bool, bool);

pub(super) struct Events {
    epoll: Epoll,
    watched: HashMap<Source, RawFd>,
    /// The number that the kernel gives back with an event is a position here.
    sources: Vec<Source>,
}

impl Events {
    pub(super) fn new() -> io::Result<Events> {
        Ok(Events {
            epoll: Epoll::new()?,
            watched: HashMap::new(),
            sources: Vec::new(),
        })
    }

    /// Watches `source` for this from now on; `None`: for nothing.
    ///
    /// An fd may have been closed, and its number reused, since the last call: whatever differs is removed and added anew.
    pub(super) fn watch(&mut self, source: Source, interest: Option<Interest>) -> io::Result<()> {
        let before = self.watched.remove(&source);
        if let Some(fd) = before {
            // Fails for an fd that was closed, which took it out of the set.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        let Some((fd, read, write)) = interest else {
            return Ok(());
        };
        let mut set = EventSet::empty();
        set.set(EventSet::IN | EventSet::READ_HANG_UP, read);
        set.set(EventSet::OUT, write);
        if set.is_empty() {
            // Not even a hang-up is waited for, or it would wake us over and over while nothing may be read.
            return Ok(());
        }
        let number = self.number(source);
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(set, number))?;
        self.watched.insert(source, fd);
        Ok(())
    }

    /// Waits for events up to `timeout` (rounded up to whole milliseconds).
    pub(super) fn wait(&mut self, timeout: Duration) -> io::Result<Vec<Source>> {
        let timeout = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let mut ready = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(timeout, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let source = |event: &EpollEvent| self.sources.get(usize::try_from(event.data()).ok()?).copied();
        Ok(ready[..count].iter().filter_map(source).collect())
    }

    fn number(&mut self, source: Source) -> u64 {
        let at = self
            .sources
            .iter()
            .position(|known| *known == source)
            .unwrap_or_else(|| {
                self.sources.push(source);
                self.sources.len() - 1
            });
        at as u64
    }
}
