//! What an operator changed.

use super::words::count;
use crate::control::report::{
    AlgorithmReport, NicAddedReport, NicProbeReport, NicSessionsReport, NicWeightReport,
};

/// `vnic lb set`
#[must_use]
pub fn algorithm(report: &AlgorithmReport) -> String {
    let AlgorithmReport { algorithm, before } = report;
    format!("new sessions are placed by {algorithm} (before: {before})\n")
}

/// `vnic nic add`
#[must_use]
pub fn nic_added(report: &NicAddedReport) -> String {
    let mode = if report.zero_copy { "zero-copy" } else { "copy" };
    format!(
        "NIC {} added: interface {}, {} queues, {mode}\n",
        report.id, report.ifname, report.queues
    )
}

/// `vnic nic remove`
#[must_use]
pub fn nic_removed(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} removed: {} {} go on by the others\n",
        report.id,
        count(report.sessions),
        report.counted
    )
}

/// `vnic nic set`
#[must_use]
pub fn nic_weight(report: &NicWeightReport) -> String {
    format!(
        "NIC {}: weight {} (before: {})\n",
        report.id, report.weight, report.before
    )
}

/// `vnic nic set NIC probe=...`
#[must_use]
pub fn nic_probe(report: &NicProbeReport) -> String {
    let text = |target: &Option<String>| target.clone().unwrap_or_else(|| "off".into());
    format!(
        "NIC {}: probe {} (before: {})\n",
        report.id,
        text(&report.probe),
        text(&report.before)
    )
}

/// `vnic nic drain`
#[must_use]
pub fn nic_drained(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} takes no new {}; {} are left (`vnic nics` shows how many)\n",
        report.id,
        report.counted,
        count(report.sessions)
    )
}

/// `vnic nic undrain`
#[must_use]
pub fn nic_undrained(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} takes new {} again; it has {}\n",
        report.id,
        report.counted,
        count(report.sessions)
    )
}
