//! One mapped region.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::{GuestMemoryError, RegionSpec, sigbus};

/// A part of the guest's memory, mapped for reading and writing; unmapped when the last map that has it goes.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) guest_addr: u64,
    pub(super) user_addr: u64,
    pub(super) size: u64,
    /// Before the mapping, so that it is dropped before: nothing may be guarded that could be someone else's.
    guard: sigbus::Guard,
    mapping: Mapping,
    /// Where the region begins in the mapping, which has to begin on a page of the file.
    lead: usize,
}

impl Region {
    /// Checks a description and maps it.
    pub(super) fn map(spec: &RegionSpec) -> Result<Region, GuestMemoryError> {
        let &RegionSpec {
            guest_addr,
            user_addr,
            size,
            mmap_offset,
            ..
        } = spec;
        if size == 0 {
            return Err(GuestMemoryError::Empty { guest_addr });
        }
        let end = |field, start: u64| {
            start.checked_add(size).ok_or(GuestMemoryError::Overflow {
                guest_addr,
                field,
                start,
                size,
            })
        };
        end("guest address", guest_addr)?;
        end("user address", user_addr)?;
        let needed = end("file offset", mmap_offset)?;

        let stat = |source| GuestMemoryError::Stat { guest_addr, source };
        let file = FileFacts::of(&spec.fd).map_err(stat)?;
        let actual = file.size.ok_or(GuestMemoryError::NotAFile { guest_addr })?;
        if !file.in_memory {
            return Err(GuestMemoryError::NotInMemory { guest_addr });
        }
        if needed > actual {
            return Err(GuestMemoryError::PastEndOfFile {
                guest_addr,
                needed,
                actual,
            });
        }

        // A front-end's offset need not be a multiple of a huge page (QEMU splits its memory at 640 KiB), but mmap and
        // munmap of hugetlbfs take nothing else.
        let map = |source| GuestMemoryError::Map {
            guest_addr,
            size,
            source,
        };
        let too_large = || map(io::Error::from_raw_os_error(libc::EOVERFLOW));
        let page = file.page_size;
        let begin = mmap_offset - mmap_offset % page;
        let len = needed
            .checked_next_multiple_of(page)
            .and_then(|end| usize::try_from(end - begin).ok())
            .filter(|&len| isize::try_from(len).is_ok())
            .ok_or_else(too_large)?;
        let offset = libc::off_t::try_from(begin).map_err(|_| too_large())?;
        let lead = usize::try_from(mmap_offset - begin).map_err(|_| too_large())?;
        let mapping = Mapping::new(&spec.fd, offset, len).map_err(map)?;
        let guard = sigbus::Guard::new(mapping.addr.as_ptr().expose_provenance(), len)
            .ok_or(GuestMemoryError::TooManyMappings { guest_addr })?;
        Ok(Region {
            guest_addr,
            user_addr,
            size,
            guard,
            mapping,
            lead,
        })
    }

    /// Whether its file was found cut short. What was written to it since is seen by nobody else.
    pub(super) fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }

    /// The region's first byte; `size` bytes from there on are mapped as long as `self` lives.
    pub(super) fn host(&self) -> NonNull<u8> {
        // SAFETY: the mapping is at least lead + size bytes long.
        unsafe { self.mapping.addr.add(self.lead) }
    }
}

/// What has to be known of a file before it is mapped.
struct FileFacts {
    /// Bytes; `None` if it is not a regular file, so that nothing is known of what touching it would do.
    size: Option<u64>,
    /// It is on tmpfs or hugetlbfs, as each memfd is. Elsewhere a page may have to come from a disk or another host, and
    /// whoever touches it waits as long as that takes.
    in_memory: bool,
    /// What offsets and lengths of its mappings must be multiples of.
    page_size: u64,
}

impl FileFacts {
    fn of(fd: &impl AsRawFd) -> io::Result<FileFacts> {
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the kernel fills a stat buffer of the right type, or fails.
        if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fstat succeeded, so it filled the buffer.
        let stat = unsafe { stat.assume_init() };
        let regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;

        let mut fs = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the kernel fills a statfs buffer of the right type, or fails.
        if unsafe { libc::fstatfs(fd.as_raw_fd(), fs.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fstatfs succeeded, so it filled the buffer.
        let fs = unsafe { fs.assume_init() };
        // Only hugetlbfs has a mapping granularity of its own, and gives it as its block size.
        let page = if fs.f_type == libc::HUGETLBFS_MAGIC {
            fs.f_bsize
        } else {
            system_page_size()
        };
        Ok(FileFacts {
            size: u64::try_from(stat.st_size).ok().filter(|_| regular),
            in_memory: [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC].contains(&fs.f_type),
            page_size: u64::try_from(page).unwrap_or(4096).max(1),
        })
    }
}

fn system_page_size() -> libc::c_long {
    // SAFETY: sysconf has no memory effects.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }
}

/// A shared mapping of part of a file.
#[derive(Debug)]
struct Mapping {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to no thread; it is only an address range, unmapped once, by its owner.
unsafe impl Send for Mapping {}
// SAFETY: nothing in it changes, and it gives out no reference to the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: &impl AsRawFd, offset: libc::off_t, len: usize) -> io::Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses a free range, so no memory in use is replaced.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd.as_raw_fd(), offset) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A guest's memory has no business in a core dump of ours. Nothing depends on the answer.
        // SAFETY: it only sets a flag on the mapping that was just made.
        unsafe { libc::madvise(addr, len, libc::MADV_DONTDUMP) };
        let addr = NonNull::new(addr.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Mapping { addr, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and whoever had a pointer into it held the Region that owns this.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}
