//! The tests' end of the agent's serial port.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::protocol::{Command, Message, Reply, Request};

#[derive(Default)]
struct State {
    waiting: HashMap<u64, Sender<Reply>>,
    boot: Option<String>,
    boots: u32,
    closed: bool,
    next: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A connection to the agent of one guest. It stays over reboots of the guest.
pub struct AgentClient {
    shared: Arc<Shared>,
    stream: Mutex<UnixStream>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AgentClient {
    /// Connects to QEMU's socket at `path`.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(path: &Path) -> Result<AgentClient> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        let shared = Arc::new(Shared::default());
        let (reader, for_thread) = (stream.try_clone()?, Arc::clone(&shared));
        std::thread::Builder::new()
            .name("agent-reader".to_owned())
            .spawn(move || {
                for line in BufReader::new(reader).split(b'\n') {
                    let Ok(line) = line else { break };
                    // The firmware and a rebooting kernel may write something else on the port.
                    let Ok(message) = serde_json::from_slice::<Message>(&line) else {
                        continue;
                    };
                    let mut state = hold(&for_thread.state);
                    match message {
                        Message::Ready { boot } => {
                            if state.boot.as_ref() != Some(&boot) {
                                state.boot = Some(boot);
                                state.boots += 1;
                                // Whoever waits for an answer from before the reboot waits in vain.
                                state.waiting.clear();
                            }
                        }
                        Message::Reply { id, reply } => {
                            if let Some(waiting) = state.waiting.remove(&id) {
                                let _ = waiting.send(reply);
                            }
                        }
                    }
                    for_thread.changed.notify_all();
                }
                let mut state = hold(&for_thread.state);
                state.closed = true;
                state.waiting.clear();
                for_thread.changed.notify_all();
            })?;
        Ok(AgentClient {
            shared,
            stream: Mutex::new(stream),
        })
    }

    /// How often the guest has booted so far.
    #[must_use]
    pub fn boots(&self) -> u32 {
        hold(&self.shared.state).boots
    }

    /// Waits until the guest has booted `boots` times, or for `limit`; says whether it has.
    ///
    /// # Errors
    /// If QEMU closed the port.
    pub fn wait_boots(&self, boots: u32, limit: Duration) -> Result<bool> {
        let end = Instant::now() + limit;
        let mut state = hold(&self.shared.state);
        while state.boots < boots {
            if state.closed {
                bail!("QEMU closed the agent's port");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(true)
    }

    fn send(&self, id: u64, command: Command) -> Result<()> {
        let mut line = serde_json::to_vec(&Request { id, command })?;
        line.push(b'\n');
        hold(&self.stream)
            .write_all(&line)
            .context("writing to the guest's agent")
    }

    /// Sends a command that has no answer.
    ///
    /// # Errors
    /// If the port is closed.
    pub fn tell(&self, command: Command) -> Result<()> {
        self.send(0, command)
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// If the agent says that it failed, or says nothing for `limit`.
    pub fn call(&self, command: Command, limit: Duration) -> Result<Reply> {
        let (sender, receiver) = channel();
        let id = {
            let mut state = hold(&self.shared.state);
            if state.closed {
                bail!("QEMU closed the agent's port");
            }
            state.next += 1;
            let id = state.next;
            state.waiting.insert(id, sender);
            id
        };
        let what = format!("{command:?}");
        self.send(id, command)?;
        let reply = receiver.recv_timeout(limit);
        hold(&self.shared.state).waiting.remove(&id);
        match reply {
            Ok(Reply::Failed { reason }) => bail!("in the guest: {reason}"),
            Ok(reply) => Ok(reply),
            Err(_) => bail!(
                "the guest's agent did not answer within {} s to {what:.200}",
                limit.as_secs()
            ),
        }
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        // Ends the reader.
        let _ = hold(&self.stream).shutdown(Shutdown::Both);
    }
}
