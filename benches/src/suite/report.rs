//! Figures and the tables that they make.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

/// The device that this is about.
pub const OURS: &str = "vnicd";
/// The peer that it is compared with.
pub const PEER: &str = "testpmd";
/// Column of the peer that switches.
pub const OVS: &str = "OVS-DPDK";

/// Nanoseconds that a cache line takes between the two CPUs and back: the least and the most say whether rows compare.
pub const APART: &str = "CPUs apart, ns";

/// What one device did under one load.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Cell {
    /// A figure for each run.
    pub samples: Vec<f64>,
    /// Why there is none.
    pub missing: Option<String>,
}

impl Cell {
    /// The median of the runs.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        }
    }

    fn spread(&self) -> Option<(f64, f64)> {
        let least = self.samples.iter().copied().min_by(f64::total_cmp)?;
        let most = self.samples.iter().copied().max_by(f64::total_cmp)?;
        Some((least, most))
    }
}

/// One load.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What the load is.
    pub load: String,
    /// By device.
    pub cells: BTreeMap<String, Cell>,
}

/// One table.
#[derive(Debug, Clone, Serialize)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What the figures are, in a sentence.
    pub about: String,
    /// Digits after the point.
    pub digits: usize,
    /// Columns in their order.
    pub devices: Vec<String>,
    /// Loads in their order.
    pub rows: Vec<Row>,
}

impl Section {
    /// An empty table.
    #[must_use]
    pub fn new(title: &str, about: &str, digits: usize, devices: &[&str]) -> Section {
        Section {
            title: title.to_owned(),
            about: about.to_owned(),
            digits,
            devices: devices.iter().map(|&device| device.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    fn cell(&mut self, load: &str, device: &str) -> &mut Cell {
        let at = self.rows.iter().position(|row| row.load == load);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                load: load.to_owned(),
                cells: BTreeMap::new(),
            });
            self.rows.len() - 1
        });
        self.rows[at].cells.entry(device.to_owned()).or_default()
    }

    /// Adds the figure of one run, or why there is none.
    pub fn add(&mut self, load: &str, device: &str, outcome: anyhow::Result<f64>) {
        let cell = self.cell(load, device);
        match outcome {
            Ok(figure) => cell.samples.push(figure),
            Err(error) => cell.missing = Some(format!("{error:#}")),
        }
    }

    /// The median ratio of ours to the peer's, run by run.
    fn ratio(&self, row: &Row) -> Option<f64> {
        let (ours, theirs) = (row.cells.get(OURS)?, row.cells.get(PEER)?);
        let ratios = Cell {
            samples: ours
                .samples
                .iter()
                .zip(&theirs.samples)
                .map(|(ours, theirs)| ours / theirs)
                .collect(),
            missing: None,
        };
        ratios.median()
    }

    /// The table, with the reasons for what is missing below it.
    #[must_use]
    pub fn markdown(&self) -> String {
        let has_ratio = [OURS, PEER]
            .iter()
            .all(|&name| self.devices.iter().any(|device| device == name));
        let mut text = format!("### {}\n\n{}\n\n| |", self.title, self.about);
        for device in &self.devices {
            let _ = write!(text, " {device} |");
        }
        if has_ratio {
            let _ = write!(text, " {OURS} : {PEER} |");
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(self.devices.len() + usize::from(has_ratio)));
        text.push('\n');
        let mut reasons: Vec<String> = Vec::new();
        for row in &self.rows {
            let _ = write!(text, "| {} |", row.load);
            for device in &self.devices {
                let shown = self.show(row.cells.get(device), device, &mut reasons);
                let _ = write!(text, " {shown} |");
            }
            if has_ratio {
                match self.ratio(row) {
                    Some(ratio) => {
                        let _ = write!(text, " {ratio:.2} |");
                    }
                    None => text.push_str(" |"),
                }
            }
            text.push('\n');
        }
        for (at, reason) in reasons.iter().enumerate() {
            let _ = write!(text, "\n[{}] Not measured: {reason}\n", at + 1);
        }
        text
    }

    fn show(&self, cell: Option<&Cell>, device: &str, reasons: &mut Vec<String>) -> String {
        let digits = self.digits;
        let Some(cell) = cell else {
            return String::new();
        };
        let mut shown = match (cell.median(), cell.spread()) {
            (Some(median), Some((least, most))) if cell.samples.len() > 1 => {
                format!("{median:.digits$} ({least:.digits$}-{most:.digits$})")
            }
            (Some(median), _) => format!("{median:.digits$}"),
            _ => String::from("-"),
        };
        if let Some(why) = &cell.missing {
            let reason = format!("{device}: {}", why.replace(['\n', '|'], " "));
            let at = reasons.iter().position(|known| *known == reason);
            let at = at.unwrap_or_else(|| {
                reasons.push(reason);
                reasons.len() - 1
            });
            let _ = write!(shown, " [{}]", at + 1);
        }
        shown
    }
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where and how it was measured, line by line.
    pub setting: Vec<String>,
    /// The tables.
    pub sections: Vec<Section>,
}

