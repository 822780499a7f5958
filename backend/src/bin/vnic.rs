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
use vnic_backend::control::report::EventsReport;
use vnic_backend::doctor;

/// Shows what a running vnicd does, and changes it.
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
    /// What happened to the NICs, oldest first: lost and alive again, with the cause, and what operators changed
    Events {
        /// Go on with what happens from now on, until interrupted
        #[arg(long, short)]
        follow: bool,
        /// Print each event as one line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Which NIC a session (in topology pinned a guest) leaves by, or a new one would, and why
    #[command(
        after_help = "Examples:\n  vnic explain tcp 10.0.0.1:80 10.0.0.2:40000\n  vnic explain 'udp [fe80::1]:53 <-> \
                            [fe80::2]:999 vlan 100'\n  vnic explain icmp 10.0.0.1 10.0.0.2 id 7\n  vnic explain mac 52:54:00:12:34:56 \
                            vlan 100"
    )]
    Explain {
        /// The flow, as `vnic sessions` shows it (arrows may be left out), or a station, as `vnic status` does
        #[arg(value_name = "FLOW", required = true)]
        flow: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
    /// How new sessions are placed
    #[command(subcommand)]
    Lb(LbCommand),
    /// Add, remove, weigh and drain NICs
    #[command(subcommand)]
    Nic(NicCommand),
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

#[derive(Subcommand)]
enum LbCommand {
    /// Place new sessions by another algorithm: hash, least_conn, weighted or adaptive; sessions that exist stay
    Set {
        /// The algorithm
        #[arg(value_name = "ALGORITHM")]
        algorithm: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Subcommand)]
enum NicCommand {
    /// Drive one more NIC: IF,id=ID,queues=N,weight=W and so on, as with vnicd --nic (all but IF may be left out)
    Add {
        /// The interface, and options
        #[arg(value_name = "IF[,OPTIONS]")]
        nic: String,
        #[command(flatten)]
        output: Output,
    },
    /// Give a NIC back to the host; its sessions go on by the others, at once
    ///
    /// `vnic nic drain NIC` before lets them end where they are. Refused if no other NIC that takes new sessions is alive, unless it
    /// is the only one.
    Remove {
        /// Its id
        #[arg(value_name = "NIC")]
        nic: String,
        #[command(flatten)]
        output: Output,
    },
    /// Change a NIC's share of new sessions, or whom it probes; sessions that exist stay
    ///
    /// In topology pinned a weight of 0 moves its guests to others, as a drain does.
    Set {
        /// Its id
        #[arg(value_name = "NIC")]
        nic: String,
        /// weight=W, 0 to 10000, or weight=auto for what the algorithm gives it; or probe=TARGET, or probe=off, as for vnicd --nic
        #[arg(value_name = "weight=W|probe=TARGET", value_parser = setting)]
        setting: Setting,
        #[command(flatten)]
        output: Output,
    },
    /// Have a NIC take no new sessions; tells how many are left. In topology pinned its guests move to others
    ///
    /// Refused if no other NIC that takes new sessions is alive. Guests' broadcast and multicast leave by another one, too. Should the
    /// others die later, new sessions go by it all the same.
    Drain {
        /// Its id
        #[arg(value_name = "NIC")]
        nic: String,
        #[command(flatten)]
        output: Output,
    },
    /// Have a drained NIC take new sessions again
    Undrain {
        /// Its id
        #[arg(value_name = "NIC")]
        nic: String,
        #[command(flatten)]
        output: Output,
    },
}

/// What `vnic nic set` changes.
#[derive(Clone)]
enum Setting {
    /// `None`: the algorithm's own.
    Weight(Option<u32>),
    /// `None`: nobody is asked.
    Probe(Option<String>),
}

fn setting(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some(("weight", "auto")) => Ok(Setting::Weight(None)),
        Some(("weight", digits)) => {
            let weight = digits.parse();
            weight
                .map(|weight| Setting::Weight(Some(weight)))
                .map_err(|_| format!("`{digits}` is not a whole number of 0 to 10000, nor `auto`"))
        }
        Some(("probe", "off")) => Ok(Setting::Probe(None)),
        // The daemon says what is wrong with one.
        Some(("probe", target)) => Ok(Setting::Probe(Some(target.to_owned()))),
        _ => Err("write weight=W, such as weight=5, or probe=TARGET, such as probe=192.0.2.1".to_owned()),
    }
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
        Command::Events { follow, json } => events(&cli.control, *follow, *json),
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
        Command::Explain { flow, output } => show(
            &mut client,
            &Request::Explain { flow: flow.join(" ") },
            *output,
            render::explain,
        ),
        Command::Lb(LbCommand::Set { algorithm, output }) => {
            let algorithm = algorithm.clone();
            show(
                &mut client,
                &Request::LbSet { algorithm },
                *output,
                render::algorithm,
            )
        }
        Command::Nic(command) => change_nic(&mut client, command),
        Command::Doctor { .. } | Command::Events { .. } => anyhow::bail!("this is not one question"),
    }
}

fn change_nic(client: &mut Client, command: &NicCommand) -> anyhow::Result<String> {
    match command {
        NicCommand::Add { nic, output } => show(
            client,
            &Request::NicAdd { nic: nic.clone() },
            *output,
            render::nic_added,
        ),
        NicCommand::Remove { nic, output } => {
            let request = Request::NicRemove { nic: nic.clone() };
            show(client, &request, *output, render::nic_removed)
        }
        NicCommand::Set {
            nic,
            setting: Setting::Probe(target),
            output,
        } => {
            let request = Request::NicProbe {
                nic: nic.clone(),
                target: target.clone(),
            };
            show(client, &request, *output, render::nic_probe)
        }
        NicCommand::Set {
            nic,
            setting: Setting::Weight(weight),
            output,
        } => {
            let request = Request::NicSet {
                nic: nic.clone(),
                weight: *weight,
            };
            show(client, &request, *output, render::nic_weight)
        }
        NicCommand::Drain { nic, output } => {
            let request = Request::NicDrain { nic: nic.clone() };
            show(client, &request, *output, render::nic_drained)
        }
        NicCommand::Undrain { nic, output } => {
            let request = Request::NicUndrain { nic: nic.clone() };
            show(client, &request, *output, render::nic_undrained)
        }
    }
}

/// Prints events as they come; the text that is left is empty.
fn events(control: &Path, follow: bool, json: bool) -> anyhow::Result<String> {
    let mut client = Client::connect(control)?;
    let mut after = 0;
    loop {
        // Shorter than the client's patience.
        let wait_s = if follow { 5 } else { 0 };
        let report: EventsReport = client.report(&Request::Events { after, wait_s })?;
        for event in &report.events {
            let line = match json {
                true => serde_json::to_string(event)?,
                false => render::event(event),
            };
            match writeln!(io::stdout().lock(), "{line}") {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(String::new()),
                other => other?,
            }
        }
        if !follow {
            return Ok(String::new());
        }
        after = report.last;
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
