//! A front-end can shrink its file after we mapped it; touching what is gone raises SIGBUS. The handler here puts an
//! empty page in its place, so that only that front-end's guest suffers. A SIGBUS anywhere else goes where it went before.

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Mappings that can be guarded at once, in the whole process: a handler cannot allocate or lock.
pub(super) const MAX_GUARDS: usize = 4096;

static GUARDED: [Slot; MAX_GUARDS] = [const { Slot::new() }; MAX_GUARDS];
static LOST_PAGES: AtomicU64 = AtomicU64::new(0);
/// What SIGBUS did before.
static PREVIOUS: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// Pages of guest memory that were gone from their file when they were touched, since the process began.
#[must_use]
pub fn lost_pages() -> u64 {
    LOST_PAGES.load(Ordering::Relaxed)
}

/// A guarded range. `len` is 0 while it is not valid: written last when it becomes so, first when it ceases.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    page_size: AtomicUsize,
    len: AtomicUsize,
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            page_size: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
        }
    }
}

/// Keeps a mapping guarded; to be dropped before the mapping.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    /// Guards `len` bytes at `start`, both multiples of `page_size`, which is a power of two. `None`: no slot is free.
    pub(super) fn new(start: usize, len: usize, page_size: usize) -> Option<Guard> {
        PREVIOUS.get_or_init(install);
        let slot = GUARDED
            .iter()
            .position(|slot| !slot.taken.swap(true, Ordering::Acquire))?;
        GUARDED[slot].start.store(start, Ordering::Relaxed);
        GUARDED[slot].page_size.store(page_size, Ordering::Relaxed);
        GUARDED[slot].len.store(len, Ordering::Release);
        Some(Guard { slot })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        GUARDED[self.slot].len.store(0, Ordering::Release);
        GUARDED[self.slot].taken.store(false, Ordering::Release);
    }
}

/// Installs the handler; returns what was there before.
fn install() -> Option<libc::sigaction> {
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: an all-zero sigaction is valid (no flags, empty mask), the handler has the signature that SA_SIGINFO asks
    // for and calls only what a handler may, and the kernel fills `previous` when it succeeds.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        (libc::sigaction(libc::SIGBUS, &raw const action, previous.as_mut_ptr()) == 0)
            .then(|| previous.assume_init())
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, and SIGBUS fills its address.
    let addr = unsafe { (*info).si_addr() }.addr();
    for slot in &GUARDED {
        let len = slot.len.load(Ordering::Acquire);
        if addr.wrapping_sub(slot.start.load(Ordering::Relaxed)) < len {
            let page_size = slot.page_size.load(Ordering::Relaxed);
            let page = addr & !(page_size - 1);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: the page lies in a guarded mapping, which whoever faulted on it keeps alive; what is replaced has
            // no memory behind it, and no references are made to guest memory that could notice.
            let new = unsafe {
                libc::mmap(
                    std::ptr::with_exposed_provenance_mut(page),
                    page_size,
                    prot,
                    flags,
                    -1,
                    0,
                )
            };
            if new != libc::MAP_FAILED {
                LOST_PAGES.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }
    // Not ours: put back what was there; the access is repeated and raises the signal again.
    // SAFETY: `previous` came from the kernel; an all-zero sigaction is SIG_DFL.
    unsafe {
        let default = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        let previous = PREVIOUS.get().copied().flatten().unwrap_or(default);
        libc::sigaction(signal, &raw const previous, std::ptr::null_mut());
    }
}
