//! One front-end's socket, never blocking.

use std::io::{self, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use super::fault::Fault;
use super::message::{HEADER_SIZE, Header, MAX_FDS, Message, Reply};

/// Replies that may wait here when the socket's own buffer is full. A front-end waits for each reply, so a healthy one never
/// gets near.
const MAX_UNSENT: usize = 4096;

/// A front-end's socket with the message that is coming in and the replies that are going out.
///
/// Wait for readability always, and for writability while [`wants_write`](Connection::wants_write). A [`Fault`] from
/// any method ends the connection: drop it.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The message so far: its header, then its payload.
    incoming: Vec<u8>,
    /// How many bytes of `incoming` have been received.
    received: usize,
    header: Option<Header>,
    /// What came with the first byte of the message.
    fds: Vec<OwnedFd>,
    outgoing: Vec<u8>,
}

impl Connection {
    /// Takes over a connected socket and makes it non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        Ok(Connection {
            stream,
            incoming: vec![0; HEADER_SIZE],
            received: 0,
            header: None,
            fds: Vec::new(),
            outgoing: Vec::new(),
        })
    }

    /// The next message, or `None` when it is not all there yet.
    ///
    /// Take one at a time: while a [`Pending`](super::Pending) is open, leave the rest in the socket.
    pub fn poll_message(&mut self) -> Result<Option<Message>, Fault> {
        let result = self.advance();
        if result.is_err() {
            self.fds.clear();
        }
        result
    }

    fn advance(&mut self) -> Result<Option<Message>, Fault> {
        loop {
            // Reading never goes past the end of a message: fds that come with a read are then surely this message's.
            if self.received < self.incoming.len() {
                if !self.receive()? {
                    return Ok(None);
                }
                continue;
            }
            match self.header {
                None => {
                    let Some(head) = self.incoming.first_chunk() else {
                        return Err(Fault::ClosedMidMessage {
                            received: self.received,
                        });
                    };
                    let header = Header::parse(head, self.fds.len())?;
                    self.incoming.resize(HEADER_SIZE + header.size, 0);
                    self.header = Some(header);
                }
                Some(header) => {
                    let fds = mem::take(&mut self.fds);
                    let message = Message::from_parts(header, &self.incoming[HEADER_SIZE..], fds);
                    self.header = None;
                    self.received = 0;
                    self.incoming.truncate(HEADER_SIZE);
                    return message.map(Some);
                }
            }
        }
    }

    /// Receives once; `false` when nothing was there.
    fn receive(&mut self) -> Result<bool, Fault> {
        // Room for the most fds that a message may bring: the kernel drops what does not fit and says so. What was
        // received is closed when the buffer is dropped, unless it was taken out.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let result = loop {
            let mut iov = [IoSliceMut::new(&mut self.incoming[self.received..])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match recvmsg(&self.stream, &mut iov, &mut control, flags) {
                Err(Errno::INTR) => {}
                result => break result,
            }
        };
        let message = match result {
            Ok(message) => message,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(self.closed()),
            Err(errno) => {
                return Err(Fault::Io {
                    action: "read from",
                    source: errno.into(),
                });
            }
        };
        let offset = self.received;
        let before = self.fds.len();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.fds.extend(fds);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Fault::FdsTruncated { max: MAX_FDS });
        }
        if offset > 0 && self.fds.len() > before {
            return Err(Fault::FdsMidMessage { offset });
        }
        if message.bytes == 0 {
            return Err(self.closed());
        }
        self.received += message.bytes;
        Ok(true)
    }

    fn closed(&self) -> Fault {
        match self.received {
            0 => Fault::Closed,
            received => Fault::ClosedMidMessage { received },
        }
    }

    /// Sends a reply, now if the socket takes it, else when [`flush`](Connection::flush) is called.
    pub fn send(&mut self, reply: Reply) -> Result<(), Fault> {
        self.outgoing.extend_from_slice(&reply.encode());
        self.flush()?;
        if self.outgoing.len() > MAX_UNSENT {
            return Err(Fault::NotReading {
                unsent: self.outgoing.len(),
            });
        }
        Ok(())
    }

    /// Whether replies wait for the socket to become writable.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends as much of the waiting replies as the socket takes.
    pub fn flush(&mut self) -> Result<(), Fault> {
        while !self.outgoing.is_empty() {
            match send(
                &self.stream,
                &self.outgoing,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed()),
                Err(errno) => {
                    return Err(Fault::Io {
                        action: "write to",
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
