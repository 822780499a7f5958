//! The mapping of the memfd behind frame memory.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

const HUGE_PAGE: usize = 2 << 20;
const NAME: &CStr = c"vnic-frames";

/// A shared, writable mapping of a whole memfd, which nobody has a descriptor of any more.
pub(super) struct Region {
    base: NonNull<u8>,
    bytes: usize,
    huge: bool,
}

// SAFETY: the mapping is not tied to a thread, and every access goes through `bytes` and `bytes_mut`, whose callers
// answer for aliasing.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` bytes, on 2 MiB pages if that many are free.
    pub(super) fn new(bytes: usize) -> io::Result<Region> {
        if bytes == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // A mapping of huge pages is reserved when it is made, so it fails here or never.
        let rounded = bytes.next_multiple_of(HUGE_PAGE);
        Self::map(rounded, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, true)
            .or_else(|_| Self::map(bytes, 0, false))
    }

    fn map(bytes: usize, flags: libc::c_uint, huge: bool) -> io::Result<Region> {
        // SAFETY: the name is a C string; the call touches no other memory.
        let raw = unsafe { libc::memfd_create(NAME.as_ptr(), flags | libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let size = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: a system call on a descriptor we own, no memory involved.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // MAP_POPULATE: no page fault later, in the frame loop.
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let region = Region { base, bytes, huge };
        // MAP_POPULATE keeps quiet about pages that cannot be had (a control group's limit), and the first access would then be
        // SIGBUS; this tells. EINVAL: a kernel before 5.14.
        // SAFETY: the range is the mapping just made, and populating changes no byte of it.
        let outcome = unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) };
        match io::Error::last_os_error() {
            error if outcome < 0 && error.raw_os_error() != Some(libc::EINVAL) => Err(error),
            _ => Ok(region),
        }
    }

    pub(super) fn huge(&self) -> bool {
        self.huge
    }

    pub(super) fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// A slice of the region. Panics outside of it.
    ///
    /// # Safety
    ///
    /// Nobody (thread or kernel) writes to these bytes while the slice lives.
    pub(super) unsafe fn bytes(&self, start: usize, len: usize) -> &[u8] {
        self.check(start, len);
        // SAFETY: inside the mapping (checked), which lives as long as `self` and whose file cannot shrink; memfd pages begin as
        // zeros, so the bytes are initialised; no writer, says the caller.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(start), len) }
    }

    /// A writable slice of the region. Panics outside of it.
    ///
    /// # Safety
    ///
    /// Nobody else (thread or kernel) reads or writes these bytes while the slice lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller answers for there being no other slice of these bytes"
    )]
    pub(super) unsafe fn bytes_mut(&self, start: usize, len: usize) -> &mut [u8] {
        self.check(start, len);
        // SAFETY: as in `bytes`; the caller has these bytes alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(start), len) }
    }

    fn check(&self, start: usize, len: usize) {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.bytes),
            "outside frame memory"
        );
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, was made with this size, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
