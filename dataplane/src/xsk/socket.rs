//! Making and binding an AF_XDP socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::retired;
use super::ring::{Consumer, Layout, Producer};
use super::rx::XskRx;
use super::syscall::{self, Mapping};
use super::tx::XskTx;
use crate::memory::frames::{CHUNK_SIZE_U32, FrameMemory, QueueOwner};

/// Time between two attempts to bind a queue that is busy.
const BIND_PAUSE: Duration = Duration::from_millis(5);

/// The kernel's internal "not supported" (linux/errno.h), which some drivers let out.
const ENOTSUPP: i32 = 524;

/// What to ask of a driver that may or may not have zero-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroCopy {
    /// Zero-copy if the driver has it, else copy.
    #[default]
    Auto,
    /// Zero-copy, or an error.
    Require,
    /// Copy, whatever the driver has.
    Off,
}

/// One queue of one NIC, and how to open it.
#[derive(Debug, Clone)]
pub struct XskConfig {
    /// The interface's index.
    pub ifindex: u32,
    /// The interface's name, for errors.
    pub ifname: String,
    /// The queue.
    pub queue: u32,
    /// Zero-copy or not.
    pub zerocopy: ZeroCopy,
    /// Entries of the RX ring: a power of two.
    pub rx_ring: u32,
    /// Entries of the fill ring: a power of two; that many chunks are held for receiving.
    pub fill_ring: u32,
    /// Entries of the TX ring: a power of two.
    pub tx_ring: u32,
    /// Entries of the completion ring: a power of two, at least `tx_ring`.
    pub completion_ring: u32,
    /// How long to try while the queue is busy: after a socket closes, the kernel takes some milliseconds to let go of it.
    pub bind_timeout: Duration,
}

impl XskConfig {
    /// A queue with the default sizes: rings of 2048 entries, one second to bind.
    #[must_use]
    pub fn new(ifindex: u32, ifname: &str, queue: u32) -> XskConfig {
        XskConfig {
            ifindex,
            ifname: ifname.to_owned(),
            queue,
            zerocopy: ZeroCopy::Auto,
            rx_ring: 2048,
            fill_ring: 2048,
            tx_ring: 2048,
            completion_ring: 2048,
            bind_timeout: Duration::from_secs(1),
        }
    }
}

/// What the kernel gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XskInfo {
    /// The NIC reads and writes frame memory itself.
    pub zerocopy: bool,
    /// Frames of several chunks can be received and sent (kernel 6.6 and later, and a driver that can).
    pub multi_buffer: bool,
    /// Descriptors that one kick sends in copy mode, if the kernel lets that be set (6.17 and later).
    pub tx_budget: Option<u32>,
}

