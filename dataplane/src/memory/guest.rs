//! Guest memory: the regions a front-end shares, mapped, checked and translated.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One region, as SET_MEM_TABLE or ADD_MEM_REG describes it.
#[derive(Debug)]
pub struct RegionSpec {
    /// Guest physical address.
    pub guest_addr: u64,
    /// The front-end's virtual address (vring addresses are given in these).
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region begins in the file.
    pub mmap_offset: u64,
    /// The file.
    pub fd: Arc<OwnedFd>,
}

/// Why a region or a table was refused.
#[derive(Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// The region reaches past the end of its file; touching it would raise SIGBUS.
    #[error("memory region at guest address {guest_addr:#x} needs {needed} bytes of a file that has {actual}")]
    PastEndOfFile {
        /// The region.
        guest_addr: u64,
        /// Offset + size.
        needed: u64,
        /// The file's size.
        actual: u64,
    },
}

/// An immutable map of one guest's memory. Rings hold an `Arc` of it: it cannot go away under them.
pub struct GuestMemory {
    _private: (),
}

impl GuestMemory {
    /// Maps and checks a whole table.
    pub fn new(_regions: &[RegionSpec]) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        unimplemented!()
    }
}
