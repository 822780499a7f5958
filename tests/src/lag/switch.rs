//! The switch's forwarding thread and its link monitor.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::hash::{is_group_addressed, session_hash};
use crate::netns::Netns;
use crate::sys::{LinkProbe, PacketSocket, open_tap};

/// Frames taken from one side before the other sides get their turn.
const BATCH: usize = 64;
/// The largest frame: a TSO super-frame of a sender that has that offload on.
const FRAME_MAX: usize = 66 * 1024;
/// How often the monitor looks at the links.
const LINK_POLL: Duration = Duration::from_millis(2);

/// How frames from the peer are spread over the links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// By session over the live links; group-addressed frames by the first live link.
    Lag,
    /// Every frame by every live link, as a hub does: for tests of duplicates.
    Hub,
}

#[derive(Default)]
struct Link {
    up: AtomicBool,
    /// Frames from it are thrown away.
    black_hole: AtomicBool,
    to_peer: AtomicU64,
    from_peer: AtomicU64,
    lost: AtomicU64,
}

/// Frames that one link has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkCounters {
    /// Frames from the link to the peer.
    pub to_peer: u64,
    /// Frames from the peer that left by this link.
    pub from_peer: u64,
    /// Frames that the link or the peer's interface did not take.
    pub lost: u64,
    /// Whether the link is up now.
    pub up: bool,
}

struct Shared {
    links: Vec<Link>,
    stop: AtomicBool,
    wake: EventFd,
}

/// A running switch; it stops when dropped.
pub struct LagSwitch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl LagSwitch {
    /// Starts a switch between the interfaces `links` in `links_in` and a new TAP interface `tap` in `peer`.
    ///
    /// # Errors
    /// If an interface is missing or the TAP cannot be made.
    pub fn start(
        links_in: &Netns,
        links: &[String],
        peer: &Netns,
        tap: &str,
        distribution: Distribution,
    ) -> Result<LagSwitch> {
        // The kernel of the switch's own namespace must stay silent on the links.
        links_in.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        for link in links {
            links_in.ip(&["link", "set", link, "arp", "off"])?;
        }
        let device = peer.run(|| open_tap(tap).context("making the peer's TAP interface"))?;
        peer.ip(&["link", "set", tap, "up", "txqueuelen", "10000"])?;
        let (sockets, probe) = links_in.run(|| {
            let sockets = links
                .iter()
                .map(|link| PacketSocket::open(link).with_context(|| format!("opening {link}")))
                .collect::<Result<Vec<_>>>()?;
            Ok((sockets, LinkProbe::open()?))
        })?;
        let shared = Arc::new(Shared {
            links: links.iter().map(|_| Link::default()).collect(),
            stop: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        });
        look_at_links(&probe, links, &shared);

        let (names, for_monitor, for_switch) = (links.to_vec(), Arc::clone(&shared), Arc::clone(&shared));
        let monitor = std::thread::Builder::new()
            .name("lag-monitor".to_owned())
            .spawn(move || {
                while !for_monitor.stop.load(Ordering::Relaxed) {
                    look_at_links(&probe, &names, &for_monitor);
                    std::thread::sleep(LINK_POLL);
                }
            })?;
        let forwarding = std::thread::Builder::new()
            .name("lag-switch".to_owned())
            .spawn(move || {
                let mut buffer = vec![0u8; FRAME_MAX];
                let mut forwarder = Forwarder {
                    sockets,
                    device,
                    shared: &for_switch,
                    distribution,
                };
                while !for_switch.stop.load(Ordering::Relaxed) {
                    forwarder.turn(&mut buffer);
                }
            })?;
        Ok(LagSwitch {
            shared,
            threads: vec![monitor, forwarding],
        })
    }

    /// Throws away what comes from a link, which stays up, or no more.
    pub fn black_hole(&self, index: usize, on: bool) {
        self.shared.links[index].black_hole.store(on, Ordering::Relaxed);
    }

    /// What each link has carried so far, in the order in which the links were given.
    #[must_use]
    pub fn counters(&self) -> Vec<LinkCounters> {
        self.shared
            .links
            .iter()
            .map(|link| LinkCounters {
                to_peer: link.to_peer.load(Ordering::Relaxed),
                from_peer: link.from_peer.load(Ordering::Relaxed),
                lost: link.lost.load(Ordering::Relaxed),
                up: link.up.load(Ordering::Relaxed),
            })
            .collect()
    }
}

