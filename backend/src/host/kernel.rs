//! What the running kernel must have been built with.

use std::path::Path;

/// The kernel cannot do what AF_XDP needs.
#[derive(Debug, thiserror::Error)]
#[error(
    "kernel {release} has no AF_XDP sockets, which every NIC needs: run a kernel built with CONFIG_XDP_SOCKETS=y \
     (Debian's are, from version 5.10 on)"
)]
pub struct NoAfXdp {
    release: String,
}

/// Whether the kernel has AF_XDP. It is a build option and cannot be a module, so its name is in the kernel's list of
/// protocols if and only if socket(AF_XDP) is known.
pub fn check_af_xdp() -> Result<(), NoAfXdp> {
    check(Path::new("/proc/thread-self/net/protocols"))
}

fn check(protocols: &Path) -> Result<(), NoAfXdp> {
    // An unreadable list says nothing: the socket call itself will then tell.
    let Ok(list) = std::fs::read_to_string(protocols) else {
        return Ok(());
    };
    if list
        .lines()
        .any(|line| line.split_whitespace().next() == Some("XDP"))
    {
        return Ok(());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Err(NoAfXdp {
        release: release.trim().to_owned(),
    })
}

/// What later kernels do better, by the version that brought it.
const BETTER: &[((u32, u32), &str)] = &[
    ((6, 6), "frames of several buffers: none above 3.5 KB can pass"),
    (
        (6, 17),
        "more than 32 frames sent with a system call where a NIC is driven in copy mode",
    ),
];

/// What this kernel lacks beside a newer one, as one line for the log; `None` if nothing that matters here.
pub fn lacks() -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    lacking(release.trim())
}

fn lacking(release: &str) -> Option<String> {
    let mut numbers = release
        .split(|letter: char| !letter.is_ascii_digit())
        .map_while(|number| number.parse().ok());
    let version: (u32, u32) = (numbers.next()?, numbers.next()?);
    let missing: Vec<String> = BETTER
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|((major, minor), what)| format!("{what} (from {major}.{minor} on)"))
        .collect();
    (!missing.is_empty()).then(|| format!("this kernel lacks {}", missing.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_told_from_new_ones() {
        let old = lacking("6.1.0-56-cloud-amd64").unwrap();
        assert!(old.contains("6.6") && old.contains("6.17"), "{old}");
        let middle = lacking("6.12.9").unwrap();
        assert!(!middle.contains("6.6") && middle.contains("6.17"), "{middle}");
        for none in ["7.3.4+deb13-cloud-amd64", "6.17.8", "strange"] {
            assert_eq!(lacking(none), None);
        }
    }

    #[test]
    fn a_kernel_without_it_is_named() {
        let list = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            list.path(),
            "protocol  size sockets\nUNIX      1024     5\nPACKET 1 2\n",
        )
        .unwrap();
        let message = check(list.path()).unwrap_err().to_string();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert!(
            message.contains("CONFIG_XDP_SOCKETS") && message.contains(release.trim()),
            "{message}"
        );
        std::fs::write(list.path(), "protocol  size sockets\nXDP       960      0\n").unwrap();
        assert!(check(list.path()).is_ok());
    }
}
