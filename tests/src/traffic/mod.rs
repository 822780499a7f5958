//! Traffic between guest and peer. The same code runs at both ends: inside the guest's agent and in the peer's namespace.

pub mod bulk;
pub mod echo;
pub mod raw;
pub mod sessions;
pub mod udp;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// How long a TCP connection may take to open.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Opens a TCP connection without Nagle's delay.
pub(crate) fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, CONNECT_LIMIT)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A listener on all addresses, IPv4 and IPv6 alike.
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)))
}

/// Whole milliseconds, rounded up: a gap of 0.2 ms is not "0".
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
