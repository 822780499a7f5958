//! Guest memory: the regions a front-end shares, mapped, checked and translated.
//!
//! A map is immutable. Adding or removing a region makes a new map that shares the unchanged mappings, so a ring keeps
//! the map it was started with for as long as it may hold a pointer into it.

mod region;
mod sigbus;

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use region::Region;
pub use sigbus::loss_event;

/// Most regions of one map: QEMU's own limit for memory slots (vhost-user GET_MAX_MEM_SLOTS).
pub const MAX_REGIONS: usize = 509;

/// Most regions of a SET_MEM_TABLE (vhost-user, "Memory regions description"): what is mapped beside the old table until that goes.
pub const MAX_TABLE_REGIONS: usize = 8;

/// One region, as SET_MEM_TABLE or ADD_MEM_REG describes it.
#[derive(Debug, Clone)]
pub struct RegionSpec {
    /// Guest physical address.
    pub guest_addr: u64,
    /// The front-end's virtual address (vring addresses are given in these).
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region begins in the file.
    pub mmap_offset: u64,
    /// The file. Needed only while the region is being mapped.
    pub fd: Arc<OwnedFd>,
}

/// Why a region or a table was refused.
#[derive(Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// A table without a region: no ring could ever work with it.
    #[error("the memory table has no region")]
    NoRegions,
    /// More than [`MAX_REGIONS`] regions.
    #[error("the memory table has {count} regions, at most {MAX_REGIONS} are supported")]
    TooManyRegions {
        /// How many there would be.
        count: usize,
    },
    /// A region without a byte.
    #[error("memory region at guest address {guest_addr:#x} has size 0")]
    Empty {
        /// The region.
        guest_addr: u64,
    },
    /// A start plus the size does not fit in 64 bits.
    #[error("memory region at guest address {guest_addr:#x}: {field} {start:#x} + size {size:#x} overflows")]
    Overflow {
        /// The region.
        guest_addr: u64,
        /// Which of the region's addresses.
        field: &'static str,
        /// Its value.
        start: u64,
        /// The region's size.
        size: u64,
    },
    /// Two regions claim the same addresses.
    #[error("memory regions at guest addresses {first:#x} and {second:#x} overlap in their {field}es")]
    Overlap {
        /// The region with the lower address.
        first: u64,
        /// The other.
        second: u64,
        /// Which of the regions' addresses overlap.
        field: &'static str,
    },
    /// The region reaches past the end of its file; touching it would raise SIGBUS.
    #[error(
        "memory region at guest address {guest_addr:#x} needs {needed} bytes of a file that has {actual}"
    )]
    PastEndOfFile {
        /// The region.
        guest_addr: u64,
        /// Offset + size.
        needed: u64,
        /// The file's size.
        actual: u64,
    },
    /// The descriptor is no file with a size that can be checked.
    #[error(
        "memory region at guest address {guest_addr:#x}: its descriptor is not a regular file; share guest \
         memory from a memfd, tmpfs or hugetlbfs (QEMU: memory-backend-memfd or memory-backend-file, share=on)"
    )]
    NotAFile {
        /// The region.
        guest_addr: u64,
    },
    /// The file may have to be read from a disk or another host, and workers that touch it would wait for that.
    #[error(
        "memory region at guest address {guest_addr:#x}: its file is neither on tmpfs nor on hugetlbfs, so reading it can \
         stall every guest; share guest memory from a memfd, /dev/shm or hugetlbfs (QEMU: memory-backend-memfd, or \
         memory-backend-file with mem-path= there, share=on)"
    )]
    NotInMemory {
        /// The region.
        guest_addr: u64,
    },
    /// The file cannot be examined.
    #[error("cannot examine the file of the memory region at guest address {guest_addr:#x}")]
    Stat {
        /// The region.
        guest_addr: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The region cannot be mapped.
    #[error("cannot map {size} bytes for the memory region at guest address {guest_addr:#x}")]
    Map {
        /// The region.
        guest_addr: u64,
        /// Its size.
        size: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// All guests together have more regions than can be guarded against a file that shrinks.
    #[error(
        "no memory region at guest address {guest_addr:#x}: all ports together already have {}; use fewer memory \
         slots per guest or fewer guests per daemon",
        sigbus::MAX_GUARDS
    )]
    TooManyMappings {
        /// The region.
        guest_addr: u64,
    },
}

/// The part of a map that was used last: saves the search for the next address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    guest_addr: u64,
    size: u64,
    host: NonNull<u8>,
}

impl Window {
    /// A window that holds no address.
    pub(crate) const EMPTY: Window = Window {
        guest_addr: 0,
        size: 0,
        host: NonNull::dangling(),
    };

