//! A front-end can shrink its file after we mapped it; touching what is gone raises SIGBUS. The handler here puts an
//! empty page in its place, so that only that front-end's guest suffers. A SIGBUS anywhere else goes where it went before.

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

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

/// A guarded range. `len` is 0 while there is none.
struct Slot {
    taken: AtomicBool,
    /// Odd while the range is being changed. A handler that finds it changed has read parts of two ranges.
    generation: AtomicUsize,
    start: AtomicUsize,
    page_size: AtomicUsize,
    len: AtomicUsize,
}

/// What a slot guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: usize,
    len: usize,
    page_size: usize,
}

impl Range {
    const NONE: Range = Range {
        start: 0,
        len: 0,
        page_size: 1,
    };
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            taken: AtomicBool::new(false),
            generation: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            page_size: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
        }
    }

    /// Changes the range; only for whoever has taken the slot.
    fn set(&self, range: Range) {
        let generation = self.generation.load(Ordering::Relaxed);
        self.generation
            .store(generation.wrapping_add(1), Ordering::Relaxed);
        // A handler that sees any part of the new range sees the odd number, too: this fence and the one in `is_still` meet.
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.page_size.store(range.page_size, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.generation
            .store(generation.wrapping_add(2), Ordering::Release);
    }

    /// The range, all parts of it from one `set`. `None`: it is being changed, and so is not the one of a mapping that is in
    /// use. Neither locks nor waits.
    fn range(&self) -> Option<Range> {
        let before = self.generation.load(Ordering::Acquire);
        let range = Range {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page_size: self.page_size.load(Ordering::Relaxed),
        };
        self.is_still(before).then_some(range)
    }

    /// Whether what was loaded since the generation was `before` is one range.
    fn is_still(&self, before: usize) -> bool {
        fence(Ordering::Acquire);
        before.is_multiple_of(2) && self.generation.load(Ordering::Relaxed) == before
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
        GUARDED[slot].set(Range {
            start,
            len,
            page_size,
        });
        Some(Guard { slot })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        GUARDED[self.slot].set(Range::NONE);
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
    for range in GUARDED.iter().filter_map(Slot::range) {
        if addr.wrapping_sub(range.start) < range.len {
            let page_size = range.page_size;
            let page = addr & !(page_size - 1);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: whoever faulted keeps the mapping at `addr` alive until this returns. A guard lives within the life of
            // its mapping, and the range was guarded as it is at one moment since the fault: so it is that mapping's, and
            // still is. The page has no memory behind it, and no references are made to guest memory that could notice.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn range(number: usize) -> Range {
        Range {
            start: number,
            len: number,
            page_size: number,
        }
    }

    #[test]
    fn a_slot_that_is_being_changed_guards_nothing() {
        let slot = Slot::new();
        slot.set(range(1));
        assert_eq!(slot.range(), Some(range(1)));
        // As a handler finds it that interrupts `set`.
        slot.generation.fetch_add(1, Ordering::Relaxed);
        assert_eq!(slot.range(), None);
    }

    #[test]
    fn a_slot_that_was_changed_while_it_was_read_guards_nothing() {
        let slot = Slot::new();
        slot.set(range(1));
        let before = slot.generation.load(Ordering::Relaxed);
        assert!(slot.is_still(before));
        // Its mapping went, and another one got the slot.
        slot.set(Range::NONE);
        slot.set(range(2));
        assert!(!slot.is_still(before));
        assert_eq!(slot.range(), Some(range(2)));
    }
}
