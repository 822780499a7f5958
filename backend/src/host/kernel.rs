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

#[cfg(test)]
mod tests {
    use super::*;

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
