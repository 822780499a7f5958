//! Exchanges frames with an echo behind vnicd, as a guest would, and writes what became of them as JSON; or only sends.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use vnic_tests::frontend::frames::Addresses;
use vnic_tests::frontend::{Plan, exchange, stream};
use vnic_tests::sys::{interrupted, note_interruptions};

/// A vhost-user front-end that sends frames of 60 to 1514 bytes to an echo and checks every byte of the answers.
#[derive(Parser)]
struct Options {
    /// vnicd's socket.
    #[arg(long)]
    socket: PathBuf,
    /// The guest's MAC address.
    #[arg(long, value_parser = mac)]
    mac: [u8; 6],
    /// The echo's MAC address.
    #[arg(long, value_parser = mac)]
    peer: [u8; 6],
    /// Frames to send.
    #[arg(long, default_value_t = 1455)]
    frames: u32,
    /// Frames that may be unanswered at a time.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Queue pairs.
    #[arg(long, default_value_t = 1)]
    pairs: usize,
    /// Sends a frame again that was not answered for this many milliseconds, instead of failing.
    #[arg(long)]
    resend_ms: Option<u64>,
    /// Only sends, this many frames a second, until SIGTERM; writes how many.
    #[arg(long, conflicts_with_all = ["frames", "window", "pairs", "resend_ms"])]
    stream: Option<u32>,
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("{text} is no MAC address"))
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let addresses = Addresses {
        guest: options.mac,
        peer: options.peer,
    };
    if let Some(rate) = options.stream {
        note_interruptions()?;
        println!("{}", stream(&options.socket, addresses, rate, interrupted)?);
        return Ok(());
    }
    let plan = Plan {
        addresses,
        frames: options.frames,
        window: options.window,
        pairs: options.pairs,
        resend: options.resend_ms.map(Duration::from_millis),
    };
    let report = exchange(&options.socket, &plan)?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
