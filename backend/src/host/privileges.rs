//! The privileges that driving a NIC takes, looked at before anything is tried, so that the message names all of them.

/// Bits of `CapEff` (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// What is missing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities.
    #[error(
        "no privilege to drive a NIC: vnicd needs {0}: run it as root, or give it `AmbientCapabilities={0}` in its \
         systemd unit"
    )]
    Missing(String),
    /// Memory that may be locked.
    #[error(
        "no privilege to lock {needed} bytes of frame memory (the limit is {limit}): give vnicd CAP_IPC_LOCK, or raise \
         the limit with `ulimit -l unlimited` or `LimitMEMLOCK=infinity` in its systemd unit"
    )]
    LockedMemory {
        /// Bytes that would be locked.
        needed: u64,
        /// Bytes that may be.
        limit: u64,
    },
}

/// Checks the calling thread's effective capabilities. Needed only when there are NICs; `locked_bytes` is the memory
/// that AF_XDP will account: the size of frame memory times the number of NIC queues that it is registered with.
pub fn check(locked_bytes: u64) -> Result<(), PrivilegeError> {
    check_texts(&own("status"), &own("limits"), locked_bytes)
}

/// Capabilities that driving a NIC takes and that the calling thread lacks.
#[must_use]
pub fn missing() -> Vec<String> {
    let effective = effective(&own("status")).unwrap_or(u64::MAX);
    missing_of(effective).into_iter().map(str::to_owned).collect()
}

/// Whether the calling thread may lock memory beyond its limit.
#[must_use]
pub fn may_lock_memory() -> bool {
    effective(&own("status")).is_none_or(|effective| has(effective, CAP_IPC_LOCK))
}

/// A soft limit of the calling thread by its name in `/proc/self/limits`; `None`: unlimited, or not known.
#[must_use]
pub fn limit(name: &str) -> Option<u64> {
    limit_of(&own("limits"), name)
}

fn own(file: &str) -> String {
    std::fs::read_to_string(format!("/proc/thread-self/{file}")).unwrap_or_default()
}

fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn has(effective: u64, capability: u32) -> bool {
    effective >> capability & 1 == 1
}

fn missing_of(effective: u64) -> Vec<&'static str> {
    let has = |capability| has(effective, capability);
    [
        (has(CAP_NET_ADMIN), "CAP_NET_ADMIN"),
        (has(CAP_NET_RAW), "CAP_NET_RAW"),
        (has(CAP_BPF) || has(CAP_SYS_ADMIN), "CAP_BPF"),
    ]
    .into_iter()
    .filter_map(|(there, name)| (!there).then_some(name))
    .collect()
}

fn check_texts(status: &str, limits: &str, locked_bytes: u64) -> Result<(), PrivilegeError> {
    // Without procfs nothing is known here; the calls themselves will then tell.
    let Some(effective) = effective(status) else {
        return Ok(());
    };
    let missing = missing_of(effective);
    if !missing.is_empty() {
        return Err(PrivilegeError::Missing(missing.join(" ")));
    }
    match limit_of(limits, "Max locked memory") {
        Some(limit) if !has(effective, CAP_IPC_LOCK) && limit < locked_bytes => {
            Err(PrivilegeError::LockedMemory {
                needed: locked_bytes,
                limit,
            })
        }
        _ => Ok(()),
    }
}

/// A soft limit; `None`: unlimited, or not known.
fn limit_of(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: &str =
        "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608   8388608   bytes\n";
    const UNLIMITED: &str = "Max locked memory         unlimited   unlimited   bytes\n";

    fn status(capabilities: &[u32]) -> String {
        let bits: u64 = capabilities.iter().map(|bit| 1 << bit).sum();
        format!("Name:\tvnicd\nCapPrm:\tffffffffffffffff\nCapEff:\t{bits:016x}\n")
    }

    #[test]
    fn every_missing_capability_is_named_at_once() {
        let message = check_texts(&status(&[]), LIMITS, 1).unwrap_err().to_string();
        for name in [
            "CAP_NET_ADMIN",
            "CAP_NET_RAW",
            "CAP_BPF",
            "root",
            "AmbientCapabilities=",
        ] {
            assert!(message.contains(name), "{message}");
        }
        let only = check_texts(&status(&[12, 21]), LIMITS, 1);
        assert_eq!(only, Err(PrivilegeError::Missing("CAP_NET_RAW".into())));
    }

    #[test]
    fn locked_memory_counts_without_ipc_lock() {
        let enough = status(&[12, 13, 39]);
        assert_eq!(check_texts(&enough, LIMITS, 8_388_608), Ok(()));
        let short = PrivilegeError::LockedMemory {
            needed: 8_388_609,
            limit: 8_388_608,
        };
        assert_eq!(check_texts(&enough, LIMITS, 8_388_609), Err(short));
        assert_eq!(check_texts(&enough, UNLIMITED, u64::MAX), Ok(()));
        assert_eq!(check_texts(&status(&[12, 13, 14, 39]), LIMITS, u64::MAX), Ok(()));
    }
}
