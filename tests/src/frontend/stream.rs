//! Frames one way, at a steady rate.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::frames::{self, Addresses};
use super::{Device, STALL};

/// Between two looks whether a frame is due.
const PACE: Duration = Duration::from_micros(100);

/// Connects to vnicd's socket and sends the frames 0, 1, 2, ..., `rate` a second, until `ended`; returns how many vnicd took.
///
/// # Errors
/// An error of the vhost-user protocol, or frames that vnicd leaves in the ring in the end.
pub fn stream(socket: &Path, addresses: Addresses, rate: u32, ended: impl Fn() -> bool) -> Result<u32> {
    let mut device = Device::connect(socket, 1)?;
    let (began, mut sent) = (Instant::now(), 0);
    while !ended() {
        let due = began.elapsed().as_micros() * u128::from(rate) / 1_000_000;
        if u128::from(sent) < due && device.send(0, &frames::request(addresses, sent))? {
            sent += 1;
        } else {
            std::thread::sleep(PACE);
        }
        while device.receive(0)?.is_some() {}
    }
    let ended_at = Instant::now();
    while device.unsent(0)? > 0 {
        ensure!(
            ended_at.elapsed() < STALL,
            "vnicd leaves {} frames in the ring",
            device.unsent(0)?
        );
        std::thread::sleep(PACE);
    }
    Ok(sent)
}
