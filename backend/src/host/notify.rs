//! Telling the service manager how far the daemon is (sd_notify(3)): a datagram of `KEY=VALUE` lines to `NOTIFY_SOCKET`.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::warn;

/// The way to the service manager; says nothing to nobody if there is none.
#[derive(Debug)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    /// The last status told, so that only changes are.
    status: String,
    watchdog: bool,
}

impl Notifier {
    /// The manager that the environment names. One that cannot be reached is worth a warning, not an end: it will then give up
    /// on us by itself and say so.
    #[must_use]
    pub fn from_environment() -> Notifier {
        let own_pid = std::process::id().to_string();
        let watchdog = std::env::var_os("WATCHDOG_USEC").is_some()
            && std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == own_pid);
        Notifier::new(std::env::var_os("NOTIFY_SOCKET"), watchdog)
    }

    fn new(address: Option<OsString>, watchdog: bool) -> Notifier {
        let manager = address.and_then(|address| match open(address.as_bytes()) {
            Ok(manager) => Some(manager),
            Err(error) => {
                warn!(
                    "cannot reach the service manager at NOTIFY_SOCKET={}: {error}",
                    address.display()
                );
                None
            }
        });
        Notifier {
            manager,
            status: String::new(),
            watchdog,
        }
    }

    /// Everything is open: what waits for this service may start.
    pub fn ready(&mut self, status: String) {
        self.send(&format!("READY=1\nSTATUS={status}"));
        self.status = status;
    }

    /// One line for `systemctl status`, told if it differs from the last.
    pub fn status(&mut self, status: String) {
        if status != self.status {
            self.send(&format!("STATUS={status}"));
            self.status = status;
        }
    }

    /// The control thread still turns. To be called every second or so: `WatchdogSec=` must be several.
    pub fn alive(&self) {
        if self.watchdog {
            self.send("WATCHDOG=1");
        }
    }

    /// The daemon ends by itself or was asked to.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.manager {
            // A manager that does not read is not worth waiting for.
            let _ = socket.send_to_addr(text.as_bytes(), address);
        }
    }
}

/// `/path` or `@abstract`.
fn open(address: &[u8]) -> io::Result<(UnixDatagram, SocketAddr)> {
    let to = match address {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(address))?,
        _ => {
            return Err(io::Error::other("is neither a path nor an abstract name"));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(manager: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    #[test]
    fn a_manager_hears_of_readiness_changes_of_status_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let mut notifier = Notifier::new(Some(path.into()), false);
        notifier.ready("1 port".into());
        notifier.status("1 port".into());
        notifier.alive();
        notifier.status("1 guest".into());
        notifier.stopping();
        let all: Vec<String> = std::iter::from_fn(|| told(&manager)).collect();
        assert_eq!(all, ["READY=1\nSTATUS=1 port", "STATUS=1 guest", "STOPPING=1"]);
    }

    #[test]
    fn abstract_names_and_the_watchdog() {
        let name = format!("vnic-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        manager.set_nonblocking(true).unwrap();
        let notifier = Notifier::new(Some(format!("@{name}").into()), true);
        notifier.alive();
        assert_eq!(told(&manager).as_deref(), Some("WATCHDOG=1"));
    }

    #[test]
    fn nobody_to_tell_is_no_error() {
        for address in [None, Some("relative"), Some("@"), Some("/no/such/socket")] {
            let mut notifier = Notifier::new(address.map(Into::into), true);
            notifier.ready("ready".into());
            notifier.alive();
            notifier.stopping();
        }
    }
}
