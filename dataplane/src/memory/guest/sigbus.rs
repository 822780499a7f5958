//! A front-end can shrink its file after we mapped it; touching what is gone raises SIGBUS. The handler here puts empty memory in
//! the place of the whole mapping, so that only that front-end's guest suffers, and tells the control thread, which hangs up
//! before much of that memory is filled. A SIGBUS anywhere else goes where it went before.
//!
//! The whole mapping, since one page at a time would let a front-end make us use up the mappings that a process may have
//! (vm.max_map_count): each page between others that are left makes two more.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{MAX_REGIONS, MAX_TABLE_REGIONS};
use crate::fabric::MAX_PORTS;

/// Mappings that can be guarded at once, in the whole process: a handler cannot allocate or lock. As many as all ports can
/// have, so that no front-end can leave none for another. The default vm.max_map_count leaves a third for all else.
pub(super) const MAX_GUARDS: usize = MAX_PORTS * (MAX_REGIONS + MAX_TABLE_REGIONS);
const _: () = assert!(MAX_GUARDS < 65530 / 3 * 2);

static GUARDED: [Slot; MAX_GUARDS] = [const { Slot::new() }; MAX_GUARDS];
/// Where to look for a free slot first, so that a full table is not searched for each.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Wakes the control thread.
static LOSS: OnceLock<EventFd> = OnceLock::new();
/// What SIGBUS did before.
static PREVIOUS: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// Readable once guest memory was gone from its file when it was touched: find it with
/// [`GuestMemory::lost`](super::GuestMemory::lost). One for the process.
///
/// # Errors
///
/// Those of eventfd(2), when it is asked for first.
pub fn loss_event() -> io::Result<&'static EventFd> {
    if let Some(event) = LOSS.get() {
        return Ok(event);
    }
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    Ok(LOSS.get_or_init(|| event))
}

/// A guarded range. `len` is 0 while there is none.
struct Slot {
    taken: AtomicBool,
    /// Odd while the range is being changed. A handler that finds it changed has read parts of two ranges.
    generation: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    /// The file no longer has all of it.
    lost: AtomicBool,
}

/// What a slot guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: usize,
    len: usize,
}

impl Range {
    const NONE: Range = Range { start: 0, len: 0 };
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            taken: AtomicBool::new(false),
            generation: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
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
    /// Guards the mapping of `len` bytes at `start`. `None`: no slot is free.
    pub(super) fn new(start: usize, len: usize) -> Option<Guard> {
        PREVIOUS.get_or_init(install);
        let next = NEXT.load(Ordering::Relaxed);
        let slot = (0..MAX_GUARDS)
            .map(|at| (next + at) % MAX_GUARDS)
            .find(|&at| !GUARDED[at].taken.swap(true, Ordering::Acquire))?;
        NEXT.store((slot + 1) % MAX_GUARDS, Ordering::Relaxed);
        GUARDED[slot].lost.store(false, Ordering::Relaxed);
        GUARDED[slot].set(Range { start, len });
        Some(Guard { slot })
    }

    /// Whether part of the mapping was gone from its file when it was touched; all of it is zeros since.
    pub(super) fn is_lost(&self) -> bool {
        GUARDED[self.slot].lost.load(Ordering::Acquire)
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
    for slot in &GUARDED {
        if slot.range().is_some_and(|range| replace(range, addr)) {
            slot.lost.store(true, Ordering::Release);
            tell();
            return;
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

/// Puts empty memory in the place of a range, if `addr` is in it and was found missing. It costs memory as it is written to.
fn replace(Range { start, len }: Range, addr: usize) -> bool {
    if addr.wrapping_sub(start) >= len {
        return false;
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: whoever faulted keeps the mapping at `addr` alive until the handler returns. A guard lives within the life of its
    // mapping and has its range from `set` on, and the range was guarded as it is at one moment since the fault: so it is that
    // mapping's, all of it, and still is. Guest memory may change at any time, so no references to it exist that could notice.
    let new = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(start),
            len,
            prot,
            flags,
            -1,
            0,
        )
    };
    new != libc::MAP_FAILED
}

/// Wakes the control thread. A full counter has woken it already.
fn tell() {
    if let Some(event) = LOSS.get() {
        let one = 1_u64;
        // SAFETY: write(2) may be called by a handler; it reads 8 bytes of `one`. errno is this thread's own, and is put back
        // for the code that was interrupted.
        unsafe {
            let errno = libc::__errno_location();
            let before = *errno;
            libc::write(event.as_raw_fd(), (&raw const one).cast(), size_of::<u64>());
            *errno = before;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(number: usize) -> Range {
        Range {
            start: number,
            len: number,
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
