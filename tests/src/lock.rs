//! One QEMU test at a time on a machine: guests on emulation need the cores, and timing suffers when they share.

use std::fs::{File, OpenOptions};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// Held while a test uses the machine; released when dropped, even by a crash.
#[derive(Debug)]
pub struct MachineLock {
    _held: Flock<File>,
}

impl MachineLock {
    /// Waits for the lock.
    ///
    /// # Errors
    /// If the lock file cannot be opened.
    pub fn acquire() -> Result<MachineLock> {
        let path = std::env::temp_dir().join("vnic-machine.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {}", path.display()))?;
        Ok(MachineLock { _held: held })
    }
}