impl Report {
    /// All tables.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for line in &self.setting {
            let _ = writeln!(text, "- {line}");
        }
        for section in &self.sections {
            text.push('\n');
            text.push_str(&section.markdown());
        }
        text
    }
}

/// The line after which the tables begin in a document, and the line before which they end.
pub const MARKERS: [&str; 2] = ["<!-- figures: begin -->", "<!-- figures: end -->"];

/// The document with the tables between its markers replaced; `None` if it has no markers.
#[must_use]
pub fn replace_tables(document: &str, tables: &str) -> Option<String> {
    let (before, rest) = document.split_once(MARKERS[0])?;
    let (_, after) = rest.split_once(MARKERS[1])?;
    Some(format!(
        "{before}{}\n{}\n{}{after}",
        MARKERS[0],
        tables.trim_end(),
        MARKERS[1]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_medians_ratios_and_reasons() {
        let mut section = Section::new("Frames", "M frames/s.", 1, &[OURS, PEER, "OVS"]);
        for (ours, theirs) in [(10.0, 10.0), (12.0, 8.0), (30.0, 10.0)] {
            section.add("60 B", OURS, Ok(ours));
            section.add("60 B", PEER, Ok(theirs));
            section.add("60 B", "OVS", Err(anyhow::anyhow!("no | such\npackage")));
        }
        section.add("1514 B", OURS, Ok(5.0));
        let mut alone = Section::new("Idle", "Percent.", 1, &["kernel", PEER]);
        alone.add("8 ports", PEER, Ok(1.0));
        assert!(alone.markdown().contains("| 8 ports |  | 1.0 |\n"));
        let text = section.markdown();
        assert!(text.contains("| | vnicd | testpmd | OVS | vnicd : testpmd |\n|---|---|---|---|---|\n"));
        assert!(text.contains("| 60 B | 12.0 (10.0-30.0) | 10.0 (8.0-10.0) | - [1] | 1.50 |\n"));
        assert!(text.contains("| 1514 B | 5.0 |  |  | |\n"), "{text}");
        assert!(text.contains("[1] Not measured: OVS: no   such package\n"));
    }

    #[test]
    fn a_median_of_an_even_number_is_between_the_two() {
        let cell = |samples: &[f64]| Cell {
            samples: samples.to_vec(),
            missing: None,
        };
        assert_eq!(cell(&[4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(cell(&[]).median(), None);
    }

    #[test]
    fn tables_go_between_the_markers() {
        let document = "a\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nb\n";
        let new = replace_tables(document, "new\n").unwrap();
        assert_eq!(new, "a\n<!-- figures: begin -->\nnew\n<!-- figures: end -->\nb\n");
        assert_eq!(replace_tables(&new, "new\n").unwrap(), new);
        assert_eq!(replace_tables("nothing", "new"), None);
    }
}
