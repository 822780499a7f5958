//! Many concurrent TCP sessions that each send a small numbered message at a steady pace and check its echo.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{connect, millis};

/// The start of each message: session, number, and the time it was sent (microseconds since the group began).
const HEADER: usize = 24;
/// Messages of one session without an echo yet; beyond this it waits.
const IN_FLIGHT_MAX: u64 = 64;
/// How long a stopping group waits for the echoes that are still on their way.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// What a group of sessions shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionPlan {
    /// The echo server.
    pub target: SocketAddr,
    /// How many sessions.
    pub count: u32,
    /// Milliseconds between two messages of one session.
    pub interval_ms: u32,
    /// Bytes of one message (at least 24).
    pub message_bytes: u32,
}

/// What one session has seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its own address and port.
    pub local: Option<SocketAddr>,
    /// Messages whose echo came back whole and in order.
    pub echoed: u64,
    /// Messages sent.
    pub sent: u64,
    /// The longest time without an echo, in milliseconds.
    pub longest_gap_ms: u64,
    /// The longest time from sending a message to its echo, in milliseconds.
    pub longest_rtt_ms: u64,
    /// Why it ended before it was told to: a reset, a wrong echo, no connection.
    pub error: Option<String>,
}

/// What a group of sessions has seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionsReport {
    /// Session by session.
    pub sessions: Vec<SessionReport>,
}

impl SessionsReport {
    /// The errors, each with its session's number.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        let numbered = self.sessions.iter().enumerate();
        numbered
            .filter_map(|(index, session)| Some(format!("session {index}: {}", session.error.as_ref()?)))
            .collect()
    }

    /// The longest gap that any session saw, in milliseconds.
    #[must_use]
    pub fn longest_gap_ms(&self) -> u64 {
        self.sessions
            .iter()
            .map(|session| session.longest_gap_ms)
            .max()
            .unwrap_or(0)
    }

    /// Echoes of all sessions together.
    #[must_use]
    pub fn echoed(&self) -> u64 {
        self.sessions.iter().map(|session| session.echoed).sum()
    }

    /// The least that any session got back.
    #[must_use]
    pub fn least_echoed(&self) -> u64 {
        self.sessions
            .iter()
            .map(|session| session.echoed)
            .min()
            .unwrap_or(0)
    }
}

struct Session {
    stream: Option<Arc<TcpStream>>,
    report: SessionReport,
    next_send: Instant,
    last_echo: Instant,
    out: Vec<u8>,
    out_at: usize,
    input: Vec<u8>,
}

