//! vnicd: serves virtio-net guests over vhost-user and balances their sessions over host NICs.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;
use vnic_backend::config::{self, Action};
use vnic_backend::daemon::Daemon;

fn main() -> ExitCode {
    let config = match config::from_args(std::env::args_os()) {
        Ok(Action::Run(config)) => config,
        Ok(Action::PrintCapabilities) => {
            println!("{}", config::capabilities_json());
            return ExitCode::SUCCESS;
        }
        Err(error) => return error.report(),
    };
    // stderr, never stdout; levels are defined in CONTRIBUTING.md, RUST_LOG selects them.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match Daemon::start(*config).and_then(Daemon::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vnicd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
