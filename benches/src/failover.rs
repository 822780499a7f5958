//! What the failover bench is made of: frames that tell which session and which number they are, and a tally of those that arrive.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The guest's address.
pub const GUEST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Somebody beyond the NICs.
const FAR: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
/// Bytes before the payload: Ethernet, IPv4, TCP.
const HEADERS: usize = 14 + 20 + 20;
/// The session and the number of the frame.
const LENGTH: usize = HEADERS + 8;
/// No NIC.
const NONE: u8 = u8::MAX;

/// A frame of an established TCP session.
#[must_use]
pub fn frame(session: u32, number: u32) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    frame[..6].copy_from_slice(&FAR);
    frame[6..12].copy_from_slice(&GUEST);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let [_, high, middle, low] = session.to_be_bytes();
    // Length 48, TTL 64, TCP.
    frame[14..26].copy_from_slice(&[0x45, 0, 0, 48, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame[26..34].copy_from_slice(&[10, 1, high, middle, 10, 2, 0, 1]);
    frame[34..38].copy_from_slice(&[0x40, low, 0x01, 0xbb]);
    // Header of 20 bytes, ACK.
    frame[46..48].copy_from_slice(&[0x50, 0x10]);
    frame[HEADERS..HEADERS + 4].copy_from_slice(&session.to_be_bytes());
    frame[HEADERS + 4..].copy_from_slice(&number.to_be_bytes());
    frame
}

/// Session and number of a frame of ours.
#[must_use]
pub fn read(frame: &[u8]) -> Option<(u32, u32)> {
    if frame.len() != LENGTH || frame[..6] != FAR || frame[6..12] != GUEST {
        return None;
    }
    let word = |at: usize| Some(u32::from_be_bytes(*frame.get(at..)?.first_chunk()?));
    Some((word(HEADERS)?, word(HEADERS + 4)?))
}

/// What arrives at the NICs' far ends. One thread writes, others look.
pub struct Tally {
    began: Instant,
    /// How often each frame has arrived.
    arrived: Box<[AtomicU8]>,
    /// Where each session was seen last.
    last_nic: Box<[AtomicU8]>,
    /// Frames at each NIC.
    frames: Box<[AtomicU64]>,
    /// When the last one arrived at each, in nanoseconds since the beginning.
    last_at: Box<[AtomicU64]>,
    /// NIC whose sessions are waited for elsewhere.
    victim: AtomicU8,
    /// When the first such frame arrived; 0: not yet.
    moved_at: AtomicU64,
    /// The longest time until then in which no frame arrived anywhere, in nanoseconds.
    silence: AtomicU64,
    stop: AtomicBool,
    sent: AtomicU32,
}

impl Tally {
    /// For so many NICs, sessions and frames.
    #[must_use]
    pub fn new(nics: usize, sessions: u32, frames: u32) -> Tally {
        Tally {
            began: Instant::now(),
            arrived: (0..frames).map(|_| AtomicU8::new(0)).collect(),
            last_nic: (0..sessions).map(|_| AtomicU8::new(NONE)).collect(),
            frames: (0..nics).map(|_| AtomicU64::new(0)).collect(),
            last_at: (0..nics).map(|_| AtomicU64::new(0)).collect(),
            victim: AtomicU8::new(NONE),
            moved_at: AtomicU64::new(0),
            silence: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            sent: AtomicU32::new(0),
        }
    }

    /// Nanoseconds since the beginning.
    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A frame was given to the guest's ring.
    pub fn sent(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    /// Frames given to the guest's ring so far.
    #[must_use]
    pub fn given(&self) -> u32 {
        self.sent.load(Relaxed)
    }

    /// Ends whoever asks [`Tally::is_over`].
    pub fn end(&self) {
        self.stop.store(true, Relaxed);
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Takes frames off the devices until it is over.
    ///
    /// # Errors
    /// Those of reading.
    pub fn receive(&self, taps: &[File]) -> Result<()> {
        let mut bytes = [0; 2048];
        while !self.is_over() {
            let mut any = false;
            for (nic, mut tap) in taps.iter().enumerate() {
                for _ in 0..32 {
                    match tap.read(&mut bytes) {
                        Ok(length) => {
                            any = true;
                            self.take(nic, &bytes[..length]);
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            if !any {
                let mut fds: Vec<PollFd> = taps
                    .iter()
                    .map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN))
                    .collect();
                poll(&mut fds, PollTimeout::from(1u8))?;
            }
        }
        Ok(())
    }

    fn take(&self, nic: usize, bytes: &[u8]) {
        let Some((session, number)) = read(bytes) else {
            return;
        };
        let (Some(arrived), Some(last)) = (
            self.arrived.get(number as usize),
            self.last_nic.get(session as usize),
        ) else {
            return;
        };
        let now = self.now();
        arrived.store(arrived.load(Relaxed).saturating_add(1), Relaxed);
        self.frames[nic].fetch_add(1, Relaxed);
        let victim = self.victim.load(Relaxed);
        if victim != NONE && self.moved_at.load(Relaxed) == 0 {
            let latest = self.last_at.iter().map(|at| at.load(Relaxed)).max();
            self.silence
                .fetch_max(now.saturating_sub(latest.unwrap_or(0)), Relaxed);
        }
        self.last_at[nic].store(now, Relaxed);
        let nic = u8::try_from(nic).unwrap_or(NONE);
        let before = last.swap(nic, Relaxed);
        if victim != NONE && before == victim && nic != victim {
            let _ = self.moved_at.compare_exchange(0, now, Relaxed, Relaxed);
        }
    }

    /// Frames at each NIC so far.
    #[must_use]
    pub fn per_nic(&self) -> Vec<u64> {
        self.frames.iter().map(|frames| frames.load(Relaxed)).collect()
    }

    /// From now on a session of this NIC is waited for elsewhere.
    pub fn watch(&self, nic: usize) {
        self.moved_at.store(0, Relaxed);
        self.silence.store(0, Relaxed);
        self.victim.store(u8::try_from(nic).unwrap_or(NONE), Relaxed);
    }

    /// Waits for that; the time from the last frame at the NIC (or `since`, if that was later) to the first one of its sessions elsewhere.
    #[must_use]
    pub fn moved(&self, since: u64, limit: Duration) -> Option<Duration> {
        let until = Instant::now() + limit;
        let moved = loop {
            match self.moved_at.load(Relaxed) {
                0 if Instant::now() >= until => return None,
                0 => std::thread::sleep(Duration::from_micros(200)),
                at => break at,
            }
        };
        let victim = usize::from(self.victim.swap(NONE, Relaxed));
        let last = self.last_at.get(victim).map_or(0, |at| at.load(Relaxed));
        Some(Duration::from_nanos(moved.saturating_sub(last.max(since))))
    }

    /// The longest time in which no frame arrived anywhere, from [`Tally::watch`] to the first frame that moved: then it was not the NIC
    /// that kept frames back.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_nanos(self.silence.load(Relaxed))
    }

    /// Frames sent, those of them that never arrived, and arrivals beyond the first.
    #[must_use]
    pub fn balance(&self) -> (u32, u32, u32) {
        let sent = self.sent.load(Relaxed);
        let arrivals = self
            .arrived
            .iter()
            .take(sent as usize)
            .map(|count| count.load(Relaxed));
        arrivals.fold((sent, 0, 0), |(sent, lost, again), count| match count {
            0 => (sent, lost + 1, again),
            count => (sent, lost, again + u32::from(count - 1)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vnic_lb::parse::{Class, parse};

    #[test]
    fn frames_say_what_they_are_and_are_sessions() {
        let keys: std::collections::HashSet<_> = [0, 1, 255, 256, 65_536, 1 << 20]
            .into_iter()
            .map(|session| {
                assert_eq!(read(&frame(session, 7)), Some((session, 7)));
                let parsed = parse(&frame(session, 7));
                assert_eq!(parsed.class(), Class::Session);
                *parsed.key()
            })
            .collect();
        assert_eq!(keys.len(), 6);
        assert_eq!(read(&[0; LENGTH]), None);
    }

    #[test]
    fn the_tally_finds_moves_losses_and_duplicates() {
        let tally = Tally::new(2, 4, 16);
        for number in 0..8 {
            tally.sent();
            if number != 5 {
                tally.take(0, &frame(number % 4, number));
            }
        }
        tally.take(0, &frame(2, 2));
        tally.watch(0);
        let since = tally.now();
        assert_eq!(tally.moved(since, Duration::ZERO), None);
        tally.sent();
        tally.take(1, &frame(0, 8));
        assert!(tally.moved(since, Duration::ZERO).is_some());
        assert_eq!(tally.balance(), (9, 1, 1));
        assert_eq!(tally.per_nic(), [8, 1]);
    }
}
