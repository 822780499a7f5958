//! Signalling an eventfd that somebody else holds, too, without ever waiting.
//!
//! write(2) waits while an eventfd's counter is full, unless its open file has O_NONBLOCK. A front-end shares the open file: it can
//! fill the counter, and clear the flag at any moment, also between a look at it and the write. Nor can an eventfd be opened anew, and it
//! takes no RWF_NOWAIT. But the kernel's own signal to an eventfd never waits, and asynchronous I/O gives it: io_submit(2) with
//! IOCB_FLAG_RESFD signals a descriptor when a request is done, and a read of nothing is done at once.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Requests that may be done and not collected yet. The kernel has room for some more.
const EVENTS: usize = 64;

/// `struct iocb` of linux/aio_abi.h, little-endian layout.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    rw_flags: u32,
    #[cfg(target_endian = "big")]
    key: u32,
    opcode: u16,
    reqprio: i16,
    fildes: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<IoEvent>() == 32);

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;

/// A context for asynchronous I/O.
struct Aio {
    context: libc::c_ulong,
    null: File,
}

thread_local! {
    /// Each thread has its own, so that none waits for another.
    static AIO: RefCell<Option<io::Result<Aio>>> = const { RefCell::new(None) };
}

/// Takes what this thread needs for [`signal`] now, and not in the frame loop or when descriptors have run out.
pub fn prepare_to_signal() {
    AIO.with_borrow_mut(|aio| {
        aio.get_or_insert_with(Aio::new);
    });
}

/// Adds 1 to the counter of an eventfd, or leaves it as it is when it is full. Never waits, whatever the flags of the open file.
///
/// Where asynchronous I/O is forbidden (a seccomp profile, fs.aio-max-nr) it is a write(2), which can wait for a front-end that clears
/// O_NONBLOCK and fills the counter; that is logged once.
///
/// # Errors
///
/// Those of io_submit(2) and write(2) but EAGAIN.
pub fn signal(fd: &EventFd) -> io::Result<()> {
    AIO.with_borrow_mut(|aio| match aio.get_or_insert_with(Aio::new) {
        Ok(aio) => aio.signal(fd.as_raw_fd()),
        Err(error) => {
            static TOLD: AtomicBool = AtomicBool::new(false);
            if !TOLD.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "no asynchronous I/O ({error}): a hostile front-end can make a worker wait when it notifies a guest; raise \
                     fs.aio-max-nr, or allow io_setup(2) and io_submit(2)"
                );
            }
            match fd.write(1) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
                other => other,
            }
        }
    })
}

impl Aio {
    fn new() -> io::Result<Aio> {
        let null = File::open("/dev/null")?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes the context to our variable.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) };
        match result {
            0 => Ok(Aio { context, null }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn signal(&mut self, fd: RawFd) -> io::Result<()> {
        let word = |fd: RawFd| u32::try_from(fd).map_err(io::Error::other);
        let mut request = Iocb {
            opcode: IOCB_CMD_PREAD,
            fildes: word(self.null.as_raw_fd())?,
            flags: IOCB_FLAG_RESFD,
            resfd: word(fd)?,
            ..Iocb::default()
        };
        match self.submit(&mut request) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                self.collect();
                self.submit(&mut request)
            }
            other => other,
        }
    }

    fn submit(&mut self, request: &mut Iocb) -> io::Result<()> {
        let mut list = [ptr::from_mut(request)];
        // SAFETY: one request, of no bytes, which is done when the call returns: the kernel keeps no pointer to anything of ours.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) };
        match result {
            1 => Ok(()),
            0 => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes room: takes the outcomes of requests, which do not matter, without waiting for any.
    fn collect(&mut self) {
        let mut events = [IoEvent::default(); EVENTS];
        let no_time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Until none is left: the kernel gives more room than was asked for.
        loop {
            // SAFETY: the kernel writes at most EVENTS elements to the array, and reads the time.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0,
                    EVENTS,
                    events.as_mut_ptr(),
                    &raw const no_time,
                )
            };
            if usize::try_from(result).unwrap_or(0) < EVENTS {
                break;
            }
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and no request is under way in it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_signal_counts() {
        let fd = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        // Many times what the context holds.
        for _ in 0..10_000 {
            signal(&fd).unwrap();
        }
        assert_eq!(fd.read().unwrap(), 10_000);
    }

    #[test]
    fn a_full_counter_of_a_blocking_eventfd_holds_nobody_up() {
        let fd = Arc::new(EventFd::new(0).unwrap());
        fd.write(u64::MAX - 1).unwrap();
        let (done, outcome) = channel();
        let theirs = Arc::clone(&fd);
        // Not joined: if it waits, the test must say so.
        std::thread::spawn(move || {
            for _ in 0..3 {
                done.send(signal(&theirs).is_ok()).unwrap();
            }
        });
        for _ in 0..3 {
            assert_eq!(outcome.recv_timeout(Duration::from_secs(60)), Ok(true));
        }
    }

    #[test]
    fn what_is_no_eventfd_is_an_error() {
        use std::os::fd::FromRawFd as _;
        use std::os::fd::IntoRawFd as _;
        let file = File::open("/dev/null").unwrap();
        // SAFETY: the descriptor is given up by its owner.
        let no_eventfd = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
        assert!(signal(&no_eventfd).is_err());
    }
}
