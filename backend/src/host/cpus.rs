//! The CPUs that workers may be pinned to.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// A CPU that this process may not run on.
#[derive(Debug, thiserror::Error)]
#[error(
    "CPU {cpu} of --cpus is not there, is offline, or is not allowed for vnicd: choose from {allowed}, or widen the \
     unit's AllowedCPUs="
)]
pub struct CpuError {
    cpu: usize,
    allowed: String,
}

/// Checks that the calling thread may run on each of `cpus`.
pub fn check(cpus: &[usize]) -> Result<(), CpuError> {
    // If the kernel does not tell, pinning itself will.
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        return Ok(());
    };
    let may_use = |cpu: usize| allowed.is_set(cpu).unwrap_or(false);
    match cpus.iter().find(|cpu| !may_use(**cpu)) {
        Some(cpu) => {
            let all: Vec<String> = (0..CpuSet::count())
                .filter(|cpu| may_use(*cpu))
                .map(|cpu| cpu.to_string())
                .collect();
            Err(CpuError {
                cpu: *cpu,
                allowed: all.join(", "),
            })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_is_not_there_is_named_with_those_that_are() {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let first = (0..CpuSet::count())
            .find(|cpu| allowed.is_set(*cpu).unwrap())
            .unwrap();
        assert!(check(&[first]).is_ok());
        let missing = (0..CpuSet::count())
            .rev()
            .find(|cpu| !allowed.is_set(*cpu).unwrap())
            .unwrap();
        let message = check(&[first, missing]).unwrap_err().to_string();
        assert!(message.contains(&format!("CPU {missing} of --cpus")), "{message}");
        assert!(message.contains(&format!("choose from {first}")), "{message}");
    }
}
