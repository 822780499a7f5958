//! Where the programs under test are.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The root of the source tree.
#[must_use]
pub fn source_root() -> PathBuf {
    // Set by cargo at run time for tests; the compiled-in path serves programs started by hand.
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().unwrap_or(Path::new(".")).to_owned()
}

/// The path of a program that the workspace builds: in `VNIC_BIN_DIR` if that is set, else the newer of the release and
/// the debug build.
///
/// # Errors
/// If it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("VNIC_BIN_DIR") {
        let path = Path::new(&folder).join(name);
        if path.is_file() {
            return Ok(path);
        }
        bail!(
            "no {name} in VNIC_BIN_DIR={}: build it there or unset the variable",
            Path::new(&folder).display()
        );
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| source_root().join("target"), PathBuf::from);
    let built = ["release", "debug"].map(|profile| target.join(profile).join(name));
    let newest = built
        .into_iter()
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max_by_key(|(modified, _)| *modified);
    match newest {
        Some((_, path)) => Ok(path),
        None => bail!(
            "{name} has not been built (looked in {}): run `make build`",
            target.display()
        ),
    }
}
