//! How bytes of a guest's memory are touched: read once, copied, prefetched.

use std::ptr::NonNull;

/// Bytes that move between caches together.
pub(super) const CACHE_LINE: usize = 64;

/// Up to this many bytes are copied in place: a call costs as much as the copy.
const SHORT: usize = 256;

/// A value that may lie at any address.
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Reads a value from a place that the guest may be writing to: once, so that what is checked is what was read.
///
/// # Safety
/// `from` must be valid for reading a `T`, of which any bytes must be a value; it need not be aligned.
#[inline(always)]
pub(super) unsafe fn read_once<T: Copy>(from: NonNull<u8>) -> T {
    // SAFETY: as the caller vouches.
    unsafe { from.cast::<Unaligned<T>>().read_volatile().0 }
}

/// Sixteen bytes that are moved at once. As two words they would be written one by one and then read as a whole, which
/// stalls: a processor forwards to a load only what a single store wrote.
#[cfg(target_arch = "x86_64")]
type Sixteen = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Sixteen = u128;

/// Reads sixteen bytes as [`read_once`] does.
///
/// # Safety
/// `from` must be valid for reading 16 bytes.
#[inline(always)]
pub(super) unsafe fn read_once_16(from: NonNull<u8>) -> [u8; 16] {
    // SAFETY: as the caller vouches; both types have 16 bytes, any of which are values.
    unsafe { std::mem::transmute(read_once::<Sixteen>(from)) }
}

/// Fills `out` from a place that the guest may be writing to, reading each byte exactly once.
///
/// # Safety
/// `from` must be valid for reading `out.len()` bytes.
pub(super) unsafe fn copy_once(from: NonNull<u8>, out: &mut [u8]) {
    for (at, byte) in out.iter_mut().enumerate() {
        // SAFETY: `at` is below `out.len()`.
        *byte = unsafe { read_once(from.add(at)) };
    }
}

/// Copies `len` bytes; either side may be memory that guests write to meanwhile. Where the ranges overlap, which guests can arrange,
/// the target gets some mixture of the bytes.
///
/// # Safety
/// `from` must be valid for reading `len` bytes, `to` for writing as many.
#[inline(always)]
pub(super) unsafe fn copy(from: NonNull<u8>, to: NonNull<u8>, len: usize) {
    // SAFETY: as the caller vouches.
    unsafe {
        match len {
            12 => {
                // A virtio-net header.
                block::<8>(from, to);
                block::<4>(from.add(8), to.add(8));
            }
            16..=32 => ends::<16>(from, to, len),
            33..=64 => ends::<32>(from, to, len),
            65..=SHORT => {
                // Blocks of 32 up to the last, which ends with the last byte and may overlap the one before.
                let mut at = 0;
                while at + 32 < len {
                    block::<32>(from.add(at), to.add(at));
                    at += 32;
                }
                block::<32>(from.add(len - 32), to.add(len - 32));
            }
            _ => std::ptr::copy(from.as_ptr(), to.as_ptr(), len),
        }
    }
}

/// Copies the first and the last `N` of `len` bytes, `N` to `2 * N`: together all of them.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn ends<const N: usize>(from: NonNull<u8>, to: NonNull<u8>, len: usize) {
    // SAFETY: `len` is at least `N`; for the rest, as the caller vouches. Both are read before either is written.
    unsafe {
        let first = from.cast::<[u8; N]>().read_unaligned();
        let last = from.add(len - N).cast::<[u8; N]>().read_unaligned();
        to.cast::<[u8; N]>().write_unaligned(first);
        to.add(len - N).cast::<[u8; N]>().write_unaligned(last);
    }
}

/// Copies `N` bytes.
///
/// # Safety
/// As for [`copy`], with `N`.
#[inline(always)]
unsafe fn block<const N: usize>(from: NonNull<u8>, to: NonNull<u8>) {
    // SAFETY: as the caller vouches.
    unsafe {
        to.cast::<[u8; N]>()
            .write_unaligned(from.cast::<[u8; N]>().read_unaligned())
    };
}

/// Cache lines of one buffer that are wanted soon.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    host: *const u8,
    at: usize,
    end: usize,
}

impl Lines {
    /// None at all.
    pub(super) const NONE: Lines = Lines {
        host: std::ptr::null(),
        at: 0,
        end: 0,
    };

    /// The second and further lines of `len` bytes.
    pub(super) fn behind_the_first(host: NonNull<u8>, len: usize) -> Lines {
        Lines {
            host: host.as_ptr(),
            at: CACHE_LINE,
            end: len,
        }
    }

    /// Has `fetch` bring the next of them in, if there is one.
    #[inline(always)]
    fn fetch(&mut self, fetch: impl Fn(*const u8)) -> bool {
        let is_one = self.at < self.end;
        if is_one {
            fetch(self.host.wrapping_add(self.at));
            self.at += CACHE_LINE;
        }
        is_one
    }
}

/// Copies as [`copy`] does, and brings in what is read and what is written next: a line of each with every line that is copied, as a
/// processor has only so many requests under way, and waits if it is given more.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
pub(super) unsafe fn copy_and_fetch(
    from: NonNull<u8>,
    to: NonNull<u8>,
    len: usize,
    [mut read, mut written]: [Lines; 2],
) {
    const LINE: usize = CACHE_LINE;
    let lines = if len > SHORT { len / LINE } else { 0 };
    for at in (0..lines).map(|line| line * LINE) {
        read.fetch(prefetch_read);
        written.fetch(prefetch_write);
        // SAFETY: the line ends within the `len` bytes that the caller vouches for.
        unsafe {
            block::<{ LINE / 2 }>(from.add(at), to.add(at));
            block::<{ LINE / 2 }>(from.add(at + LINE / 2), to.add(at + LINE / 2));
        }
    }
    while read.fetch(prefetch_read) | written.fetch(prefetch_write) {}
    let done = lines * LINE;
    // SAFETY: as the caller vouches, of the bytes that are left.
    unsafe { copy(from.add(done), to.add(done), len - done) };
}

/// Starts to bring the cache line at `at` in, to be read: into the second-level cache, which has more than twice as many requests to memory
/// under way as the first.
#[inline(always)]
pub(super) fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on the cache, whatever the address.
        unsafe { _mm_prefetch(at.cast(), _MM_HINT_T1) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Starts to bring the cache line at `at` in, to be written: the other cores' copies go now, not when the store waits for it.
#[inline(always)]
pub(super) fn prefetch_write(at: *const u8) {
    // `_mm_prefetch` with a hint to write falls back to reading unless the whole program is compiled for processors that
    // have `prefetchw`. Older 64-bit ones do nothing at this instruction, so it needs no such promise.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch_read`.
    unsafe {
        std::arch::asm!(
            "prefetchw [{at}]",
            at = in(reg) at,
            options(readonly, nostack, preserves_flags)
        );
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