/// Why a NIC queue cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// The kernel was built without CONFIG_XDP_SOCKETS.
    #[error("this kernel has no AF_XDP sockets: use one built with CONFIG_XDP_SOCKETS=y, 5.4 or later")]
    NoAfXdp(#[source] io::Error),
    /// Privileges are missing.
    #[error(
        "not permitted to open an AF_XDP socket on {ifname} queue {queue}: run as root, or give CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF"
    )]
    NoPrivilege {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// EPERM or EACCES.
        source: io::Error,
    },
    /// Frame memory may not be pinned.
    #[error(
        "cannot pin {bytes} bytes of frame memory for {ifname} queue {queue}: raise the memlock limit (ulimit -l, LimitMEMLOCK=) or give CAP_IPC_LOCK"
    )]
    MemoryLimit {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// Size of frame memory.
        bytes: usize,
        /// ENOBUFS or ENOMEM.
        source: io::Error,
    },
    /// `zerocopy=require`, and the driver cannot.
    #[error(
        "{ifname} queue {queue}: the driver has no AF_XDP zero-copy, which zerocopy=require asks for; use zerocopy=auto"
    )]
    NoZeroCopy {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// EOPNOTSUPP, or what the driver says instead.
        source: io::Error,
    },
    /// Another socket has the queue.
    #[error(
        "{ifname} queue {queue} is in use by another AF_XDP socket (still busy after {waited_ms} ms): stop the program that has it"
    )]
    Busy {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// How long it was tried.
        waited_ms: u128,
        /// EBUSY.
        source: io::Error,
    },
    /// The interface or the queue is not there.
    #[error("there is no queue {queue} on {ifname}: see `ethtool -l {ifname}` for how many it has")]
    NoQueue {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// ENODEV or EINVAL.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot open {ifname} queue {queue}: {step} failed: {source}")]
    Other {
        /// Interface.
        ifname: String,
        /// Queue.
        queue: u32,
        /// What was done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// What both halves share: the socket, and the chunks on its rings. The last half to go retires it.
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    pub(super) memory: Arc<FrameMemory>,
    pub(super) owner: QueueOwner,
    ifindex: u32,
    queue: u32,
}

impl Socket {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// XDP_STATISTICS: xsk_getsockopt. Zeros if the kernel refuses.
    pub(super) fn statistics(&self) -> libc::xdp_statistics {
        syscall::get_option(&self.fd, libc::SOL_XDP, libc::XDP_STATISTICS).unwrap_or(libc::xdp_statistics {
            rx_dropped: 0,
            rx_invalid_descs: 0,
            tx_invalid_descs: 0,
            rx_ring_full: 0,
            rx_fill_ring_empty_descs: 0,
            tx_ring_empty_descs: 0,
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Both halves are gone and have unmapped their rings, so nobody moves this queue's chunks but us; the kernel lets go of
        // them some time after `fd` closes, right after this.
        retired::retire(&self.memory, self.owner, self.ifindex, self.queue);
    }
}

/// Opens one queue of one NIC over the whole of frame memory. `nic_index` is what [`crate::memory::frames::ChunkState`] will show.
///
/// Blocks for up to `config.bind_timeout` if the queue is busy: not for the frame loop. The kernel gives frames to the socket only once
/// it is in the NIC's program ([`crate::program::Program::set_socket`]); call `refill` before that.
///
/// # Errors
///
/// See [`XskError`].
pub fn open_queue(
    config: &XskConfig,
    memory: &Arc<FrameMemory>,
    nic_index: u8,
) -> Result<(XskRx, XskTx, XskInfo), XskError> {
    let fail = |step| move |source| config.error(step, memory, source);
    let fd = syscall::socket(libc::AF_XDP, 0).map_err(fail("socket"))?;
    let (address, bytes) = memory.extent_of_region();
    // SAFETY: `address` and `bytes` are frame memory's mapping. References into it exist only for chunks in state Held, and only chunks in
    // state Fill or Tx of this queue are put on its rings.
    unsafe { syscall::register_umem(&fd, address, bytes, CHUNK_SIZE_U32) }.map_err(fail("XDP_UMEM_REG"))?;

    let rings = [
        (libc::XDP_UMEM_FILL_RING, config.fill_ring),
        (libc::XDP_UMEM_COMPLETION_RING, config.completion_ring),
        (libc::XDP_RX_RING, config.rx_ring),
        (libc::XDP_TX_RING, config.tx_ring),
    ];
    for (option, entries) in rings {
        syscall::set_option(&fd, libc::SOL_XDP, option, &entries).map_err(fail("setting a ring's size"))?;
    }
    let offsets: libc::xdp_mmap_offsets =
        syscall::get_option(&fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS).map_err(fail("XDP_MMAP_OFFSETS"))?;

    let map = |offset: &libc::xdp_ring_offset, entries: u32, entry_size: usize, page_offset: libc::off_t| {
        map_ring(&fd, offset, entries as usize * entry_size, page_offset).map_err(fail("mapping a ring"))
    };
    let (fill_map, fill_at) = map(
        &offsets.fr,
        config.fill_ring,
        8,
        page_offset(libc::XDP_UMEM_PGOFF_FILL_RING),
    )?;
    let (completion_map, completion_at) = map(
        &offsets.cr,
        config.completion_ring,
        8,
        page_offset(libc::XDP_UMEM_PGOFF_COMPLETION_RING),
    )?;
    let (rx_map, rx_at) = map(&offsets.rx, config.rx_ring, 16, libc::XDP_PGOFF_RX_RING)?;
    let (tx_map, tx_at) = map(&offsets.tx, config.tx_ring, 16, libc::XDP_PGOFF_TX_RING)?;
    let ring = fail("mapping a ring");
    let fill = Producer::new(fill_map, fill_at, config.fill_ring).map_err(ring)?;
    let completion = Consumer::new(completion_map, completion_at, config.completion_ring)
        .map_err(fail("mapping a ring"))?;
    let rx = Consumer::new(rx_map, rx_at, config.rx_ring).map_err(fail("mapping a ring"))?;
    let tx = Producer::new(tx_map, tx_at, config.tx_ring).map_err(fail("mapping a ring"))?;

    let multi_buffer = bind(config, &fd)?;
    retired::rebound(memory, config.ifindex, config.queue);
    let options: libc::xdp_options =
        syscall::get_option(&fd, libc::SOL_XDP, libc::XDP_OPTIONS).map_err(fail("XDP_OPTIONS"))?;
    let zerocopy = options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
    let tx_budget = syscall::set_option(
        &fd,
        libc::SOL_XDP,
        syscall::XDP_MAX_TX_SKB_BUDGET,
        &config.tx_ring,
    )
    .is_ok()
    .then_some(config.tx_ring);
    raise_send_buffer(&fd, config.tx_ring);

    let info = XskInfo {
        zerocopy,
        multi_buffer,
        tx_budget,
    };
    let socket = Arc::new(Socket {
        fd,
        memory: memory.clone(),
        owner: QueueOwner::new(nic_index),
        ifindex: config.ifindex,
        queue: config.queue,
    });
    Ok((
        XskRx::new(fill, rx, socket.clone()),
        XskTx::new(tx, completion, socket, info),
        info,
    ))
}

fn page_offset(offset: libc::c_ulonglong) -> libc::off_t {
    libc::off_t::try_from(offset).expect("a constant below 2^33")
}

fn map_ring(
    fd: &OwnedFd,
    offset: &libc::xdp_ring_offset,
    entry_bytes: usize,
    page_offset: libc::off_t,
) -> io::Result<(Arc<Mapping>, Layout)> {
    let narrow = |value: u64| usize::try_from(value).map_err(io::Error::other);
    let layout = Layout {
        producer: narrow(offset.producer)?,
        consumer: narrow(offset.consumer)?,
        flags: narrow(offset.flags)?,
        entries: narrow(offset.desc)?,
    };
    Ok((
        Arc::new(Mapping::of_socket(fd, layout.entries + entry_bytes, page_offset)?),
        layout,
    ))
}

/// In copy mode each frame in flight is charged to the socket's send buffer, whose default holds about a hundred.
fn raise_send_buffer(fd: &OwnedFd, tx_ring: u32) {
    let bytes = libc::c_int::try_from(tx_ring.saturating_mul(CHUNK_SIZE_U32)).unwrap_or(libc::c_int::MAX);
    // The first needs CAP_NET_ADMIN, the second is cut to net.core.wmem_max; with neither, kicks are repeated more often.
    if syscall::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes).is_err() {
        let _ = syscall::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes);
    }
}

/// Binds in the best mode that the configuration, the kernel and the driver allow; says whether frames may have several buffers.
fn bind(config: &XskConfig, fd: &OwnedFd) -> Result<bool, XskError> {
    let modes: &[libc::__u16] = match config.zerocopy {
        ZeroCopy::Auto => &[libc::XDP_ZEROCOPY, libc::XDP_COPY],
        ZeroCopy::Require => &[libc::XDP_ZEROCOPY],
        ZeroCopy::Off => &[libc::XDP_COPY],
    };
    let began = Instant::now();
    loop {
        let mut last = io::Error::from_raw_os_error(libc::EINVAL);
        for mode in modes {
            for multi_buffer in [libc::XDP_USE_SG, 0] {
                let address = libc::sockaddr_xdp {
                    sxdp_family: family(),
                    sxdp_flags: mode | multi_buffer | libc::XDP_USE_NEED_WAKEUP,
                    sxdp_ifindex: config.ifindex,
                    sxdp_queue_id: config.queue,
                    sxdp_shared_umem_fd: 0,
                };
                match syscall::bind(fd, &address) {
                    Ok(()) => return Ok(multi_buffer != 0),
                    Err(error) => last = error,
                }
                if !is_unsupported(&last) {
                    break;
                }
            }
            // Drivers refuse zero-copy with whatever code they like; only a busy queue says nothing about the mode.
            if last.raw_os_error() == Some(libc::EBUSY) {
                break;
            }
        }
        let waited = began.elapsed();
        if last.raw_os_error() != Some(libc::EBUSY) {
            return Err(config.error("bind", &(), last));
        }
        if waited >= config.bind_timeout {
            let (ifname, queue) = (config.ifname.clone(), config.queue);
            return Err(XskError::Busy {
                ifname,
                queue,
                waited_ms: waited.as_millis(),
                source: last,
            });
        }
        std::thread::sleep(BIND_PAUSE);
    }
}

/// The kernel says EINVAL to flags it does not know and to a queue that is not there, EOPNOTSUPP to a mode that the driver has not.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL))
}

