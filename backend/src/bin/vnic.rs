//! `vnic`: asks a running `vnicd` over its control socket.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::de::DeserializeOwned;
use vnic_backend::config::DEFAULT_CONTROL;
use vnic_backend::control::client::Client;
use vnic_backend::control::protocol::{DEFAULT_SESSION_LIMIT, Request};
use vnic_backend::control::render;

/// Shows what a running vnicd does.
#[derive(Parser)]
#[command(
    name = "vnic",
    version,
    after_help = "Exit codes: 0 answered, 1 the daemon could not be asked or refused, 2 wrong usage.\n\
                  Example: vnic stats --json"
)]
struct Cli {
    /// The daemon's control socket
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_CONTROL)]
    control: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One look: version, uptime, workers, ports, NICs, number of sessions
    Status(Output),
    /// Counters of ports, queues, NICs and workers, and every drop with its reason
    Stats(Output),
    /// Sessions: key, NIC, age, idle time, frames and bytes
    Sessions {
        /// Most sessions to list
        #[arg(long, value_name = "N", default_value_t = DEFAULT_SESSION_LIMIT)]
        limit: usize,
        #[command(flatten)]
        output: Output,
    },
    /// NICs: state, MAC, driver, queues, modes, weight, sessions, last change
    Nics(Output),
    /// Ports: state, MAC, queue pairs, memory, socket, negotiated features
    Ports(Output),
}

#[derive(Args, Clone, Copy)]
struct Output {
    /// Print the report as JSON, as docs/control-protocol.md describes it
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    // Wrong usage ends here with exit code 2, help and version with 0.
    let cli = Cli::parse();
    let text = match run(&cli) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("vnic: {error}");
            return ExitCode::FAILURE;
        }
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // `vnic sessions | head`: the reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vnic: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<String> {
    let mut client = Client::connect(&cli.control)?;
    match &cli.command {
        Command::Status(output) => show(&mut client, &Request::Status, *output, render::status),
        Command::Stats(output) => show(&mut client, &Request::Stats, *output, render::stats),
        Command::Sessions { limit, output } => show(
            &mut client,
            &Request::Sessions { limit: *limit },
            *output,
            render::sessions,
        ),
        Command::Nics(output) => show(&mut client, &Request::Nics, *output, render::nics),
        Command::Ports(output) => show(&mut client, &Request::Ports, *output, render::ports),
    }
}

fn show<T: DeserializeOwned>(
    client: &mut Client,
    request: &Request,
    output: Output,
    render: fn(&T) -> String,
) -> anyhow::Result<String> {
    if output.json {
        // As it came, so that fields of a newer daemon are not lost.
        let value = client.call(request)?;
        return Ok(format!("{}\n", serde_json::to_string_pretty(&value)?));
    }
    Ok(render(&client.report(request)?))
}
