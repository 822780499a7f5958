//! A TCP server that sends back what it receives.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::listen;

/// Connections served at once; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 4096;
/// Bytes that may wait for one client before nothing more is read from it.
const PENDING_MAX: usize = 256 * 1024;

/// What the server has seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoStats {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that ended by a reset or another error.
    pub resets: u64,
    /// Bytes sent back.
    pub bytes: u64,
}

#[derive(Default)]
struct Shared {
    accepted: AtomicU64,
    resets: AtomicU64,
    bytes: AtomicU64,
    stop: AtomicBool,
}

/// A running echo server; it stops when dropped.
pub struct EchoServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Listens on `port` in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(port: u16) -> io::Result<EchoServer> {
        let listener = listen(port)?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("echo-server".to_owned())
            .spawn(move || serve(&listener, &for_thread))?;
        Ok(EchoServer {
            shared,
            thread: Some(thread),
        })
    }

    /// What it has seen so far.
    #[must_use]
    pub fn stats(&self) -> EchoStats {
        EchoStats {
            accepted: self.shared.accepted.load(Ordering::Relaxed),
            resets: self.shared.resets.load(Ordering::Relaxed),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Connection {
    stream: TcpStream,
    pending: VecDeque<u8>,
}

fn serve(listener: &TcpListener, shared: &Shared) {
    let mut connections: Vec<Connection> = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    while !shared.stop.load(Ordering::Relaxed) {
        let mut waiting = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        for connection in &connections {
            let mut events = PollFlags::empty();
            if connection.pending.len() < PENDING_MAX {
                events |= PollFlags::POLLIN;
            }
            if !connection.pending.is_empty() {
                events |= PollFlags::POLLOUT;
            }
            waiting.push(PollFd::new(connection.stream.as_fd(), events));
        }
        // The timeout bounds how long a request to stop goes unseen.
        if poll(&mut waiting, PollTimeout::from(50u8)).is_err() {
            continue;
        }
        let ready: Vec<bool> = waiting
            .iter()
            .map(|fd| fd.revents().is_some_and(|events| !events.is_empty()))
            .collect();
        drop(waiting);
        let mut flags = ready[1..].iter();
        connections.retain_mut(|connection| {
            if !flags.next().copied().unwrap_or(false) {
                return true;
            }
            match connection.turn(&mut buffer, shared) {
                Ok(open) => open,
                Err(_) => {
                    shared.resets.fetch_add(1, Ordering::Relaxed);
                    false
                }
            }
        });
        if ready[0] {
            while connections.len() < CONNECTIONS_MAX {
                let Ok((stream, _)) = listener.accept() else { break };
                if stream
                    .set_nonblocking(true)
                    .and_then(|()| stream.set_nodelay(true))
                    .is_ok()
                {
                    shared.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.push(Connection {
                        stream,
                        pending: VecDeque::new(),
                    });
                }
            }
        }
    }
}

impl Connection {
    /// Reads, writes back, and says whether the connection is still open.
    fn turn(&mut self, buffer: &mut [u8], shared: &Shared) -> io::Result<bool> {
        let mut open = true;
        if self.pending.len() < PENDING_MAX {
            match self.stream.read(buffer) {
                Ok(0) => open = false,
                Ok(length) => self.pending.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        while !self.pending.is_empty() {
            match self.stream.write(self.pending.as_slices().0) {
                Ok(written) => {
                    self.pending.drain(..written);
                    shared
                        .bytes
                        .fetch_add(u64::try_from(written).unwrap_or(0), Ordering::Relaxed);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(open)
    }
}
