//! Runs inside the test guest and does what the tests ask over a serial port.

use std::path::PathBuf;

use clap::Parser;

/// Serves the tests' requests on a serial port.
#[derive(Parser)]
struct Options {
    /// The serial port.
    #[arg(long, default_value = "/dev/ttyS1")]
    device: PathBuf,
}

fn main() -> anyhow::Result<()> {
    vnic_tests::agent::serve(&Options::parse().device)
}