pub(super) fn family() -> libc::__u16 {
    libc::__u16::try_from(libc::AF_XDP).expect("44")
}

/// Frame memory's size for an error text, where it matters.
trait Pinned {
    fn bytes(&self) -> usize;
}

impl Pinned for Arc<FrameMemory> {
    fn bytes(&self) -> usize {
        self.extent_of_region().1
    }
}

impl Pinned for () {
    fn bytes(&self) -> usize {
        0
    }
}

impl XskConfig {
    fn error(&self, step: &'static str, memory: &impl Pinned, source: io::Error) -> XskError {
        let (ifname, queue) = (self.ifname.clone(), self.queue);
        match (step, source.raw_os_error()) {
            // The socket was made and memory pinned, so privileges are not what is missing.
            ("bind", Some(libc::EOPNOTSUPP | ENOTSUPP | libc::EPERM | libc::ENOENT))
                if self.zerocopy == ZeroCopy::Require =>
            {
                XskError::NoZeroCopy {
                    ifname,
                    queue,
                    source,
                }
            }
            ("socket", Some(libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::EINVAL)) => {
                XskError::NoAfXdp(source)
            }
            (_, Some(libc::EPERM | libc::EACCES)) => XskError::NoPrivilege {
                ifname,
                queue,
                source,
            },
            ("XDP_UMEM_REG", Some(libc::ENOBUFS | libc::ENOMEM)) => XskError::MemoryLimit {
                ifname,
                queue,
                bytes: memory.bytes(),
                source,
            },
            ("bind", Some(libc::ENODEV | libc::EINVAL)) => XskError::NoQueue {
                ifname,
                queue,
                source,
            },
            _ => XskError::Other {
                ifname,
                queue,
                step,
                source,
            },
        }
    }
}