/// A running group of sessions; it ends when dropped.
pub struct SessionGroup {
    sessions: Arc<Mutex<Vec<Session>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SessionGroup {
    /// Opens the sessions from the calling thread's network namespace, one after the other, and starts sending.
    ///
    /// # Errors
    /// If no thread can be started. A session that does not open is in the report.
    pub fn start(plan: &SessionPlan) -> std::io::Result<SessionGroup> {
        let plan = *plan;
        let begin = Instant::now();
        let sessions: Vec<Session> = (0..plan.count).map(|index| Session::open(&plan, index)).collect();
        let sessions = Arc::new(Mutex::new(sessions));
        let stop = Arc::new(AtomicBool::new(false));
        let (for_thread, thread_stop) = (Arc::clone(&sessions), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("sessions".to_owned())
            .spawn(move || drive(&for_thread, &thread_stop, &plan, begin))?;
        Ok(SessionGroup {
            sessions,
            stop,
            thread: Some(thread),
        })
    }

    /// What the sessions have seen so far. With `reset_gaps`, the longest gap and round trip start anew.
    #[must_use]
    pub fn progress(&self, reset_gaps: bool) -> SessionsReport {
        let mut sessions = hold(&self.sessions);
        let now = Instant::now();
        let report = SessionsReport {
            sessions: sessions.iter().map(|session| session.report_at(now)).collect(),
        };
        if reset_gaps {
            for session in sessions.iter_mut() {
                session.report.longest_gap_ms = 0;
                session.report.longest_rtt_ms = 0;
                session.last_echo = now;
            }
        }
        report
    }

    /// Stops sending, waits for the last echoes, closes the sessions, and reports. An echo that never came is an error.
    #[must_use]
    pub fn finish(mut self) -> SessionsReport {
        self.end();
        SessionsReport {
            sessions: hold(&self.sessions)
                .iter()
                .map(|session| session.report.clone())
                .collect(),
        }
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SessionGroup {
    fn drop(&mut self) {
        self.end();
    }
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drive(sessions: &Mutex<Vec<Session>>, stop: &AtomicBool, plan: &SessionPlan, begin: Instant) {
    let mut buffer = vec![0u8; 64 * 1024];
    let mut stopped_at: Option<Instant> = None;
    let mut ready: Vec<bool> = Vec::new();
    loop {
        if stopped_at.is_none() && stop.load(Ordering::Relaxed) {
            stopped_at = Some(Instant::now());
        }
        let mut held = hold(sessions);
        ready.resize(held.len(), false);
        let now = Instant::now();
        let mut next = now + Duration::from_millis(50);
        for (index, session) in held.iter_mut().enumerate() {
            let sends = stopped_at.is_none() && session.send_due(index, plan, now, begin);
            next = next.min(session.next_send.max(now));
            if sends || ready[index] {
                session.turn(index, plan, &mut buffer, begin);
            }
        }
        if let Some(since) = stopped_at
            && (held.iter().all(Session::is_done) || since.elapsed() > DRAIN_LIMIT)
        {
            held.iter_mut().for_each(Session::close);
            return;
        }
        // Shares of the streams, so that progress() need not wait for the poll.
        let watched: Vec<(usize, Arc<TcpStream>, PollFlags)> = held
            .iter()
            .enumerate()
            .filter_map(|(index, session)| {
                let writes = session.out_at < session.out.len();
                let events = if writes {
                    PollFlags::POLLIN | PollFlags::POLLOUT
                } else {
                    PollFlags::POLLIN
                };
                Some((index, Arc::clone(session.stream.as_ref()?), events))
            })
            .collect();
        drop(held);
        let mut waiting: Vec<PollFd<'_>> = watched
            .iter()
            .map(|(_, stream, events)| PollFd::new(stream.as_fd(), *events))
            .collect();
        let pause = match stopped_at {
            None => millis(next.saturating_duration_since(Instant::now())).clamp(1, 50),
            Some(_) => 20,
        };
        let _ = poll(&mut waiting, PollTimeout::from(u8::try_from(pause).unwrap_or(50)));
        ready.fill(false);
        for (fd, (index, ..)) in waiting.iter().zip(&watched) {
            ready[*index] = fd.revents().is_some_and(|events| !events.is_empty());
        }
    }
}

impl Session {
    fn open(plan: &SessionPlan, index: u32) -> Session {
        let (stream, error) = match connect(plan.target).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        }) {
            Ok(stream) => (Some(Arc::new(stream)), None),
            Err(error) => (None, Some(format!("cannot connect to {}: {error}", plan.target))),
        };
        let local = stream.as_ref().and_then(|stream| stream.local_addr().ok());
        let now = Instant::now();
        // Sessions take turns within the interval rather than send all at once.
        let stagger = u64::from(plan.interval_ms) * u64::from(index) / u64::from(plan.count.max(1));
        Session {
            stream,
            report: SessionReport {
                local,
                echoed: 0,
                sent: 0,
                longest_gap_ms: 0,
                longest_rtt_ms: 0,
                error,
            },
            next_send: now + Duration::from_millis(stagger),
            last_echo: now,
            out: Vec::new(),
            out_at: 0,
            input: Vec::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.stream.is_none() || self.report.echoed == self.report.sent
    }

    fn report_at(&self, now: Instant) -> SessionReport {
        let mut report = self.report.clone();
        if self.stream.is_some() {
            report.longest_gap_ms = report
                .longest_gap_ms
                .max(millis(now.saturating_duration_since(self.last_echo)));
        }
        report
    }

    fn close(&mut self) {
        if self.stream.take().is_some()
            && self.report.echoed != self.report.sent
            && self.report.error.is_none()
        {
            self.report.error = Some(format!(
                "{} echoes never came",
                self.report.sent - self.report.echoed
            ));
        }
    }

    /// Queues the next message if its time has come, and says whether it did.
    fn send_due(&mut self, index: usize, plan: &SessionPlan, now: Instant, begin: Instant) -> bool {
        if now < self.next_send {
            return false;
        }
        // Late is late: no burst to catch up.
        self.next_send = now + Duration::from_millis(u64::from(plan.interval_ms.max(1)));
        if self.stream.is_none() || self.report.sent - self.report.echoed >= IN_FLIGHT_MAX {
            return false;
        }
        self.out.drain(..self.out_at);
        self.out_at = 0;
        let stamp = u64::try_from(now.saturating_duration_since(begin).as_micros()).unwrap_or(0);
        append_message(
            &mut self.out,
            index,
            self.report.sent,
            stamp,
            message_length(plan),
        );
        self.report.sent += 1;
        true
    }

    fn turn(&mut self, index: usize, plan: &SessionPlan, buffer: &mut [u8], begin: Instant) {
        let Some(stream) = self.stream.clone() else { return };
        let mut stream = stream.as_ref();
        let mut failure = None;
        while self.out_at < self.out.len() {
            match stream.write(&self.out[self.out_at..]) {
                Ok(written) => self.out_at += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    failure = Some(error.to_string());
                    break;
                }
            }
        }
        match stream.read(buffer) {
            Ok(0) => failure = Some("closed by the other side".to_owned()),
            Ok(length) => self.input.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => failure = Some(error.to_string()),
        }
        let length = message_length(plan);
        let whole = self.input.len() / length * length;
        let now = Instant::now();
        for message in self.input[..whole].chunks_exact(length) {
            let stamp = u64::from_le_bytes(message[16..24].try_into().expect("8 of the 24 header bytes"));
            let mut expected = Vec::with_capacity(length);
            append_message(&mut expected, index, self.report.echoed, stamp, length);
            if expected != message {
                failure = Some(format!("echo {} differs from what was sent", self.report.echoed));
                break;
            }
            let trip = now
                .saturating_duration_since(begin)
                .saturating_sub(Duration::from_micros(stamp));
            self.report.longest_rtt_ms = self.report.longest_rtt_ms.max(millis(trip));
            let gap = millis(now.saturating_duration_since(self.last_echo));
            self.report.longest_gap_ms = self.report.longest_gap_ms.max(gap);
            self.report.echoed += 1;
            self.last_echo = now;
        }
        self.input.drain(..whole);
        if let Some(reason) = failure {
            self.report = self.report_at(now);
            self.report.error = Some(reason);
            self.stream = None;
        }
    }
}

fn message_length(plan: &SessionPlan) -> usize {
    usize::try_from(plan.message_bytes)
        .unwrap_or(HEADER)
        .clamp(HEADER, 64 * 1024)
}

/// A message whose every byte follows from its session, number and time stamp.
fn append_message(out: &mut Vec<u8>, session: usize, number: u64, stamp: u64, length: usize) {
    out.extend_from_slice(&u64::try_from(session).unwrap_or(u64::MAX).to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&stamp.to_le_bytes());
    let [seed, ..] = number.to_le_bytes();
    let mut byte = seed;
    for _ in HEADER..length {
        byte = byte.wrapping_mul(31).wrapping_add(7);
        out.push(byte);
    }
}
