//! Unix sockets that the daemon listens on: made with the right mode, stale ones replaced, removed at the end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::Mode;

/// Mode of the control socket: its owner only, since it shows every session.
pub const CONTROL_MODE: u32 = 0o600;
/// Mode of a port's socket: owner and group, so that QEMU in the folder's group (`chmod g+s`) can connect.
pub const PORT_MODE: u32 = 0o660;
/// The folder that is made if it is missing; any other must be there.
const OWN_FOLDER: &str = "/run/vnic";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error(
        "{}: socket is in use by another process: stop it (is a vnicd running already?) or choose another path", .path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there, which is not ours to remove.
    #[error("{}: exists and is not a socket: remove it or choose another path", .path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The folder is missing.
    #[error("{}: the folder {} does not exist: create it with `mkdir -p {}`", .path.display(), .folder.display(), .folder.display())]
    NoFolder {
        /// The socket.
        path: PathBuf,
        /// Where it should be.
        folder: PathBuf,
    },
    /// Longer than `sun_path`.
    #[error("{}: too long for a Unix socket, whose path has at most 107 bytes: use a shorter path", .path.display())]
    TooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Anything else.
    #[error("{}: cannot {action}: {source}; check the permissions of its folder", .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A listening, non-blocking Unix stream socket; its path is removed when it is dropped, if it is still this socket's.
#[derive(Debug)]
pub struct BoundListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the path.
    identity: (u64, u64),
}

impl BoundListener {
    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for BoundListener {
    fn drop(&mut self) {
        // Another daemon may have replaced the path in the meantime; its socket must stay.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Listens on `path` with exactly the permissions `mode`. A socket file that nobody listens on is replaced; the folder
/// /run/vnic is made if it is missing.
pub fn bind_listener(path: &Path, mode: u32) -> Result<BoundListener, SocketError> {
    let io = |action, errno: Errno| SocketError::Io {
        path: path.to_owned(),
        action,
        source: errno.into(),
    };
    let address = UnixAddr::new(path).map_err(|errno| match errno {
        Errno::ENAMETOOLONG => SocketError::TooLong {
            path: path.to_owned(),
        },
        other => io("use the path", other),
    })?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|errno| io("make a socket", errno))?;
    // bind(2) gives the path the socket's own mode less the umask: there is no moment in which others may connect.
    nix::sys::stat::fchmod(&fd, Mode::from_bits_truncate(mode)).map_err(|errno| io("set the mode", errno))?;
    let bind = || nix::sys::socket::bind(fd.as_raw_fd(), &address);
    let mut outcome = bind();
    if outcome == Err(Errno::EADDRINUSE) {
        remove_stale(path)?;
        outcome = bind();
    } else if outcome == Err(Errno::ENOENT) {
        make_folder(path)?;
        outcome = bind();
    }
    match outcome {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => {
            return Err(SocketError::InUse {
                path: path.to_owned(),
            });
        }
        Err(errno) => return Err(io("bind", errno)),
    }
    let failed = |action| {
        move |source| SocketError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let identity = identity(path).map_err(failed("look at the socket"))?;
    let bound = BoundListener {
        listener: UnixListener::from(fd),
        path: path.to_owned(),
        identity,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed("set the mode"))?;
    let backlog = Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN);
    nix::sys::socket::listen(&bound.listener, backlog).map_err(|errno| io("listen", errno))?;
    Ok(bound)
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |action| {
        move |source| SocketError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at the socket")(error)),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "removing a stale socket: nobody listens on it");
            std::fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Whatever else it answers (a full backlog, another type of socket), somebody holds it.
        _ => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
    }
}

fn make_folder(path: &Path) -> Result<(), SocketError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if folder != Path::new(OWN_FOLDER) {
        return Err(SocketError::NoFolder {
            path: path.to_owned(),
            folder: folder.to_owned(),
        });
    }
    std::fs::create_dir_all(folder).map_err(|source| SocketError::Io {
        path: path.to_owned(),
        action: "make its folder",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listens_with_the_mode_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = bind_listener(&path, PORT_MODE).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, PORT_MODE);
        UnixStream::connect(&path).unwrap();
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = UnixListener::bind(&path).unwrap();
        let message = bind_listener(&path, CONTROL_MODE).unwrap_err().to_string();
        assert!(
            message.contains("in use by another") && message.contains(path.to_str().unwrap()),
            "{message}"
        );
        drop(first);
        assert!(
            path.exists(),
            "std's listener leaves its path behind: a stale socket"
        );
        let _bound = bind_listener(&path, CONTROL_MODE).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_and_a_missing_folder_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let message = bind_listener(&path, CONTROL_MODE).unwrap_err().to_string();
        assert!(message.contains("not a socket"), "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let message = bind_listener(&dir.path().join("no/s"), CONTROL_MODE)
            .unwrap_err()
            .to_string();
        let cure = format!("mkdir -p {}", dir.path().join("no").display());
        assert!(
            message.contains("does not exist") && message.contains(&cure),
            "{message}"
        );
    }

    #[test]
    fn a_successors_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = bind_listener(&path, CONTROL_MODE).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _theirs = bind_listener(&path, CONTROL_MODE).unwrap();
        drop(ours);
        UnixStream::connect(&path).unwrap();
    }
}
