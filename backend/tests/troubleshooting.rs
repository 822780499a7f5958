//! docs/troubleshooting.md has every error message of the daemon, and every reason of a drop.

use std::path::{Path, PathBuf};

use vnic_dataplane::counters::DropReason;

fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry of it").path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

/// The texts of all `#[error("...")]`, as one line each.
fn messages(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for after in source.split("#[error(").skip(1) {
        let Some(text) = after.trim_start().strip_prefix('"') else {
            continue;
        };
        let end = text
            .char_indices()
            .find(|(at, letter)| *letter == '"' && !text[..*at].ends_with('\\'))
            .map_or(text.len(), |(at, _)| at);
        // A backslash at a line's end joins it with the next, without that one's indentation.
        let mut message = String::new();
        for line in text[..end].split_inclusive('\n') {
            match line.strip_suffix("\\\n") {
                Some(line) if message.is_empty() => message.push_str(line),
                Some(line) => message.push_str(line.trim_start()),
                None if message.is_empty() => message.push_str(line),
                None => message.push_str(line.trim_start()),
            }
        }
        found.push(message);
    }
    found
}

/// Whether a line of the page has the parts of a message that are the same whatever it names, in their order.
fn is_in(line: &str, message: &str) -> bool {
    let mut rest = line;
    message.split(['{', '}']).step_by(2).all(|part| {
        let found = rest.split_once(part.trim());
        rest = found.map_or("", |(_, after)| after);
        found.is_some()
    })
}

fn page() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::read_to_string(root.join("docs/troubleshooting.md")).expect("the page")
}

#[test]
fn every_error_is_in_the_troubleshooting_page() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = page();
    let lines: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| ") || line.starts_with("- "))
        .collect();
    let mut files = Vec::new();
    for folder in ["backend/src", "dataplane/src", "lb/src"] {
        sources(&root.join(folder), &mut files);
    }
    let all: Vec<String> = files
        .iter()
        .flat_map(|file| messages(&std::fs::read_to_string(file).unwrap()))
        .collect();
    assert!(all.len() > 100, "messages are not found any more");
    let missing: Vec<&String> = all
        .iter()
        .filter(|message| !lines.iter().any(|line| is_in(line, message)))
        .collect();
    assert!(missing.is_empty(), "not in docs/troubleshooting.md: {missing:#?}");
}

#[test]
fn every_reason_of_a_drop_is_in_the_troubleshooting_page() {
    let page = page();
    for reason in DropReason::ALL {
        let name = reason.name();
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{name}` | ")));
        let cells: Vec<&str> = row
            .unwrap_or_else(|| panic!("no row for `{name}`"))
            .trim_matches('|')
            .split(" | ")
            .collect();
        assert!(
            cells.len() == 3 && cells.iter().all(|cell| !cell.trim().is_empty()),
            "`{name}`: {cells:?}"
        );
    }
}
