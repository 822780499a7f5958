//! UDP datagrams echoed over several flows.

use std::io::{self, ErrorKind};
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A UDP echo server; it stops when dropped.
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    /// Listens on `port` in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(port: u16) -> io::Result<UdpEcho> {
        let socket = UdpSocket::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let for_thread = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("udp-echo".to_owned())
            .spawn(move || {
                let mut buffer = vec![0u8; 64 * 1024];
                while !for_thread.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        // A lost answer shows at the client.
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            })?;
        Ok(UdpEcho {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a UDP client shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpPlan {
    /// The echo server.
    pub target: SocketAddr,
    /// Flows, each from a port of its own.
    pub flows: u32,
    /// Datagrams per flow.
    pub datagrams: u32,
    /// Payload bytes of one datagram (at least 8).
    pub bytes: u32,
    /// Milliseconds to wait for one echo.
    pub patience_ms: u32,
}

/// What became of the datagrams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Echoes that came back whole.
    pub echoed: u64,
    /// Echoes that differed from what was sent.
    pub corrupt: u64,
    /// Echoes that came more than once, or too late.
    pub stray: u64,
}

/// Sends the datagrams, one at a time per flow, and checks the echoes.
///
/// # Errors
/// If a socket cannot be made.
pub fn probe(plan: &UdpPlan) -> io::Result<UdpReport> {
    let any: SocketAddr = if plan.target.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let length = usize::try_from(plan.bytes).unwrap_or(8).clamp(8, 60_000);
    let mut report = UdpReport::default();
    let mut buffer = vec![0u8; 64 * 1024];
    let patience = Duration::from_millis(u64::from(plan.patience_ms.max(1)));
    // All at once and kept: a socket that were closed could give its port, and so its flow, to a later one.
    let sockets = (0..plan.flows)
        .map(|_| {
            let socket = UdpSocket::bind(any)?;
            socket.connect(plan.target)?;
            socket.set_read_timeout(Some(patience))?;
            Ok(socket)
        })
        .collect::<io::Result<Vec<_>>>()?;
    for (flow, socket) in (0u32..).zip(&sockets) {
        for number in 0..plan.datagrams {
            let mut datagram = Vec::with_capacity(length);
            datagram.extend(flow.to_le_bytes());
            datagram.extend(number.to_le_bytes());
            datagram.extend((8..length).zip((0..=u8::MAX).cycle()).map(|(_, byte)| byte));
            report.sent += 1;
            if socket.send(&datagram).is_err() {
                continue;
            }
            loop {
                match socket.recv(&mut buffer) {
                    Ok(received) if buffer[..received] == datagram => report.echoed += 1,
                    Ok(received) if buffer.get(..8) == datagram.get(..8) && received >= 8 => {
                        report.corrupt += 1
                    }
                    Ok(_) => {
                        report.stray += 1;
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => {}
                }
                break;
            }
        }
    }
    Ok(report)
}
