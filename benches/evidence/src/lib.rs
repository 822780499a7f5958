//! What the evidence programs share: a tally of claims, a raw vhost-user peer, private network namespaces.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};

use vhost::vhost_user::message::FrontendReq;

/// The claims that one program checks.
#[derive(Default)]
pub struct Claims {
    failed: u32,
}

impl Claims {
    /// Prints one claim with what was seen, and remembers whether it holds.
    pub fn check(&mut self, claim: &str, holds: bool, seen: impl std::fmt::Display) {
        println!(
            "{} {claim}\n      seen: {seen}",
            if holds { "[yes]" } else { "[NO ]" }
        );
        self.failed += u32::from(!holds);
    }

    /// 0 when every claim was reproduced, 1 when one was not.
    pub fn exit(self) -> ExitCode {
        println!(
            "{}",
            if self.failed == 0 {
                "reproduced"
            } else {
                "NOT reproduced"
            }
        );
        ExitCode::from(u8::from(self.failed != 0))
    }
}

/// Header flags of a vhost-user message: version 1.
pub const VERSION: u32 = 1;
/// Header flag: the front-end wants an answer.
pub const NEED_REPLY: u32 = 8;

/// A whole vhost-user message as bytes, so that a peer can also send half of one.
pub fn message(request: FrontendReq, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).expect("bodies here are a few bytes");
    let mut bytes = Vec::new();
    for word in [request as u32, VERSION | flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// The body of the SET_VRING_* messages that carry an index and a number.
pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// Sends bytes; what the back-end did about them is the caller's business.
pub fn send(peer: &mut UnixStream, bytes: &[u8]) {
    peer.write_all(bytes)
        .expect("the other end of the socket pair is open");
}

/// Bytes that are waiting on a socket, without blocking.
pub fn pending(peer: &mut UnixStream) -> usize {
    peer.set_nonblocking(true).expect("fcntl on our own socket");
    let waiting = peer.read(&mut [0; 4096]).unwrap_or(0);
    peer.set_nonblocking(false).expect("fcntl on our own socket");
    waiting
}

/// Moves this process into a network namespace of its own, which ends with it.
pub fn private_netns() -> std::io::Result<()> {
    // SAFETY: unshare takes no pointers; the callers have not started threads yet.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    ip("link set lo up")
}

/// Runs `ip` with these words.
pub fn ip(words: &str) -> std::io::Result<()> {
    let status = Command::new("ip").args(words.split_whitespace()).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(std::io::Error::other(format!("ip {words}: {status}")))
    }
}

/// What `ip` says to these words.
pub fn ip_output(words: &str) -> std::io::Result<String> {
    let output = Command::new("ip").args(words.split_whitespace()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The value that a share `q` (0 to 1) of the samples do not exceed. Sorts them.
pub fn quantile(samples: &mut [f64], q: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * q).round() as usize]
}