impl Drop for LagSwitch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = self.shared.wake.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn look_at_links(probe: &LinkProbe, names: &[String], shared: &Shared) {
    for (name, link) in names.iter().zip(&shared.links) {
        // A link that is gone is a link that is down.
        link.up
            .store(probe.is_up(name).unwrap_or(false), Ordering::Relaxed);
    }
}

struct Forwarder<'a> {
    sockets: Vec<PacketSocket>,
    device: File,
    shared: &'a Shared,
    distribution: Distribution,
}

impl Forwarder<'_> {
    /// Waits for frames and forwards one batch from each side that has some.
    fn turn(&mut self, buffer: &mut [u8]) {
        let ready = {
            let mut waiting: Vec<PollFd<'_>> = vec![
                PollFd::new(self.device.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            ];
            let mut watched = Vec::with_capacity(self.sockets.len());
            for (index, socket) in self.sockets.iter().enumerate() {
                // A socket on a dead link would report its error again and again.
                if self.shared.links[index].up.load(Ordering::Relaxed) {
                    watched.push(index);
                    waiting.push(PollFd::new(
                        <PacketSocket as AsFd>::as_fd(socket) as BorrowedFd<'_>,
                        PollFlags::POLLIN,
                    ));
                }
            }
            // The timeout brings links back into the set that have come up meanwhile.
            if poll(&mut waiting, PollTimeout::from(5u8)).is_err() {
                return;
            }
            let has = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            let links: Vec<usize> = watched
                .iter()
                .zip(&waiting[2..])
                .filter(|(_, fd)| has(fd))
                .map(|(index, _)| *index)
                .collect();
            (has(&waiting[0]), links)
        };
        for index in ready.1 {
            self.link_to_peer(index, buffer);
        }
        if ready.0 {
            self.peer_to_links(buffer);
        }
    }

    fn link_to_peer(&mut self, index: usize, buffer: &mut [u8]) {
        let link = &self.shared.links[index];
        for _ in 0..BATCH {
            match self.sockets[index].receive(buffer) {
                Ok(Some(_)) if link.black_hole.load(Ordering::Relaxed) => {}
                Ok(Some(length)) => {
                    link.to_peer.fetch_add(1, Ordering::Relaxed);
                    if self.device.write(&buffer[..length]).is_err() {
                        link.lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(None) => return,
                // The monitor revives it if the link is up after all.
                Err(_) => return link.up.store(false, Ordering::Relaxed),
            }
        }
    }

    fn peer_to_links(&mut self, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            let length = match self.device.read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let frame = &buffer[..length];
            let live: Vec<usize> = (0..self.sockets.len())
                .filter(|index| self.shared.links[*index].up.load(Ordering::Relaxed))
                .collect();
            match self.distribution {
                Distribution::Hub => live.iter().for_each(|index| {
                    self.send(*index, frame);
                }),
                Distribution::Lag => self.send_by_session(frame, &live),
            }
        }
    }

    fn send_by_session(&self, frame: &[u8], live: &[usize]) {
        let first = if is_group_addressed(frame) {
            live.first().copied()
        } else {
            self.choose(frame, live)
        };
        let Some(first) = first else { return };
        // A link may have died a moment ago: the next one takes the frame.
        if !self.send(first, frame)
            && let Some(other) = live.iter().find(|index| **index != first)
        {
            self.send(*other, frame);
        }
    }

    /// The session's own link if that is up; else one of the live links, so that a loss moves only that link's sessions.
    fn choose(&self, frame: &[u8], live: &[usize]) -> Option<usize> {
        let hash = session_hash(frame);
        let pick = |count: usize, hash: u64| usize::try_from(hash % u64::try_from(count).ok()?).ok();
        let own = pick(self.sockets.len(), hash)?;
        if live.contains(&own) {
            return Some(own);
        }
        if live.is_empty() {
            None
        } else {
            live.get(pick(live.len(), hash.rotate_left(32))?).copied()
        }
    }

    fn send(&self, index: usize, frame: &[u8]) -> bool {
        let link = &self.shared.links[index];
        match self.sockets[index].send(frame) {
            Ok(()) => {
                link.from_peer.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                link.lost.fetch_add(1, Ordering::Relaxed);
                if error.raw_os_error() == Some(nix::libc::ENETDOWN) {
                    link.up.store(false, Ordering::Relaxed);
                }
                false
            }
        }
    }
}
