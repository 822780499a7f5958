//! A port's socket that the parent process opened and left to us: `--fd N`, or systemd's socket activation.

mod environment;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

pub use environment::{Activated, ActivationError};

/// Who handed a descriptor over, for messages and for the cure that fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `--fd N`.
    Option,
    /// Socket activation, under this name.
    Activation(String),
}

/// A descriptor and where its number comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed {
    /// The descriptor.
    pub fd: RawFd,
    /// Who handed it over.
    pub origin: Origin,
}

impl std::fmt::Display for Handed {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.origin {
            Origin::Option => write!(out, "--fd {}", self.fd),
            Origin::Activation(name) => write!(out, "activated socket `{name}` (descriptor {})", self.fd),
        }
    }
}

impl Handed {
    /// What the operator should hand over instead.
    fn wanted(&self) -> &'static str {
        match self.origin {
            Origin::Option => "pass a Unix stream socket, listening or connected",
            Origin::Activation(_) => {
                "give the .socket unit `ListenStream=` with a path (not ListenDatagram=, ListenSequentialPacket= or \
                 ListenFIFO=), and leave Accept= off"
            }
        }
    }
}

/// Why an inherited descriptor cannot serve as a port.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// 0, 1 and 2 are the standard streams.
    #[error("{0}: descriptors 0, 1 and 2 are the standard streams: pass the socket as 3 or higher")]
    Standard(Handed),
    /// Nothing is open there.
    #[error("{0}: not open: the parent process must leave the socket open for vnicd (without FD_CLOEXEC)")]
    NotOpen(Handed),
    /// Close-on-exec is set, so that it cannot have come from the parent: it is the daemon's own.
    #[error("{0}: was not inherited from the parent process: pass the number of an inherited socket")]
    NotInherited(Handed),
    /// A file, a pipe, ...
    #[error("{handed}: is not a socket but {}: {}", .what.display(), .handed.wanted())]
    NotASocket {
        /// The descriptor.
        handed: Handed,
        /// What `/proc/self/fd` says that it is.
        what: PathBuf,
    },
    /// A socket of the wrong kind.
    #[error("{handed}: {problem}: {}", .handed.wanted())]
    WrongKind {
        /// The descriptor.
        handed: Handed,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The kernel refused.
    #[error("{handed}: cannot be examined: {source}")]
    Examine {
        /// The descriptor.
        handed: Handed,
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

/// Takes a descriptor over from the parent process. It is closed if it turns out to be a socket of the wrong kind.
pub fn take_fd(handed: &Handed) -> Result<PortSocket, FdError> {
    let socket = take_ownership(handed)?;
    let examine = |source| FdError::Examine {
        handed: handed.clone(),
        source,
    };
    let wrong = |problem| {
        Err(FdError::WrongKind {
            handed: handed.clone(),
            problem,
        })
    };
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
    if handed.origin != Origin::Option {
        return wrong("is one connection, not a socket that listens");
    }
    stream
        .set_nonblocking(true)
        .map_err(|error| examine(errno(&error)))?;
    Ok(PortSocket::Connected(stream))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

fn take_ownership(handed: &Handed) -> Result<OwnedFd, FdError> {
    /// One taker at a time, so that the look and the taking are one step among callers of this function.
    static TAKING: Mutex<()> = Mutex::new(());
    let _one = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let fd = handed.fd;
    if fd < 0 {
        return Err(FdError::NotOpen(handed.clone()));
    }
    if fd <= 2 {
        return Err(FdError::Standard(handed.clone()));
    }
    let what =
        std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| FdError::NotOpen(handed.clone()))?;
    if !what.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
        return Err(FdError::NotASocket {
            handed: handed.clone(),
            what,
        });
    }
    if !survives_exec(handed)? {
        return Err(FdError::NotInherited(handed.clone()));
    }
    // SAFETY: `fd` is open (it is in /proc/self/fd) and nobody in this process owns it: it lacks FD_CLOEXEC, which all that
    // std, nix and vmm-sys-util open has, so it was there before the program began. It is taken once: it gets the
    // flag below before the lock is released, and the next call is refused.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|source| FdError::Examine {
        handed: handed.clone(),
        source,
    })?;
    Ok(owned)
}

/// Whether FD_CLOEXEC is off, from the octal `flags:` of `/proc/self/fdinfo` (proc_pid_fdinfo(5)): asking fcntl(2) would
/// already need a borrow of a descriptor that is not known to be ours.
fn survives_exec(handed: &Handed) -> Result<bool, FdError> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", handed.fd))
        .map_err(|_| FdError::NotOpen(handed.clone()))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| libc::c_int::from_str_radix(text.trim(), 8).ok());
    let flags = flags.ok_or(FdError::Examine {
        handed: handed.clone(),
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

    fn option(fd: RawFd) -> Handed {
        Handed {
            fd,
            origin: Origin::Option,
        }
    }

    #[track_caller]
    fn refused(fd: RawFd, fragment: &str) {
        let message = take_fd(&option(fd)).unwrap_err().to_string();
        assert!(
            message.contains(&format!("--fd {fd}")) && message.contains(fragment),
            "{message}"
        );
    }

    #[test]
    fn a_listener_and_a_connection_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let PortSocket::Listener(listener) =
            take_fd(&option(inherited(UnixListener::bind(&path).unwrap()))).unwrap()
        else {
            panic!("a listener")
        };
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let fd = inherited(ours);
        let PortSocket::Connected(mut stream) = take_fd(&option(fd)).unwrap() else {
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
    #[test]
    fn activated_sockets_are_refused_in_the_words_of_socket_units() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        for (fd, problem) in [
            (inherited(UnixDatagram::unbound().unwrap()), "datagram"),
            (inherited(ours), "one connection"),
            (
                inherited(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
                "not a Unix socket",
            ),
        ] {
            let handed = Handed {
                fd,
                origin: Origin::Activation("web".into()),
            };
            let message = take_fd(&handed).unwrap_err().to_string();
            for fragment in ["activated socket `web`", problem, "ListenStream=", "Accept="] {
                assert!(
                    message.contains(fragment),
                    "`{fragment}` is missing in: {message}"
                );
            }
        }
    }
}
