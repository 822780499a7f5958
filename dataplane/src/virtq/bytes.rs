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

/// Cache lines of one buffer that are read soon.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    first: *const u8,
    count: usize,
}

impl Lines {
    /// None at all.
    pub(super) const NONE: Lines = Lines {
        first: std::ptr::null(),
        count: 0,
    };

    /// The second and further lines of `len` bytes.
    pub(super) fn behind_the_first(host: NonNull<u8>, len: usize) -> Lines {
        Lines {
            first: host.as_ptr().wrapping_add(CACHE_LINE),
            count: len.div_ceil(CACHE_LINE).saturating_sub(1),
        }
    }

    /// Starts to bring one of them in, or one that is of no use.
    #[inline(always)]
    fn fetch(self, index: usize) {
        prefetch_at_once(self.first.wrapping_add(index * CACHE_LINE));
    }
}

/// Copies as [`copy`] does, and brings in what is read `next`: a line with every line that is copied, as a processor has only so many
/// requests under way, and waits if it is given more.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
pub(super) unsafe fn copy_and_fetch(from: NonNull<u8>, to: NonNull<u8>, len: usize, next: Lines) {
    if len <= SHORT {
        (0..next.count).for_each(|index| next.fetch(index));
        // SAFETY: as the caller vouches.
        return unsafe { copy(from, to, len) };
    }
    let lines = len / CACHE_LINE;
    let done = lines * CACHE_LINE;
    // SAFETY: as the caller vouches, of whole lines that are not more than `len` bytes, and of those that are left.
    unsafe {
        copy_lines(from, to, lines, next);
        copy(from.add(done), to.add(done), len - done);
    }
}

/// Copies whole lines, and fetches one of `next` with each, and the rest of these.
///
/// # Safety
/// As for [`copy`], of as many bytes as `lines` have.
#[inline]
unsafe fn copy_lines(from: NonNull<u8>, to: NonNull<u8>, lines: usize, next: Lines) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; for the rest, as the caller vouches.
        return unsafe { copy_lines_wide(from, to, lines, next) };
    }
    // SAFETY: as the caller vouches.
    unsafe { copy_line_by_line(from, to, lines, next) };
}

/// [`copy_line_by_line`] with 32 bytes at a time: a processor has only so many stores that wait for their lines, and if a line takes two of
/// them and not four, they are of twice as many lines.
///
/// # Safety
/// As for [`copy_lines`]; and the processor must have AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_lines_wide(from: NonNull<u8>, to: NonNull<u8>, lines: usize, next: Lines) {
    // SAFETY: as the caller vouches.
    unsafe { copy_line_by_line(from, to, lines, next) };
}

/// # Safety
/// As for [`copy_lines`].
#[inline(always)]
unsafe fn copy_line_by_line(from: NonNull<u8>, to: NonNull<u8>, lines: usize, next: Lines) {
    let line = |index: usize| {
        const HALF: usize = CACHE_LINE / 2;
        let at = index * CACHE_LINE;
        // SAFETY: the loops below stay within the lines that the caller vouches for.
        unsafe {
            block::<HALF>(from.add(at), to.add(at));
            block::<HALF>(from.add(at + HALF), to.add(at + HALF));
        }
    };
    let both = lines.min(next.count);
    for index in 0..both {
        next.fetch(index);
        line(index);
    }
    (both..lines).for_each(line);
    (both..next.count).for_each(|index| next.fetch(index));
}

/// Starts to bring the cache line at `at` in, to be read: into the second-level cache, which on some processors has more than twice as many
/// requests to memory under way as the first.
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

/// The same, into the first-level cache: for a line that is read in a moment, among others that are asked for one by one.
#[inline(always)]
fn prefetch_at_once(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: as in `prefetch_read`.
        unsafe { _mm_prefetch(at.cast(), _MM_HINT_T0) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_whole_and_nothing_beside_it() {
        const ROOM: usize = 1400;
        let from: Vec<u8> = (0..251).cycle().take(ROOM).collect();
        let other = vec![0; ROOM];
        let wanted = Lines::behind_the_first(NonNull::from(&other[..]).cast(), ROOM);
        let at = |bytes: &[u8], offset| NonNull::from(&bytes[offset..]).cast();
        for len in 0..ROOM - 64 {
            for (skip, offset, next) in [(0, 0, Lines::NONE), (30, 12, wanted), (63, 1, wanted)] {
                let check = |how: &str, to: &[u8]| {
                    assert!(to[offset..offset + len] == from[skip..skip + len], "{how}, {len}");
                    let beside = to[..offset].iter().chain(&to[offset + len..]);
                    assert!(beside.copied().all(|byte| byte == 255), "{how}, {len}");
                };
                let mut to = vec![255; ROOM];
                let target = NonNull::from(&mut to[offset..]).cast();
                // SAFETY: both vectors have the bytes.
                unsafe { copy_and_fetch(at(&from, skip), target, len, next) };
                check("as this processor does it", &to);
                to.fill(255);
                let lines = len / CACHE_LINE;
                let target = NonNull::from(&mut to[offset..]).cast();
                // SAFETY: as above.
                unsafe {
                    copy_line_by_line(at(&from, skip), target, lines, next);
                    let done = lines * CACHE_LINE;
                    copy(at(&from, skip + done), target.add(done), len - done);
                }
                check("without AVX2", &to);
            }
        }
    }
}
