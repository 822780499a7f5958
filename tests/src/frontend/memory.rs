//! Memory that a front-end shares with a device.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

/// Which pages the memory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Of 4 KiB.
    Ordinary,
    /// Of 2 MiB, if enough are free.
    HugeIfFree,
}

/// A mapped memfd: one region of guest memory, from guest address 0 on.
pub struct SharedMemory {
    guest: GuestMemoryMmap,
    file: Arc<File>,
    bytes: u64,
    huge: bool,
}

impl SharedMemory {
    /// At least `bytes` of zeros.
    ///
    /// # Errors
    /// Those of memfd_create(2) and mmap(2).
    pub fn new(bytes: u64, pages: Pages) -> Result<SharedMemory> {
        let huge = match pages {
            Pages::Ordinary => None,
            Pages::HugeIfFree => map_huge(bytes.next_multiple_of(HUGE_PAGE))?,
        };
        let is_huge = huge.is_some();
        let (file, region) = match huge {
            Some(mapped) => mapped,
            None => map(bytes, MFdFlags::MFD_CLOEXEC).context("mapping guest memory")?,
        };
        let bytes = u64::try_from(region.size())?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).context("guest memory at address 0")?;
        Ok(SharedMemory {
            guest: GuestMemoryMmap::from_regions(vec![region])?,
            file,
            bytes,
            huge: is_huge,
        })
    }

    /// The memory by guest addresses.
    #[must_use]
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// All of it; an offset is a guest address.
    ///
    /// # Panics
    /// Never: there is one region.
    #[must_use]
    pub fn region(&self) -> &MmapRegion {
        self.guest.iter().next().expect("one region")
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it has huge pages.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The memfd.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The front-end's own address of a guest address: vhost-user gives ring addresses in these.
    ///
    /// # Errors
    /// If it is outside the memory.
    pub fn user_address(&self, address: u64) -> Result<u64> {
        let pointer = self
            .guest
            .get_host_address(GuestAddress(address))
            .context("an address outside guest memory")?;
        Ok(u64::try_from(pointer as usize)?)
    }
}

/// Mapped huge pages, if there are enough: the kernel sets them aside when they are mapped, or refuses.
fn map_huge(bytes: u64) -> Result<Option<(Arc<File>, MmapRegion)>> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    match map(bytes, flags) {
        Ok(mapped) => Ok(Some(mapped)),
        Err(error) => match error.downcast_ref::<MmapRegionError>() {
            Some(MmapRegionError::Mmap(_)) => Ok(None),
            // A kernel without huge pages.
            _ if error.is::<Errno>() => Ok(None),
            _ => Err(error),
        },
    }
}

fn map(bytes: u64, flags: MFdFlags) -> Result<(Arc<File>, MmapRegion)> {
    let file = Arc::new(File::from(memfd_create(c"guest", flags)?));
    file.set_len(bytes)?;
    let region = MmapRegionBuilder::new(usize::try_from(bytes)?)
        .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        // Page faults would be taken for the device's slowness.
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_POPULATE)
        .build()?;
    Ok((file, region))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes as _, VolatileMemory as _};

    #[test]
    fn an_offset_is_a_guest_address() {
        for pages in [Pages::Ordinary, Pages::HugeIfFree] {
            let memory = SharedMemory::new(10_000, pages).unwrap();
            assert!(memory.bytes() >= 10_000 && memory.region().len() as u64 == memory.bytes());
            memory.guest().write_obj(77u32, GuestAddress(9000)).unwrap();
            assert_eq!(
                memory.region().as_volatile_slice().read_obj::<u32>(9000).unwrap(),
                77
            );
            assert_eq!(
                memory.user_address(9000).unwrap() - memory.user_address(0).unwrap(),
                9000
            );
            assert!(memory.user_address(memory.bytes()).is_err());
            assert_eq!(memory.file().metadata().unwrap().len(), memory.bytes());
        }
    }

    #[test]
    fn more_huge_pages_than_there_are_are_refused_at_once() {
        assert!(map_huge(64 << 40).unwrap().is_none());
    }
}
