//! `vnic`: asks a running `vnicd` over its control socket.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::de::DeserializeOwned;
use vnic_backend::config::DEFAULT_CONTROL;
use vnic_backend::control::client::Client;
use vnic_backend::control::protocol::{DEFAULT_SESSION_LIMIT, Request};
use vnic_backend::control::render;
use vnic_backend::doctor;

/// Shows what a running vnicd does.
#[derive(Parser)]
#[command(
    name = "vnic",
    version,
    after_help = "Exit codes: 0 answered, 1 the daemon could not be asked or refused, 2 wrong usage; those of `vnic \
                  doctor` are in its own help.\nExample: vnic stats --json"
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
    /// Examine this host and its NICs before vnicd uses them; needs no running daemon and changes nothing
    ///
    /// Every finding is ok, a note, a warning (vnicd runs, but slower than it could, or something will surprise) or a problem
    /// (vnicd will not start, or guests will not be reached), with what to do about it.
    #[command(
        after_help = "Exit codes: 0 nothing worse than notes, 1 warnings, 2 problems (or wrong usage), 3 the host could \
                            not be examined.\nExample: vnic doctor eth1 eth2"
    )]
    Doctor {
        /// Interfaces to examine [default: every Ethernet interface that is up and could be a NIC]
        #[arg(value_name = "NIC")]
        nics: Vec<String>,
        /// Print the findings as JSON: verdict, findings[] of level, nic, check, what, why, cure
        #[arg(long)]
        json: bool,
    },
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
    let outcome = match &cli.command {
        Command::Doctor { nics, json } => return examine(nics, *json),
        asked => ask(&cli.control, asked),
    };
    match outcome {
        Ok(text) => print(&text, ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("vnic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn examine(nics: &[String], json: bool) -> ExitCode {
    let diagnosis = match doctor::examine(nics) {
        Ok(diagnosis) => diagnosis,
        Err(error) => {
            eprintln!("vnic: cannot list this host's interfaces: {error}");
            return ExitCode::from(3);
        }
    };
    let text = match json {
        true => match serde_json::to_string_pretty(&diagnosis) {
            Ok(text) => format!("{text}\n"),
            Err(error) => {
                eprintln!("vnic: cannot write the findings as JSON: {error}");
                return ExitCode::from(3);
            }
        },
        false => doctor::table(&diagnosis),
    };
    print(&text, ExitCode::from(diagnosis.exit_code()))
}

/// Writes to standard output; `code` if that can be done.
fn print(text: &str, code: ExitCode) -> ExitCode {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => code,
        // `vnic sessions | head`: the reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => code,
        Err(error) => {
            eprintln!("vnic: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

fn ask(control: &Path, command: &Command) -> anyhow::Result<String> {
    let mut client = Client::connect(control)?;
    match command {
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
        Command::Doctor { .. } => anyhow::bail!("the doctor asks no daemon"),
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
