//! Threads that the daemon cannot do without.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

use vnic_dataplane::engine::panic_message;

/// A thread whose panic does not go unnoticed: nobody would find out about dead links, or carry out an operator's orders.
pub(super) struct Guarded {
    thread: Option<JoinHandle<()>>,
    failure: Arc<OnceLock<String>>,
}

impl Guarded {
    /// Runs `body` in a thread called `name`. If it panics, `tell` is called once [`Guarded::failure`] knows.
    pub(super) fn spawn(
        name: &'static str,
        tell: impl FnOnce() + Send + 'static,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Guarded> {
        let failure = Arc::new(OnceLock::new());
        let seen = Arc::clone(&failure);
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            // Whatever state it left behind, nobody trusts it any more.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
                let _ = seen.set(format!("thread {name} panicked: {}", panic_message(&*panic)));
                tell();
            }
        })?;
        Ok(Guarded {
            thread: Some(thread),
            failure,
        })
    }

    /// Which thread it is and what it panicked with, if it did.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Waits for its end.
    pub(super) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
