//! `--fd N`: a port's socket that the parent process (libvirt, systemd) opened and left to us.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

/// Why an inherited descriptor cannot serve as a port.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// 0, 1 and 2 are the standard streams.
    #[error("--fd {fd}: descriptors 0, 1 and 2 are the standard streams: pass the socket as 3 or higher")]
    Standard {
        /// The descriptor.
        fd: RawFd,
    },
    /// Nothing is open there.
    #[error(
        "--fd {fd}: not open: the parent process must leave the socket open for vnicd (without FD_CLOEXEC)"
    )]
    NotOpen {
        /// The descriptor.
        fd: RawFd,
    },
    /// Close-on-exec is set, so that it cannot have come from the parent: it is the daemon's own.
    #[error("--fd {fd}: was not inherited from the parent process: pass the number of an inherited socket")]
    NotInherited {
        /// The descriptor.
        fd: RawFd,
    },
    /// A file, a pipe, ...
    #[error("--fd {fd}: is not a socket but {}: pass a Unix stream socket", .what.display())]
    NotASocket {
        /// The descriptor.
        fd: RawFd,
        /// What `/proc/self/fd` says that it is.
        what: PathBuf,
    },
    /// A socket of the wrong kind.
    #[error("--fd {fd}: {problem}: pass a Unix stream socket, listening or connected")]
    WrongKind {
        /// The descriptor.
        fd: RawFd,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The kernel refused.
    #[error("--fd {fd}: cannot be examined: {source}")]
    Examine {
        /// The descriptor.
        fd: RawFd,
        /// Its reason.
        source: Errno,
    },
}

/// An inherited socket, non-blocking and close-on-exec.
#[derive(Debug)]
pub enum PortSocket {
    /// Front-ends connect to it.
    Listener(UnixListener),
    /// One front-end is at its other end; when that goes away, the port is over.
    Connected(UnixStream),
}

/// Takes descriptor `fd` over from the parent process. It is closed if it turns out to be a socket of the wrong kind.
pub fn take_fd(fd: RawFd) -> Result<PortSocket, FdError> {
    let socket = take_ownership(fd)?;
    let examine = |source| FdError::Examine { fd, source };
    let wrong = |problem| Err(FdError::WrongKind { fd, problem });
    let family = getsockname::<SockaddrStorage>(socket.as_raw_fd())
        .ok()
        .and_then(|address| address.family());
    if family != Some(AddressFamily::Unix) {
        return wrong("is not a Unix socket");
    }
    if getsockopt(&socket, sockopt::SockType).map_err(examine)? != SockType::Stream {
        return wrong("is a datagram or packet socket");
    }
    if getsockopt(&socket, sockopt::AcceptConn).map_err(examine)? {
        let listener = UnixListener::from(socket);
        listener
            .set_nonblocking(true)
            .map_err(|error| examine(errno(&error)))?;
        return Ok(PortSocket::Listener(listener));
    }
    let stream = UnixStream::from(socket);
    if stream.peer_addr().is_err() {
        return wrong("neither listens nor is connected");
    }
    stream
        .set_nonblocking(true)
        .map_err(|error| examine(errno(&error)))?;
    Ok(PortSocket::Connected(stream))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

fn take_ownership(fd: RawFd) -> Result<OwnedFd, FdError> {
    /// One taker at a time, so that the look and the taking are one step among callers of this function.
    static TAKING: Mutex<()> = Mutex::new(());
    let _one = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if fd < 0 {
        return Err(FdError::NotOpen { fd });
    }
    if fd <= 2 {
        return Err(FdError::Standard { fd });
    }
    let what = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| FdError::NotOpen { fd })?;
    if !what.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
        return Err(FdError::NotASocket { fd, what });
    }
    if !survives_exec(fd)? {
        return Err(FdError::NotInherited { fd });
    }
    // SAFETY: `fd` is open (it is in /proc/self/fd) and nobody in this process owns it: it lacks FD_CLOEXEC, which all that
    // std, nix and vmm-sys-util open has, so it was there before the program began. It is taken once: it gets the
    // flag below before the lock is released, and the next call is refused.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|source| FdError::Examine { fd, source })?;
    Ok(owned)
}

/// Whether FD_CLOEXEC is off, from the octal `flags:` of `/proc/self/fdinfo` (proc_pid_fdinfo(5)): asking fcntl(2) would
/// already need a borrow of a descriptor that is not known to be ours.
fn survives_exec(fd: RawFd) -> Result<bool, FdError> {
    let info =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(|_| FdError::NotOpen { fd })?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| libc::c_int::from_str_radix(text.trim(), 8).ok());
    let flags = flags.ok_or(FdError::Examine {
        fd,
        source: Errno::EINVAL,
    })?;
    Ok(flags & libc::O_CLOEXEC == 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, IntoRawFd};
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// What a descriptor looks like after exec(2).
    fn inherited(fd: impl AsFd + IntoRawFd) -> RawFd {
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        fd.into_raw_fd()
    }

    #[track_caller]
    fn refused(fd: RawFd, fragment: &str) {
        let message = take_fd(fd).unwrap_err().to_string();
        assert!(
            message.contains(&format!("--fd {fd}")) && message.contains(fragment),
            "{message}"
        );
    }

    #[test]
    fn a_listener_and_a_connection_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let PortSocket::Listener(listener) = take_fd(inherited(UnixListener::bind(&path).unwrap())).unwrap()
        else {
            panic!("a listener")
        };
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let fd = inherited(ours);
        let PortSocket::Connected(mut stream) = take_fd(fd).unwrap() else {
            panic!("a connection")
        };
        let mut byte = [0];
        assert_eq!(
            stream.read(&mut byte).unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock
        );
        theirs.write_all(b"x").unwrap();
        assert_eq!(stream.read(&mut byte).unwrap(), 1);
        refused(fd, "not inherited");
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        refused(-1, "not open");
        refused(1, "standard streams");
        refused(987_654, "not open");
        refused(
            inherited(std::fs::File::open("/dev/null").unwrap()),
            "not a socket but /dev/null",
        );
        refused(inherited(UnixDatagram::unbound().unwrap()), "datagram");
        refused(
            inherited(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
            "not a Unix socket",
        );
        let flags = nix::sys::socket::SockFlag::empty();
        let idle = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        refused(inherited(idle), "neither listens nor is connected");
    }
}
