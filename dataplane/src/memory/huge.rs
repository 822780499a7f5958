//! Huge pages for ordinary memory.

use std::ops::Range;

/// Bytes of a huge page (x86-64, and arm64 with pages of 4 KiB).
const HUGE_PAGE: usize = 2 << 20;

/// Puts what it can of a range of addresses on transparent huge pages, now. A wish: where the kernel has none, or none free, all stays
/// as it is. Returns the bytes that the kernel was asked for and did not refuse.
pub fn prefer_huge_pages(addresses: Range<usize>) -> usize {
    let begin = addresses.start.next_multiple_of(HUGE_PAGE);
    let Some(len) = (addresses.end - addresses.end % HUGE_PAGE).checked_sub(begin) else {
        return 0;
    };
    if len == 0 {
        return 0;
    }
    let advise = |advice| {
        // SAFETY: neither advice changes what memory holds, whoever it belongs to; the kernel refuses ranges that are not mapped.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(begin), len, advice) == 0 }
    };
    // The second is there from Linux 6.1 on; before, the kernel does it in its own time.
    if advise(libc::MADV_HUGEPAGE) && advise(libc::MADV_COLLAPSE) {
        len
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_its_content_and_too_little_of_it_is_left_alone() {
        let table: Vec<u32> = (0..).take(3 * HUGE_PAGE / 4).collect();
        let addresses = table.as_ptr_range();
        let asked = prefer_huge_pages(addresses.start.addr()..addresses.end.addr());
        assert!(asked <= 3 * HUGE_PAGE && asked.is_multiple_of(HUGE_PAGE));
        assert!(table.iter().zip(0u32..).all(|(word, at)| *word == at));
        assert_eq!(prefer_huge_pages(4096..8192), 0);
        assert_eq!(prefer_huge_pages(HUGE_PAGE..HUGE_PAGE), 0);
    }
}
