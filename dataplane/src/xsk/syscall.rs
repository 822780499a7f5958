//! The few system calls of AF_XDP and AF_PACKET sockets, each behind a safe function.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use libc::{c_int, socklen_t};

/// SOL_XDP option 9 (linux/if_xdp.h, kernel 6.17+); `libc` does not have it yet.
pub(super) const XDP_MAX_TX_SKB_BUDGET: c_int = 9;

/// A type that an option or an address may have: plain bytes, any pattern valid, no padding, and no address that the
/// kernel would follow.
///
/// # Safety
///
/// The type is `repr(C)` or primitive, has no padding, is valid for every bit pattern (zeros too), and holds no pointer.
pub(super) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: integers, or a C struct of integers that fill it without padding.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(
    u32,
    c_int,
    libc::xdp_mmap_offsets,
    libc::xdp_statistics,
    libc::xdp_options,
    libc::sockaddr_xdp,
    libc::sockaddr_ll,
    libc::tpacket_req,
    libc::tpacket_stats,
    libc::packet_mreq,
);

fn size<T>() -> socklen_t {
    socklen_t::try_from(size_of::<T>()).expect("a small C struct")
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// socket(2), close-on-exec. AF_XDP: net/xdp/xsk.c, xsk_create; AF_PACKET: net/packet/af_packet.c, packet_create.
pub(super) fn socket(domain: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw = check(unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// setsockopt(2): xsk_setsockopt, packet_setsockopt.
pub(super) fn set_option<T: Plain>(fd: &impl AsFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `size_of::<T>()` initialised bytes (`Plain`: no padding) and follows no pointer in them.
    check(unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), size::<T>()) })
        .map(|_| ())
}

/// getsockopt(2): xsk_getsockopt, packet_getsockopt. What an older kernel does not fill stays zero.
pub(super) fn get_option<T: Plain>(fd: &impl AsFd, level: c_int, name: c_int) -> io::Result<T> {
    // SAFETY: zeros are a valid `T` (`Plain`).
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut len = size::<T>();
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`, and any bytes are a valid `T`.
    check(unsafe { libc::getsockopt(fd, level, name, std::ptr::from_mut(&mut value).cast(), &mut len) })?;
    Ok(value)
}

/// Registers memory as the socket's UMEM: xsk_setsockopt XDP_UMEM_REG, net/xdp/xdp_umem.c.
///
/// # Safety
///
/// `address` and `bytes` are a mapping, and whoever reads or writes it through references keeps away from chunks that are on the
/// socket's rings: the kernel writes to those on its fill ring.
pub(super) unsafe fn register_umem(
    fd: &OwnedFd,
    address: usize,
    bytes: usize,
    chunk_size: u32,
) -> io::Result<()> {
    let registration = libc::xdp_umem_reg_v1 {
        addr: address as u64,
        len: bytes as u64,
        chunk_size,
        headroom: 0,
    };
    // SAFETY: the kernel reads the struct, a C struct of integers without padding; that it may use the memory behind
    // `addr` is the caller's promise. The first version of the struct is what every kernel takes.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_UMEM_REG,
            std::ptr::from_ref(&registration).cast(),
            size::<libc::xdp_umem_reg_v1>(),
        )
    })
    .map(|_| ())
}

/// Attaches a classic BPF filter: net/core/filter.c, sk_attach_filter.
pub(super) fn attach_filter(fd: &OwnedFd, filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads the struct and `len` instructions behind its pointer, both alive over the call, and
    // writes to neither.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&program).cast(),
            size::<libc::sock_fprog>(),
        )
    })
    .map(|_| ())
}

/// bind(2): xsk_bind, packet_bind.
pub(super) fn bind<T: Plain>(fd: &OwnedFd, address: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` initialised bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(address).cast(), size::<T>()) }).map(|_| ())
}

/// An empty sendto(2): net/xdp/xsk.c, xsk_sendmsg, starts transmission of what the TX ring holds.
pub(super) fn kick(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a null buffer of length 0 and no address.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            std::ptr::null(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null(),
            0,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// An empty recvfrom(2): net/xdp/xsk.c, xsk_recvmsg, tells the driver of new fill ring entries.
pub(super) fn wake_receiver(fd: BorrowedFd<'_>) {
    // SAFETY: a null buffer of length 0 and no address. An error would mean that the interface is down, which is reported
    // by other means.
    unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
}

/// A memory mapping, unmapped when dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is not tied to a thread; users of `at` answer for their accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// mmap(2) of a socket's ring: xsk_mmap, packet_mmap.
    pub(super) fn of_socket(fd: &OwnedFd, bytes: usize, offset: libc::off_t) -> io::Result<Mapping> {
        Self::new(
            bytes,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            fd.as_raw_fd(),
            offset,
        )
    }

    /// Zeroed memory of our own.
    pub(super) fn anonymous(bytes: usize) -> io::Result<Mapping> {
        Self::new(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    fn new(bytes: usize, flags: c_int, fd: c_int, offset: libc::off_t) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing of ours.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapping { base, bytes })
    }

    pub(super) fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// A pointer to `count` values of `T` at `offset`, if they are inside the mapping and aligned.
    pub(super) fn at<T>(&self, offset: usize, count: usize) -> io::Result<NonNull<T>> {
        let end = count
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > self.bytes)
            || !(self.address() + offset).is_multiple_of(align_of::<T>())
        {
            return Err(io::Error::other(
                "the kernel describes a ring that is not inside its mapping",
            ));
        }
        // SAFETY: `offset` is inside the mapping.
        Ok(unsafe { self.base.add(offset) }.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, was made with this size, and whoever holds a pointer from `at` holds the mapping.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Has the calling thread run before every ordinary one (SCHED_FIFO, lowest priority), and none of its children: sched(7).
pub(crate) fn run_first() -> io::Result<()> {
    // SAFETY: every bit pattern of the structure is valid, zeros too.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = 1;
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel reads one structure, which lives across the call; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
