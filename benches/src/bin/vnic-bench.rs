//! `vnic-bench`: the side-by-side runs, written as Markdown and JSON.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use vnic_benches::suite::report::{MARKERS, replace_tables};
use vnic_benches::suite::{Part, Settings, run_all};

/// Measures vnicd beside its peers: same generator, one CPU each, in turn. Needs root and two CPUs.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Two minutes instead of twenty: one short run of each load.
    #[arg(long)]
    quick: bool,
    /// Runs of each load [default: 5, quick: 1].
    #[arg(long)]
    runs: Option<usize>,
    /// Seconds of each run [default: 1, quick: 0.4].
    #[arg(long)]
    seconds: Option<f64>,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Where figures.md and figures.json go.
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// Also puts the tables between the markers of this document.
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces and AF_XDP need root"
    );
    ensure!(
        std::thread::available_parallelism()?.get() >= 2,
        "the generator and the device need a CPU each"
    );
    let folder = tempfile::tempdir()?;
    let program = std::env::current_exe()?;
    let settings = Settings {
        runs: options.runs.unwrap_or(if options.quick { 1 } else { 5 }).max(1),
        seconds: options.seconds.unwrap_or(if options.quick { 0.4 } else { 1.0 }),
        quick: options.quick,
        parts: if options.only.is_empty() {
            Part::value_variants().to_vec()
        } else {
            options.only
        },
        generator: program.with_file_name("vnic-load"),
        folder: folder.path().to_owned(),
    };
    ensure!(
        settings.seconds >= 0.3,
        "--seconds {}: at least 0.3",
        settings.seconds
    );
    ensure!(
        settings.generator.exists(),
        "no vnic-load beside {}",
        program.display()
    );
    let report = run_all(&settings)?;
    std::fs::create_dir_all(&options.output)?;
    let tables = report.markdown();
    std::fs::write(options.output.join("figures.md"), &tables)?;
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(options.output.join("figures.json"), json)?;
    if let Some(path) = &options.document {
        let document =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let document = replace_tables(&document, &tables).with_context(|| {
            format!(
                "{} has no lines {} and {}",
                path.display(),
                MARKERS[0],
                MARKERS[1]
            )
        })?;
        std::fs::write(path, document)?;
    }
    println!("{}", options.output.join("figures.md").display());
    Ok(())
}
