//! ADR 0007: one memfd registered as the UMEM of every queue of two NICs; a chunk sent on each of them in turn; what
//! an XSK says to a chunk outside its UMEM; what each registration costs. Needs root; works in a network namespace
//! of its own.

use std::ffi::CString;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vnic_evidence::{Claims, ip, private_netns};

const REGION: usize = 64 << 20;
const CHUNK: u32 = 4096;
const RING: u32 = 64;
const QUEUES: u32 = 4;
const NICS: [&str; 2] = ["ev0", "ev1"];

/// The result of a system call as a Rust result.
fn checked(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Maps `bytes` of a descriptor, shared.
fn map(fd: libc::c_int, bytes: usize, offset: i64) -> Result<*mut u8> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            prot,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            fd,
            offset,
        )
    };
    if at == libc::MAP_FAILED {
        Err(Error::last_os_error())
    } else {
        Ok(at.cast())
    }
}

/// A mapped memfd.
fn region() -> Result<*mut u8> {
    // SAFETY: the name is a C string; the descriptor is ours.
    let fd = unsafe {
        OwnedFd::from_raw_fd(checked(libc::memfd_create(
            c"frames".as_ptr(),
            libc::MFD_CLOEXEC,
        ))?)
    };
    // SAFETY: takes no pointers.
    checked(unsafe { libc::ftruncate(fd.as_raw_fd(), REGION as i64) })?;
    map(fd.as_raw_fd(), REGION, 0)
}

/// An AF_XDP socket with a TX and a completion ring.
struct Xsk {
    fd: OwnedFd,
    tx: *mut u8,
    completion: *mut u8,
    offsets: libc::xdp_mmap_offsets,
}

impl Xsk {
    /// A socket whose UMEM is `memory`, not yet bound.
    fn with_umem(memory: *mut u8) -> Result<Xsk> {
        let fd = unbound()?;
        register(&fd, memory, REGION)?;
        for ring in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_TX_RING,
        ] {
            set(&fd, ring, &RING)?;
        }
        let offsets = get(&fd, libc::XDP_MMAP_OFFSETS)?;
        let raw = fd.as_raw_fd();
        let tx = map(raw, 4096, libc::XDP_PGOFF_TX_RING)?;
        let completion = map(raw, 4096, libc::XDP_UMEM_PGOFF_COMPLETION_RING as i64)?;
        Ok(Xsk {
            fd,
            tx,
            completion,
            offsets,
        })
    }

    fn bind(&self, nic: &str, queue: u32, flags: u16, shared_with: u32) -> Result<()> {
        let name = CString::new(nic).expect("no NUL in a name");
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: flags,
            // SAFETY: `name` is a C string.
            sxdp_ifindex: unsafe { libc::if_nametoindex(name.as_ptr()) },
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: shared_with,
        };
        let (at, len) = ((&raw const address).cast(), size_of_val(&address) as u32);
        // SAFETY: `at` points to `len` bytes of a sockaddr_xdp.
        checked(unsafe { libc::bind(self.fd.as_raw_fd(), at, len) }).map(drop)
    }

    fn word(ring: *mut u8, offset: u64) -> &'static AtomicU32 {
        // SAFETY: the kernel gave the offset; rings are aligned, as long as 4096 bytes, and never unmapped.
        unsafe { &*ring.add(offset as usize).cast() }
    }

    /// Sends 60 bytes at `addr`; whether a completion for exactly that address came within a second.
    fn send(&self, addr: u64) -> Result<bool> {
        let producer = Xsk::word(self.tx, self.offsets.tx.producer);
        let slot = producer.load(Ordering::Relaxed) % RING;
        let descriptor = libc::xdp_desc {
            addr,
            len: 60,
            options: 0,
        };
        // SAFETY: `slot` is below the ring's size, and 64 descriptors fit into the 4096 bytes.
        unsafe {
            self.tx
                .add(self.offsets.tx.desc as usize)
                .cast::<libc::xdp_desc>()
                .add(slot as usize)
                .write(descriptor);
        }
        producer.fetch_add(1, Ordering::Release);
        // SAFETY: an empty message and no address.
        checked(unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            ) as libc::c_int
        })?;
        let (done, taken) = (
            Xsk::word(self.completion, self.offsets.cr.producer),
            Xsk::word(self.completion, self.offsets.cr.consumer),
        );
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            let next = taken.load(Ordering::Relaxed);
            if done.load(Ordering::Acquire) != next {
                let slot = (next % RING) as usize;
                // SAFETY: as above, for the completion ring's 8-byte entries.
                let sent = unsafe {
                    self.completion
                        .add(self.offsets.cr.desc as usize)
                        .cast::<u64>()
                        .add(slot)
                        .read()
                };
                taken.store(next.wrapping_add(1), Ordering::Release);
                return Ok(sent == addr);
            }
            std::thread::yield_now();
        }
        Ok(false)
    }

    /// TX descriptors that the kernel called invalid.
    fn invalid(&self) -> Result<u64> {
        get::<libc::xdp_statistics>(&self.fd, libc::XDP_STATISTICS).map(|s| s.tx_invalid_descs)
    }
}

