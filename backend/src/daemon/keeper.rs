//! The thread that does what takes long: opening and closing NICs, and plans that need a new slot table.
//!
//! Closed sockets' chunks come back here, too, once the kernel is done with them.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vnic_dataplane::memory::frames::FrameMemory;
use vnic_dataplane::xsk::retired::release_retired;

use super::drive::Drive;
use super::guarded::Guarded;

/// Time between two attempts to get chunks of closed sockets back; the kernel takes some 16 ms on a veth.
const RELEASE_PAUSE: Duration = Duration::from_millis(10);

/// The same once it takes long: a probe makes system calls and waits for the kernel.
const RELEASE_PAUSE_LONG: Duration = Duration::from_secs(1);

/// From when on it takes long.
const LONG: Duration = Duration::from_secs(2);

/// Work for the keeper; what it gives is handed to the control thread.
pub(super) type Job<T> = Box<dyn FnOnce() -> T + Send>;

enum Order<T> {
    Run(Job<T>),
    /// Close a NIC, then do the job once the kernel has given all chunks back (or is known not to for a while).
    Close(Box<Drive>, Job<T>),
}

/// The control thread's handle. Dropping it ends the thread, after the jobs that were given.
pub(super) struct Keeper<T> {
    orders: Option<Sender<Order<T>>>,
    done: Receiver<T>,
    notify: Arc<EventFd>,
    thread: Guarded,
}

impl<T: Send + 'static> Keeper<T> {
    pub(super) fn start(memory: Arc<FrameMemory>) -> io::Result<Keeper<T>> {
        let (orders, queue) = channel();
        let (results, done) = channel();
        let notify = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (notifier, alarm) = (Arc::clone(&notify), Arc::clone(&notify));
        let tell = move || _ = alarm.write(1);
        let thread = Guarded::spawn("keeper", tell, move || {
            run(&queue, &results, &notifier, &memory);
        })?;
        Ok(Keeper {
            orders: Some(orders),
            done,
            notify,
            thread,
        })
    }

    pub(super) fn run(&self, job: impl FnOnce() -> T + Send + 'static) {
        self.order(Order::Run(Box::new(job)));
    }

    pub(super) fn close(&self, drive: Drive, then: impl FnOnce() -> T + Send + 'static) {
        self.order(Order::Close(Box::new(drive), Box::new(then)));
    }

    fn order(&self, order: Order<T>) {
        if let Some(orders) = &self.orders {
            // Fails only when the thread has ended: with us, or by a panic, which ends us too.
            let _ = orders.send(order);
        }
    }

    /// What the thread panicked with, if it did.
    pub(super) fn failure(&self) -> Option<&str> {
        self.thread.failure()
    }

    /// Readable when a job is done, or never will be.
    pub(super) fn fd(&self) -> RawFd {
        self.notify.as_raw_fd()
    }

    /// What jobs have given since the last call.
    pub(super) fn done(&self) -> Vec<T> {
        let _ = self.notify.read();
        self.done.try_iter().collect()
    }
}

impl<T> Drop for Keeper<T> {
    fn drop(&mut self) {
        self.orders = None;
        self.thread.join();
    }
}

fn run<T>(queue: &Receiver<Order<T>>, results: &Sender<T>, notify: &EventFd, memory: &FrameMemory) {
    let give = |result: T| {
        let _ = results.send(result);
        let _ = notify.write(1);
    };
    // Chunks are out since then, and these jobs wait for them.
    let mut since = None::<Instant>;
    let mut waiting: Vec<Job<T>> = Vec::new();
    loop {
        let late = since.is_some_and(|since| since.elapsed() >= LONG);
        if late {
            waiting.drain(..).for_each(|job| give(job()));
        }
        let order = match since {
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(_) => queue.recv_timeout(if late { RELEASE_PAUSE_LONG } else { RELEASE_PAUSE }),
        };
        match order {
            Ok(Order::Run(job)) => give(job()),
            Ok(Order::Close(drive, then)) => {
                drop(drive);
                waiting.push(then);
            }
            Err(RecvTimeoutError::Timeout) => {}
            // The daemon ends, and the memory with it.
            Err(RecvTimeoutError::Disconnected) => return,
        }
        // A job may have opened sockets in vain, and so have closed some.
        if release_retired(memory) == 0 {
            since = None;
            waiting.drain(..).for_each(|job| give(job()));
        } else {
            since.get_or_insert_with(Instant::now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::{Events, Source};
    use super::*;

    #[test]
    fn a_job_that_panics_is_told() {
        let memory = FrameMemory::new(64).expect("memory");
        let keeper = Keeper::start(memory).expect("a thread");
        let mut events = Events::new().expect("an epoll set");
        let interest = Some((keeper.fd(), true, false));
        events.watch(Source::Keeper, interest).expect("a place in it");
        keeper.run(|| 1);
        keeper.run(|| panic!("job {}", 2));
        keeper.run(|| 3);
        let mut done = Vec::new();
        while keeper.failure().is_none() {
            let ready = events.wait(Duration::from_secs(60)).expect("events");
            assert_eq!(ready, [Source::Keeper], "no sign of it");
            done.extend(keeper.done());
        }
        assert_eq!(keeper.failure(), Some("thread keeper panicked: job 2"));
        done.extend(keeper.done());
        assert_eq!(done, [1]);
    }
}
