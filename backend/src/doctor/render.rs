//! Findings for people: a table, and below it what to do about each.

use std::fmt::Write as _;

use super::{Diagnosis, Finding, Level};

/// The diagnosis as text.
#[must_use]
pub fn table(diagnosis: &Diagnosis) -> String {
    let mut out = String::new();
    let widest = |of: fn(&Finding) -> &str| {
        let widths = diagnosis
            .findings
            .iter()
            .map(|finding| of(finding).chars().count());
        widths.max().unwrap_or(0)
    };
    let (at, check) = (widest(place), widest(|finding| finding.check));
    for finding in &diagnosis.findings {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<7}  {:<at$}  {:<check$}  {}",
            finding.level.as_str(),
            place(finding),
            finding.check,
            finding.what
        );
        let indent = 7 + 2 + at + 2 + check + 2;
        for (label, text) in [("why", &finding.why), ("do", &finding.cure)] {
            if finding.level != Level::Ok && !text.is_empty() {
                let _ = writeln!(out, "{:indent$}{label:<3}  {text}", "");
            }
        }
    }
    let count = |level: Level| {
        let found = diagnosis.findings.iter().filter(|finding| finding.level == level);
        found.count()
    };
    let _ = writeln!(
        out,
        "\n{} problems, {} warnings, {} notes",
        count(Level::Problem),
        count(Level::Warning),
        count(Level::Note)
    );
    out
}

fn place(finding: &Finding) -> &str {
    finding.nic.as_deref().unwrap_or("host")
}