/// A new AF_XDP socket.
fn unbound() -> Result<OwnedFd> {
    // SAFETY: takes no pointers; the descriptor is ours.
    unsafe {
        Ok(OwnedFd::from_raw_fd(checked(libc::socket(
            libc::AF_XDP,
            libc::SOCK_RAW,
            0,
        ))?))
    }
}

/// Makes `len` bytes of `memory` the UMEM of a socket.
fn register(fd: &OwnedFd, memory: *mut u8, len: usize) -> Result<()> {
    let umem = libc::xdp_umem_reg {
        addr: memory as u64,
        len: len as u64,
        chunk_size: CHUNK,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set(fd, libc::XDP_UMEM_REG, &umem)
}

fn set<T>(fd: &OwnedFd, option: libc::c_int, value: &T) -> Result<()> {
    let (at, len) = ((&raw const *value).cast(), size_of_val(value) as u32);
    // SAFETY: `at` points to `len` bytes.
    checked(unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_XDP, option, at, len) }).map(drop)
}

fn get<T>(fd: &OwnedFd, option: libc::c_int) -> Result<T> {
    let (mut value, mut len) = (std::mem::MaybeUninit::<T>::zeroed(), size_of::<T>() as u32);
    // SAFETY: the kernel writes at most `len` bytes; the types used here are plain numbers, so zeroes are valid.
    unsafe {
        checked(libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            value.as_mut_ptr().cast(),
            &mut len,
        ))?;
        Ok(value.assume_init())
    }
}

/// Pages pinned so far by the whole machine.
fn pinned() -> i64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let value = |name: &str| -> i64 {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.trim().parse().ok())
            .unwrap_or(0)
    };
    value("nr_foll_pin_acquired ") - value("nr_foll_pin_released ")
}

/// How often a user without CAP_IPC_LOCK can register 2 MiB of the region when the limit of locked memory is 5 MiB
/// (small, since raising a hard limit needs a right of its own). Runs in a child, which takes another user's id and so
/// gives up its rights.
fn registrations_under_a_limit(memory: *mut u8) -> Result<i32> {
    let unusual_uid = 64_999;
    let sockets = (0..8).map(|_| unbound()).collect::<Result<Vec<OwnedFd>>>()?;
    // SAFETY: the child calls async-signal-safe functions only, allocates nothing, and ends with _exit.
    let child = checked(unsafe { libc::fork() })?;
    if child == 0 {
        let limit = libc::rlimit {
            rlim_cur: 5 << 20,
            rlim_max: 5 << 20,
        };
        // SAFETY: `limit` is a valid rlimit.
        let ready =
            unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) == 0 && libc::setuid(unusual_uid) == 0 };
        let accepted = sockets
            .iter()
            .take_while(|fd| ready && register(fd, memory, 2 << 20).is_ok())
            .count();
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(accepted as i32) };
    }
    let mut status = 0;
    // SAFETY: waits for the child above.
    checked(unsafe { libc::waitpid(child, &mut status, 0) })?;
    Ok(libc::WEXITSTATUS(status))
}

