//! How bytes of a guest's memory are touched: read once, copied, prefetched.

use std::ptr::NonNull;

/// Up to this many bytes are copied in place: a call costs as much as the copy.
const SHORT: usize = 256;

/// Fills `out` from a place that the guest may be writing to, reading each byte exactly once, in words where it can.
///
/// # Safety
/// `from` must be valid for reading `out.len()` bytes.
#[inline]
pub(super) unsafe fn copy_once(from: NonNull<u8>, out: &mut [u8]) {
    #[repr(C, packed)]
    struct Unaligned<T>(T);

    let (eights, rest) = out.split_at_mut(out.len() / 8 * 8);
    let (fours, ones) = rest.split_at_mut(rest.len() / 4 * 4);
    let mut from = from;
    // SAFETY: the pieces follow one another and are out.len() bytes together; a packed word may lie at any address.
    // Volatile, so that what is checked is what was read.
    unsafe {
        for word in eights.chunks_exact_mut(8) {
            word.copy_from_slice(&from.cast::<Unaligned<u64>>().read_volatile().0.to_ne_bytes());
            from = from.add(8);
        }
        for word in fours.chunks_exact_mut(4) {
            word.copy_from_slice(&from.cast::<Unaligned<u32>>().read_volatile().0.to_ne_bytes());
            from = from.add(4);
        }
        for byte in ones {
            *byte = from.read_volatile();
            from = from.add(1);
        }
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

/// Starts to bring the cache line at `at` in, to be read.
#[inline(always)]
pub(super) fn prefetch_read(at: NonNull<u8>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on the cache, whatever the address.
        unsafe { _mm_prefetch(at.as_ptr().cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Starts to bring the cache line at `at` in, to be written.
#[inline(always)]
pub(super) fn prefetch_write(at: NonNull<u8>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: as in `prefetch_read`.
        unsafe { _mm_prefetch(at.as_ptr().cast(), _MM_HINT_ET0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
