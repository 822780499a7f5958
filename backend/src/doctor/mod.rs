//! `vnic doctor`: is this host ready, and what to do where it is not.
//!
//! [`crate::host::survey`] gathers facts, `host` and `nic` judge them (pure functions), `render` shows the findings.

mod host;
mod nic;
mod render;
#[cfg(test)]
mod tests;

use serde::Serialize;

use crate::host::survey::{self, HostFacts, NicFacts};

pub use render::table;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing need be done.
    Note,
    /// vnicd runs, but slower than it could, or something will surprise.
    Warning,
    /// vnicd will not start, or guests will not be reached.
    Problem,
}

impl Level {
    /// The word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// `null`: the host; else the NIC.
    pub nic: Option<String>,
    /// What was looked at: a stable name for scripts.
    pub check: &'static str,
    /// What was found.
    pub what: String,
    /// Why that matters; empty for what is as it should be.
    pub why: String,
    /// What to do, a command where there is one; empty if nothing.
    pub cure: String,
}

/// What the doctor found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// The worst level of all findings.
    pub verdict: Level,
    /// The host's first, then those of each NIC.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// The exit code for scripts: 0 for nothing worse than notes, 1 for warnings, 2 for problems.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self.verdict {
            Level::Ok | Level::Note => 0,
            Level::Warning => 1,
            Level::Problem => 2,
        }
    }
}

/// Examines this host and the named NICs, or all that could be NICs.
///
/// # Errors
/// If the kernel does not list its interfaces.
pub fn examine(nics: &[String]) -> std::io::Result<Diagnosis> {
    Ok(diagnose(&survey::host(), &survey::nics(nics)?))
}

/// Judges facts.
#[must_use]
pub fn diagnose(host: &HostFacts, nics: &[NicFacts]) -> Diagnosis {
    let mut findings = host::judge(host);
    if nics.is_empty() {
        findings.push(Finding {
            level: Level::Problem,
            nic: None,
            check: "nics",
            what: "no interface here could be a NIC of vnicd".to_owned(),
            why: "only Ethernet interfaces that are up are looked at".to_owned(),
            cure: "ip link set dev IF up, or name an interface: vnic doctor IF".to_owned(),
        });
    }
    findings.extend(nics.iter().flat_map(nic::judge));
    let verdict = findings
        .iter()
        .map(|finding| finding.level)
        .max()
        .unwrap_or(Level::Ok);
    Diagnosis { verdict, findings }
}

/// Collects findings about one thing.
struct Findings {
    nic: Option<String>,
    list: Vec<Finding>,
}

impl Findings {
    fn of(nic: Option<&str>) -> Findings {
        Findings {
            nic: nic.map(str::to_owned),
            list: Vec::new(),
        }
    }

    fn ok(&mut self, check: &'static str, what: impl Into<String>) {
        self.add(Level::Ok, check, what, "", "");
    }

    fn add(
        &mut self,
        level: Level,
        check: &'static str,
        what: impl Into<String>,
        why: &str,
        cure: impl Into<String>,
    ) {
        self.list.push(Finding {
            level,
            nic: self.nic.clone(),
            check,
            what: what.into(),
            why: why.to_owned(),
            cure: cure.into(),
        });
    }
}
