//! ADR 0008: what `vm-memory`'s mapping does with the memory that a vhost-user front-end shares.

use std::fs::{self, File};
use std::os::fd::FromRawFd;
use std::process::ExitCode;

use vm_memory::{FileOffset, MmapRegion};
use vnic_evidence::Claims;

/// QEMU splits a PC's memory here: low RAM ends at 640 KiB, and the region behind it begins at such an offset.
const SPLIT: u64 = 0xa_0000;

fn huge_file() -> Option<File> {
    // SAFETY: a constant C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    // SAFETY: a descriptor that was just made and that nothing else owns.
    let file = (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })?;
    file.set_len(4 << 20).ok()?;
    Some(file)
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    match huge_file() {
        Some(file) => {
            let outcome = MmapRegion::<()>::from_file(FileOffset::new(file, SPLIT), 1 << 20);
            let seen = outcome
                .as_ref()
                .map_or_else(ToString::to_string, |_| "mapped".to_owned());
            claims.check(
                "a region at 640 KiB of a file on huge pages cannot be mapped",
                outcome.is_err(),
                seen,
            );
        }
        None => println!("[ - ] no huge pages here: sysctl vm.nr_hugepages=4"),
    }
    let ordinary = || {
        // SAFETY: as in `huge_file`.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
        file.set_len(1 << 20).map(|()| file)
    };
    let before = open_files();
    let regions: Vec<_> = (0..100)
        .filter_map(|_| MmapRegion::<()>::from_file(FileOffset::new(ordinary().ok()?, 0), 1 << 20).ok())
        .collect();
    let held = open_files() - before;
    claims.check(
        "each mapped region keeps its file descriptor open",
        held == regions.len(),
        format!("{held} for 100"),
    );
    claims.exit()
}
