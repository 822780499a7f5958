//! Raw Ethernet frames: sent as given, and captured by EtherType.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::PacketSocket;

/// The EtherType that the tests use for frames of their own (IEEE 802 local experimental 1).
pub const EXPERIMENTAL: u16 = 0x88b5;
/// EtherType of RARP (RFC 903).
pub const RARP: u16 = 0x8035;
/// Frames that one capture keeps.
const CAPTURE_MAX: usize = 1024;

/// A frame with the experimental EtherType, padded to the least Ethernet length.
#[must_use]
pub fn experimental_frame(destination: [u8; 6], source: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend(destination);
    frame.extend(source);
    frame.extend(EXPERIMENTAL.to_be_bytes());
    frame.extend(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// Sends `frame` on `interface` `count` times.
///
/// # Errors
/// Those of the packet socket.
pub fn send(interface: &str, frame: &[u8], count: u32) -> io::Result<()> {
    let socket = PacketSocket::open(interface)?;
    for _ in 0..count {
        socket.send(frame)?;
    }
    Ok(())
}

/// Whom a RARP frame to everybody announces, and in which VLAN (0: it has no tag); `None` for another frame.
#[must_use]
pub fn announced(frame: &[u8]) -> Option<([u8; 6], u16)> {
    let (destination, rest) = frame.split_first_chunk::<6>()?;
    let (source, rest) = rest.split_first_chunk::<6>()?;
    let (vlan, kind) = match rest {
        [0x81, 0, tci0, tci1, kind @ ..] => (u16::from_be_bytes([*tci0, *tci1]) & 0xfff, kind),
        kind => (0, kind),
    };
    (*destination == [0xff; 6] && kind.starts_with(&RARP.to_be_bytes())).then_some((*source, vlan))
}

/// Collects the frames with `ethertype` that arrive on an interface.
pub struct Capture {
    socket: PacketSocket,
    ethertype: u16,
}

impl Capture {
    /// Starts to collect: frames that arrive from now on wait in the socket.
    ///
    /// # Errors
    /// Those of the packet socket.
    pub fn start(interface: &str, ethertype: u16) -> io::Result<Capture> {
        Ok(Capture {
            socket: PacketSocket::open(interface)?,
            ethertype,
        })
    }

    /// What has arrived; waits until `wanted` frames are there or `limit` is over.
    ///
    /// # Errors
    /// Those of the packet socket.
    pub fn collect(&self, wanted: usize, limit: Duration) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0u8; 66 * 1024];
        let end = Instant::now() + limit;
        while frames.len() < wanted.min(CAPTURE_MAX) && Instant::now() < end {
            let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut waiting, PollTimeout::from(20u8));
            while frames.len() < CAPTURE_MAX {
                let Some(length) = self.socket.receive(&mut buffer)? else {
                    break;
                };
                if buffer[..length].get(12..14) == Some(self.ethertype.to_be_bytes().as_slice()) {
                    frames.push(buffer[..length].to_vec());
                }
            }
        }
        Ok(frames)
    }
}