    /// The host's pointer for a range that is not empty and lies in this part as a whole.
    #[inline(always)]
    pub(crate) fn holds(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let offset = addr.wrapping_sub(self.guest_addr);
        let room = self.size.checked_sub(offset)?;
        if len == 0 || u64::from(len) > room {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset < size, and the window is a mapped region of the map that it is used with (or of size 0, where no
        // offset leaves room), so the result lies in the same mapping.
        Some(unsafe { self.host.add(offset) })
    }
}

/// An immutable map of one guest's memory. Rings hold an `Arc` of it: it cannot go away under them.
#[derive(Debug)]
pub struct GuestMemory {
    /// Sorted by guest address; neither guest nor user ranges overlap.
    regions: Box<[Arc<Region>]>,
}

impl GuestMemory {
    /// Maps and checks a whole table.
    pub fn new(regions: &[RegionSpec]) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        if regions.is_empty() {
            return Err(GuestMemoryError::NoRegions);
        }
        if regions.len() > MAX_REGIONS {
            return Err(GuestMemoryError::TooManyRegions { count: regions.len() });
        }
        let mapped = regions
            .iter()
            .map(|spec| Region::map(spec).map(Arc::new))
            .collect::<Result<_, _>>()?;
        GuestMemory::from_regions(mapped)
    }

    /// This map and one region more (ADD_MEM_REG). The other mappings are shared, not made again.
    pub fn with_region(&self, spec: &RegionSpec) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(GuestMemoryError::TooManyRegions {
                count: self.regions.len() + 1,
            });
        }
        let mut regions = self.regions.to_vec();
        regions.push(Arc::new(Region::map(spec)?));
        GuestMemory::from_regions(regions)
    }

    /// This map without one region (REM_MEM_REG, which matches all three and ignores the offset). May be empty. A region that
    /// is not there changes nothing.
    #[must_use]
    pub fn without_region(&self, guest_addr: u64, user_addr: u64, size: u64) -> Arc<GuestMemory> {
        let is_it = |r: &Region| r.guest_addr == guest_addr && r.user_addr == user_addr && r.size == size;
        Arc::new(GuestMemory {
            regions: self.regions.iter().filter(|r| !is_it(r)).cloned().collect(),
        })
    }

    /// The guest address of a region whose file turned out to be cut short when it was touched. All of that region is zeros
    /// since, and memory of ours: let go of the map soon. [`loss_event`] says when to look.
    #[must_use]
    pub fn lost(&self) -> Option<u64> {
        let lost = self.regions.iter().find(|region| region.is_lost());
        lost.map(|region| region.guest_addr)
    }

    fn from_regions(mut regions: Vec<Arc<Region>>) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        refuse_overlap(&mut regions, "user address", |r| r.user_addr)?;
        refuse_overlap(&mut regions, "guest address", |r| r.guest_addr)?;
        Ok(Arc::new(GuestMemory {
            regions: regions.into_boxed_slice(),
        }))
    }

    /// The host's pointer for a guest address, and how many of `len` bytes lie behind it in the same region: a buffer
    /// that crosses regions is had by asking again for the rest. `None` if the address is in no region or `len` is 0.
    #[inline]
    pub(crate) fn resolve(&self, window: &mut Window, addr: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let mut offset = addr.wrapping_sub(window.guest_addr);
        if offset >= window.size {
            *window = self.window(addr)?;
            offset = addr - window.guest_addr;
        }
        let here = u32::try_from(window.size - offset).map_or(len, |rest| rest.min(len));
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset < window.size, and the window is a mapped region of this map (or of size 0, which no offset
        // passes), so the result lies in the same mapping.
        (here > 0).then(|| (unsafe { window.host.add(offset) }, here))
    }

    /// The host's pointer for a range of the front-end's addresses that lies in one region.
    pub(crate) fn host_of_user(&self, user_addr: u64, len: usize) -> Option<NonNull<u8>> {
        let len = u64::try_from(len).ok()?;
        let region = self
            .regions
            .iter()
            .find(|r| user_addr.wrapping_sub(r.user_addr) < r.size)?;
        let offset = user_addr - region.user_addr;
        if len > region.size - offset {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset < region.size, so the result lies in the region's mapping.
        Some(unsafe { region.host().add(offset) })
    }

    #[cold]
    fn window(&self, addr: u64) -> Option<Window> {
        let after = self.regions.partition_point(|r| r.guest_addr <= addr);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (addr - region.guest_addr < region.size).then(|| Window {
            guest_addr: region.guest_addr,
            size: region.size,
            host: region.host(),
        })
    }
}

/// Sorts by one of the addresses and refuses neighbours that overlap in it.
fn refuse_overlap(
    regions: &mut [Arc<Region>],
    field: &'static str,
    start: impl Fn(&Region) -> u64,
) -> Result<(), GuestMemoryError> {
    regions.sort_by_key(|r| start(r));
    for pair in regions.windows(2) {
        if start(&pair[1]) - start(&pair[0]) < pair[0].size {
            let (first, second) = (pair[0].guest_addr, pair[1].guest_addr);
            return Err(GuestMemoryError::Overlap { first, second, field });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
