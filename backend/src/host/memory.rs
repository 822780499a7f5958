//! Memory that the host can give.

/// More frame memory than there is: the kernel would end processes to find it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "frame memory of {needed_mib} MiB does not fit into the {available_mib} MiB that the host has free: give a smaller \
     --frames, or NICs with fewer queues"
)]
pub struct TooLittleMemory {
    needed_mib: u64,
    available_mib: u64,
}

/// Whether `bytes` can be had, on huge pages or others.
pub fn check(bytes: u64) -> Result<(), TooLittleMemory> {
    check_text(
        &std::fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        bytes,
    )
}

fn check_text(meminfo: &str, bytes: u64) -> Result<(), TooLittleMemory> {
    // What is not known is not refused; the allocation will tell.
    let Some(available) = field_kib(meminfo, "MemAvailable") else {
        return Ok(());
    };
    if bytes <= free_huge_bytes(meminfo) || bytes.div_ceil(1024) <= available {
        return Ok(());
    }
    Err(TooLittleMemory {
        needed_mib: bytes.div_ceil(1 << 20),
        available_mib: available / 1024,
    })
}

/// Bytes of huge pages of the default size that nobody has or was promised.
fn free_huge_bytes(meminfo: &str) -> u64 {
    let field = |name| field_kib(meminfo, name).unwrap_or(0);
    field("HugePages_Free")
        .saturating_sub(field("HugePages_Rsvd"))
        .saturating_mul(field("Hugepagesize") * 1024)
}

/// The number in a line `Name:   123 kB`.
pub(super) fn field_kib(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_refused_only_if_neither_sort_of_page_suffices() {
        let text = "MemTotal: 4194304 kB\nMemAvailable:    1048576 kB\nHugePages_Free:     1024\nHugePages_Rsvd:  \
                    0\nHugepagesize:       2048 kB\n";
        assert_eq!(check_text(text, 2 << 30), Ok(()), "on huge pages");
        let message = check_text(text, (2 << 30) + 1).unwrap_err().to_string();
        assert!(
            message.contains("2049 MiB") && message.contains("1024 MiB") && message.contains("--frames"),
            "{message}"
        );
        let promised = text.replace("Rsvd:  0", "Rsvd:  1024");
        assert!(check_text(&promised, 1 << 30).is_ok());
        assert!(check_text(&promised, (1 << 30) + 1).is_err());
        assert_eq!(check_text("", u64::MAX), Ok(()));
    }
}