/// Frames that the far ends of the NICs have received.
fn received() -> u32 {
    let text = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let far = text.lines().filter_map(|line| line.trim().strip_prefix("evp"));
    far.filter_map(|line| line.split_whitespace().nth(2)?.parse::<u32>().ok())
        .sum()
}

fn run(claims: &mut Claims) -> Result<()> {
    private_netns()?;
    for (nic, peer) in [("ev0", "evp0"), ("ev1", "evp1")] {
        let queues = format!("numrxqueues {QUEUES} numtxqueues {QUEUES}");
        ip(&format!(
            "link add {nic} {queues} type veth peer name {peer} {queues}"
        ))?;
        for end in [nic, peer] {
            // No IPv6 address: nothing but this program sends here.
            ip(&format!("link set {end} addrgenmode none"))?;
            ip(&format!("link set {end} up"))?;
        }
    }
    let memory = region()?;
    let before = pinned();
    let mut sockets = Vec::new();
    let mut slowest = Duration::ZERO;
    for nic in NICS {
        for queue in 0..QUEUES {
            let start = Instant::now();
            let socket = Xsk::with_umem(memory)?;
            slowest = slowest.max(start.elapsed());
            socket.bind(nic, queue, libc::XDP_COPY, 0)?;
            sockets.push(socket);
        }
    }
    let count = sockets.len() as i64;
    println!(
        "{count} queues of {} NICs: the same 64 MiB registered with each, at most {slowest:.1?} a queue",
        NICS.len()
    );
    let pages = pinned() - before;
    let expected = count * (REGION / 4096) as i64;
    claims.check(
        "every registration pins the whole region again (counts, not memory: the pages are the same)",
        // The kernel's counter is summed over CPUs with some delay.
        (pages - expected).abs() < expected / 100,
        format!("{pages} pins; {count} times the region is {expected}"),
    );
    let limited = registrations_under_a_limit(memory)?;
    claims.check(
        "without CAP_IPC_LOCK every registration counts against RLIMIT_MEMLOCK",
        limited == 2,
        format!("{limited} registrations of 2 MiB under a limit of 5 MiB"),
    );

    // SAFETY: the first chunk; no socket has it now.
    unsafe { memory.write_bytes(0xff, 60) };
    let sent = sockets.iter().map(|s| s.send(0)).collect::<Result<Vec<bool>>>()?;
    let arrived = received();
    claims.check(
        "one and the same chunk can be sent on every queue in turn",
        sent.iter().all(|&b| b) && i64::from(arrived) == count,
        format!("{arrived} frames arrived, completions {sent:?}"),
    );

    let completed = sockets[0].send(REGION as u64)?;
    let invalid = sockets[0].invalid()?;
    claims.check(
        "an XSK cannot send what lies outside its own UMEM: an address past its end is an invalid descriptor",
        invalid == 1 && received() == arrived,
        format!(
            "tx_invalid_descs {invalid}, frames arrived {}, completed {completed}",
            received() - arrived
        ),
    );

    let second = Xsk::with_umem(region()?)?.bind("ev0", 0, libc::XDP_COPY, 0);
    claims.check(
        "a NIC queue takes no second socket with another UMEM",
        second.is_err(),
        format!("{second:?}"),
    );

    let first = sockets[0].fd.as_raw_fd().cast_unsigned();
    let fd = unbound()?;
    set(&fd, libc::XDP_TX_RING, &RING)?;
    let null = std::ptr::null_mut();
    let shared = Xsk {
        fd,
        tx: null,
        completion: null,
        offsets: sockets[0].offsets,
    };
    let with_mode = shared.bind("ev1", 0, libc::XDP_SHARED_UMEM | libc::XDP_COPY, first);
    claims.check(
        "XDP_SHARED_UMEM cannot be bound with a mode of its own",
        with_mode
            .as_ref()
            .is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)),
        format!("{with_mode:?}"),
    );
    Ok(())
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    if let Err(error) = run(&mut claims) {
        claims.check(
            "the experiment could be set up (run as root, with AF_XDP in the kernel)",
            false,
            error,
        );
    }
    claims.exit()
}
