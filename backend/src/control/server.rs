//! The control socket's server: non-blocking, bounded, driven by the control thread.
//!
//! The server has an epoll descriptor of its own ([`Server::as_fd`]): the control thread waits on that one and calls
//! [`Server::turn`] when it is readable, and at least once a second for the timeouts.

mod connection;

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use self::connection::{Connection, Next};
use super::protocol::{CallError, ErrorCode, Handler, Reply, Ticket};
use crate::host::socket::{BoundListener, CONTROL_MODE, SocketError, bind_listener};

/// Most clients at a time.
pub const MAX_CLIENTS: usize = 32;
/// A client that has an answer or half a line outstanding and moves no byte for so long is dropped.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long no connection is accepted after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Connections accepted in one turn.
const ACCEPT_BURST: usize = 8;
/// What epoll calls the listener; clients count from 1.
const LISTENER: u64 = 0;

/// Serves the control protocol on one socket.
pub struct Server {
    listener: BoundListener,
    epoll: Epoll,
    clients: HashMap<u64, Connection>,
    next_id: u64,
    accept_paused: Option<Instant>,
}

impl AsFd for Server {
    /// Readable when [`Server::turn`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Server {
    /// Listens on `path` (mode 0600).
    pub fn bind(path: &Path) -> Result<Server, SocketError> {
        let listener = bind_listener(path, CONTROL_MODE)?;
        let failed = |errno: nix::Error| SocketError::Io {
            path: path.to_owned(),
            action: "watch the socket",
            source: errno.into(),
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(failed)?;
        Ok(Server {
            listener,
            epoll,
            clients: HashMap::new(),
            next_id: LISTENER + 1,
            accept_paused: None,
        })
    }

    /// Clients connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// Does what can be done now without waiting: at most one request and one buffer of output a client. `now` is the
    /// caller's clock.
    pub fn turn(&mut self, now: Instant, handler: &mut dyn Handler) {
        let mut events = [EpollEvent::empty(); MAX_CLIENTS + 1];
        // An error here (EINTR) means that there is nothing to do in this turn; the descriptor stays readable.
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(now),
                // Somebody who waits for an answer has nothing else to tell than that he is gone.
                id if event
                    .events()
                    .intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
                    && self.clients.get(&id).is_some_and(Connection::is_waiting) =>
                {
                    self.remove(id);
                }
                id => self.serve(id, now, handler),
            }
        }
        let stalled: Vec<u64> = self
            .clients
            .iter()
            .filter_map(|(id, client)| client.is_stalled(now, STALL_TIMEOUT).then_some(*id))
            .collect();
        for id in stalled {
            tracing::debug!(
                client = id,
                "dropping a control client that moved no byte for too long"
            );
            self.remove(id);
        }
        if self
            .accept_paused
            .is_some_and(|since| now.saturating_duration_since(since) >= ACCEPT_PAUSE)
        {
            self.listen_for(EpollFlags::EPOLLIN);
            self.accept_paused = None;
        }
    }

    fn serve(&mut self, id: u64, now: Instant, handler: &mut dyn Handler) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let interest = match client.progress(Ticket(id), now, handler) {
            Next::Read => EpollFlags::EPOLLIN,
            // Reading stops while an answer is outstanding: a client that does not read cannot ask for more.
            Next::Write => EpollFlags::EPOLLOUT,
            Next::Wait => EpollFlags::empty(),
            Next::Close => return self.remove(id),
        };
        let mut event = EpollEvent::new(interest, id);
        if self.epoll.modify(client.stream(), &mut event).is_err() {
            self.remove(id);
        }
    }

    /// Gives the answer that was to come later; nobody hears it if the client has gone meanwhile.
    pub fn answer(&mut self, ticket: Ticket, answer: Result<Reply, CallError>, now: Instant) {
        let Ticket(id) = ticket;
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.late_answer(now, answer);
        let mut event = EpollEvent::new(EpollFlags::EPOLLOUT, id);
        if self.epoll.modify(client.stream(), &mut event).is_err() {
            self.remove(id);
        }
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPT_BURST {
            match self.listener.listener().accept() {
                Ok((stream, _)) => self.admit(stream, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
                    ) =>
                {
                    tracing::warn!(%error, "cannot accept control clients for a while");
                    // The waiting connection would otherwise wake the control thread again at once, for ever.
                    self.listen_for(EpollFlags::empty());
                    self.accept_paused = Some(now);
                    return;
                }
                // The client gave up in the meantime.
                Err(_) => {}
            }
        }
    }

    fn admit(&mut self, mut stream: UnixStream, now: Instant) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            let message = format!("{MAX_CLIENTS} clients are connected already: try again later");
            // A new socket's buffer has room for a line; if not, the client is told by the end of the connection.
            let _ = stream.write(
                CallError::new(ErrorCode::TooManyClients, message)
                    .to_line()
                    .as_bytes(),
            );
            return;
        }
        let id = self.next_id;
        if self
            .epoll
            .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, id))
            .is_ok()
        {
            self.next_id += 1;
            self.clients.insert(id, Connection::new(stream, now));
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(client) = self.clients.remove(&id) {
            // Closing would do it as well, unless the descriptor was duplicated (by a fork, say).
            let _ = self.epoll.delete(client.stream());
        }
    }

    fn listen_for(&self, interest: EpollFlags) {
        let _ = self
            .epoll
            .modify(&self.listener, &mut EpollEvent::new(interest, LISTENER));
    }
}

#[cfg(test)]
mod tests;
