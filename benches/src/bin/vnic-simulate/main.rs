//! Simulates the balancer at scale, without a NIC: sessions by Zipf's law and by churn, lost and returning NICs, other weights.
//!
//! Prints tables (Markdown) and, with `--plots DIR`, writes SVG plots. All numbers come from `vnic_lb` itself, driven with
//! parsed frames as the frame loop does; modulo hashing, Maglev and the best assignment that can be known are there to
//! compare with. Seeds are fixed, so two runs print the same.

mod churn;
mod elephants;
mod failover;
mod plot;
mod references;
mod shares;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut plots = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--plots", Some(directory)) => plots = Some(PathBuf::from(directory)),
            _ => {
                eprintln!("usage: vnic-simulate [--plots DIRECTORY]");
                return ExitCode::FAILURE;
            }
        }
    }
    match run(plots) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vnic-simulate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(plots: Option<PathBuf>) -> Result<(), String> {
    let plots = plot::Plots::new(plots)?;
    shares::run();
    failover::run(&plots)?;
    elephants::run(&plots)?;
    churn::run(&plots)
}
