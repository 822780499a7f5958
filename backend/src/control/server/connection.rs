//! One client of the control socket: lines in, answers out, both bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::control::protocol::{
    CallError, ErrorCode, Handler, MAX_LINE, Reply, Request, SessionList, Ticket,
};

/// Output that is prepared ahead of what the client has read; the rest of a long list stays unwritten.
const OUTPUT_BUFFER: usize = 64 * 1024;

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The next request.
    Read,
    /// Room for the rest of an answer.
    Write,
    /// The daemon's answer.
    Wait,
    /// Nothing: it is over.
    Close,
}

pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that are written.
    written: usize,
    /// The rest of a list, and whether an entry of it was written already.
    rest: Option<(SessionList, bool)>,
    /// The client will send nothing more.
    input_ended: bool,
    /// Close once the output is written.
    closing: bool,
    /// The answer comes later.
    waiting: bool,
    last_progress: Instant,
}

impl Connection {
    pub fn new(stream: UnixStream, now: Instant) -> Connection {
        Connection {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            rest: None,
            input_ended: false,
            closing: false,
            waiting: false,
            last_progress: now,
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// An idle client may stay; one that owes us something may not stay for ever.
    pub fn is_stalled(&self, now: Instant, timeout: Duration) -> bool {
        let owes = self.output_pending() || !self.input.is_empty() && !self.waiting;
        owes && now.saturating_duration_since(self.last_progress) >= timeout
    }

    /// Reads at most a line's worth, answers at most one request, writes at most one buffer.
    pub fn progress(&mut self, ticket: Ticket, now: Instant, handler: &mut dyn Handler) -> Next {
        if self.waiting {
            return Next::Wait;
        }
        match self.step(ticket, now, handler) {
            Ok(next) => next,
            // Reset, broken pipe: the client is gone.
            Err(_) => Next::Close,
        }
    }

    /// Whether the daemon owes an answer.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// The answer that was to come later.
    pub fn late_answer(&mut self, now: Instant, answer: Result<Reply, CallError>) {
        if self.waiting {
            self.waiting = false;
            self.last_progress = now;
            self.put(answer);
        }
    }

    fn step(&mut self, ticket: Ticket, now: Instant, handler: &mut dyn Handler) -> io::Result<Next> {
        if !self.output_pending() && !self.closing {
            if !self.has_line() {
                self.read(now)?;
            }
            if let Some(line) = self.take_line() {
                self.answer(ticket, &line, handler);
            } else if self.input.len() > MAX_LINE {
                let message = format!("a request line has at most {MAX_LINE} bytes");
                self.output = CallError::new(ErrorCode::LineTooLong, message)
                    .to_line()
                    .into_bytes();
                self.input = Vec::new();
                self.closing = true;
            }
        }
        if self.waiting {
            return Ok(Next::Wait);
        }
        self.refill();
        self.write(now)?;
        let more_to_do = self.has_line() || self.input_ended && !self.input.is_empty();
        Ok(if self.output_pending() {
            Next::Write
        } else if self.closing || self.input_ended && !more_to_do {
            Next::Close
        } else if more_to_do {
            // The next request is here already: writable at once, so that other clients get their turn in between.
            Next::Write
        } else {
            Next::Read
        })
    }

    fn output_pending(&self) -> bool {
        self.written < self.output.len() || self.rest.is_some()
    }

    fn has_line(&self) -> bool {
        self.input.contains(&b'\n')
    }

    fn read(&mut self, now: Instant) -> io::Result<()> {
        if self.input_ended {
            return Ok(());
        }
        let mut bytes = [0; 8192];
        while self.input.len() <= MAX_LINE && !self.has_line() {
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.input_ended = true;
                    return Ok(());
                }
                Ok(count) => {
                    self.input.extend_from_slice(&bytes[..count]);
                    self.last_progress = now;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next line, or at the end of the input what is left of it; `None` also for a line that is too long.
    fn take_line(&mut self) -> Option<Vec<u8>> {
        let line = match self.input.iter().position(|byte| *byte == b'\n') {
            Some(end) if end <= MAX_LINE => {
                let rest = self.input.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.input, rest);
                line.pop();
                line
            }
            Some(_) => return None,
            None if self.input_ended && self.input.len() <= MAX_LINE => std::mem::take(&mut self.input),
            None => return None,
        };
        Some(line)
    }

    fn answer(&mut self, ticket: Ticket, line: &[u8], handler: &mut dyn Handler) {
        if !line.trim_ascii().is_empty() {
            let answer = Request::parse(line).and_then(|request| handler.call(ticket, &request));
            self.put(answer);
        }
    }

    fn put(&mut self, answer: Result<Reply, CallError>) {
        self.written = 0;
        self.output.clear();
        match answer {
            Ok(Reply::Later) => self.waiting = true,
            Ok(Reply::Whole(result)) => {
                self.output = format!("{}\n", serde_json::json!({"ok": true, "result": result})).into_bytes();
            }
            Ok(Reply::Sessions { total, sessions }) => {
                self.output = format!(r#"{{"ok":true,"result":{{"total":{total},"sessions":["#).into_bytes();
                self.rest = Some((sessions, false));
            }
            Err(error) => self.output = error.to_line().into_bytes(),
        }
    }

    /// Prepares more of a long list, up to the buffer's size.
    fn refill(&mut self) {
        let Some((sessions, began)) = &mut self.rest else {
            return;
        };
        if self.written > 0 {
            self.output.drain(..self.written);
            self.written = 0;
        }
        while self.output.len() < OUTPUT_BUFFER {
            let session = match sessions.next() {
                Some(Some(session)) => session,
                Some(None) => return,
                None => {
                    self.output.extend_from_slice(b"]}}\n");
                    self.rest = None;
                    return;
                }
            };
            let before = self.output.len();
            if *began {
                self.output.push(b',');
            }
            if serde_json::to_writer(&mut self.output, &session).is_ok() {
                *began = true;
            } else {
                self.output.truncate(before);
            }
        }
    }

    fn write(&mut self, now: Instant) -> io::Result<()> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.written += count;
                    self.last_progress = now;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
