//! Bulk transfer over TCP whose content is checked at the far end.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{connect, listen, millis};

/// How long either side may be stuck before the transfer has failed.
const STALL_LIMIT: Duration = Duration::from_secs(20);

/// What a transfer shall do. The client sends; to transfer the other way, put the client on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkPlan {
    /// The bulk server.
    pub target: SocketAddr,
    /// Bytes to send.
    pub bytes: u64,
    /// Where the content starts from.
    pub seed: u64,
}

/// How a transfer went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkReport {
    /// Bytes that the server received.
    pub bytes: u64,
    /// Whether the server saw exactly what was sent.
    pub intact: bool,
    /// Milliseconds from the first byte to the server's answer.
    pub elapsed_ms: u64,
}

/// A xorshift generator: content that neither repeats in a frame nor compresses.
struct Content(u64);

impl Content {
    fn new(seed: u64) -> Content {
        Content(seed | 1)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// FNV-1a over 64-bit words, eight bytes at a time: enough to see damage, cheap on an emulated CPU.
struct Checksum(u64);

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
/// Both sides work in blocks of this size, so that the checksum's words fall alike.
const BLOCK: usize = 64 * 1024;

/// A server that receives transfers and answers each with the count and checksum of what came; it stops when dropped.
pub struct BulkServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BulkServer {
    /// Listens on `port` in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(port: u16) -> io::Result<BulkServer> {
        let listener = listen(port)?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let for_thread = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("bulk-server".to_owned())
            .spawn(move || {
                let mut transfers: Vec<JoinHandle<io::Result<()>>> = Vec::new();
                while !for_thread.load(Ordering::Relaxed) {
                    transfers.retain(|transfer| !transfer.is_finished());
                    match listener.accept() {
                        // The client reports a failed transfer.
                        Ok((stream, _)) if transfers.len() < 64 => {
                            transfers.push(std::thread::spawn(move || receive(&stream)))
                        }
                        _ => std::thread::sleep(Duration::from_millis(10)),
                    }
                }
            })?;
        Ok(BulkServer {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for BulkServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn set_limits(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STALL_LIMIT))?;
    stream.set_write_timeout(Some(STALL_LIMIT))
}

fn receive(mut stream: &TcpStream) -> io::Result<()> {
    set_limits(stream)?;
    let mut length = [0u8; 8];
    stream.read_exact(&mut length)?;
    let mut left = u64::from_le_bytes(length);
    let mut checksum = Checksum(FNV_BASIS);
    let mut block = vec![0u8; BLOCK];
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        stream.read_exact(&mut block[..part])?;
        checksum.add(&block[..part]);
        left -= u64::try_from(part).unwrap_or(0);
    }
    stream.write_all(&length)?;
    stream.write_all(&checksum.0.to_le_bytes())
}

/// Sends the bytes and compares the server's answer.
///
/// # Errors
/// If the connection fails or stalls for 20 s.
pub fn transfer(plan: &BulkPlan) -> io::Result<BulkReport> {
    let mut stream = connect(plan.target)?;
    set_limits(&stream)?;
    let start = Instant::now();
    stream.write_all(&plan.bytes.to_le_bytes())?;
    let (mut content, mut checksum) = (Content::new(plan.seed), Checksum(FNV_BASIS));
    let mut block = vec![0u8; BLOCK];
    let mut left = plan.bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        content.fill(&mut block[..part]);
        checksum.add(&block[..part]);
        stream.write_all(&block[..part])?;
        left -= u64::try_from(part).unwrap_or(0);
    }
    let (mut count, mut answer) = ([0u8; 8], [0u8; 8]);
    stream.read_exact(&mut count)?;
    stream.read_exact(&mut answer)?;
    let bytes = u64::from_le_bytes(count);
    let intact = bytes == plan.bytes && u64::from_le_bytes(answer) == checksum.0;
    Ok(BulkReport {
        bytes,
        intact,
        elapsed_ms: millis(start.elapsed()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_sees_one_changed_bit() {
        let mut content = vec![0u8; 1000];
        Content::new(7).fill(&mut content);
        let mut before = Checksum(FNV_BASIS);
        before.add(&content);
        content[500] ^= 1;
        let mut after = Checksum(FNV_BASIS);
        after.add(&content);
        assert_ne!(before.0, after.0);
    }
}
