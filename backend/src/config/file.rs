//! The TOML file: the command line's names, with tables `[[port]]`, `[[nic]]`, `[timeouts]` and `[limits]`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::ConfigError;
use super::raw::{Given, Raw, RawNic, RawPort};
use super::sessions::{FileLimits, FileTimeouts};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    socket_path: Option<PathBuf>,
    fd: Option<i64>,
    port: Vec<FilePort>,
    nic: Vec<FileNic>,
    topology: Option<String>,
    lb: Option<String>,
    poll: Option<String>,
    sleep_in: Option<String>,
    workers: Option<i64>,
    cpus: Option<String>,
    control: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    ring_dir: Option<PathBuf>,
    sessions: Option<i64>,
    timeouts: FileTimeouts,
    limits: FileLimits,
    frames: Option<i64>,
    updelay: Option<i64>,
    flap_damping: Option<String>,
    allow_default_route_nic: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FilePort {
    name: Option<String>,
    socket: Option<PathBuf>,
    mac: Option<String>,
    queues: Option<i64>,
    vlan: Option<i64>,
    trunk: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct FileNic {
    name: Option<String>,
    id: Option<String>,
    queues: Option<i64>,
    zerocopy: Option<String>,
    attach: Option<String>,
    weight: Option<i64>,
    set_channels: Option<String>,
    probe: Option<String>,
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Raw, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::FileUnreadable {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, path)
}

/// Parses a file's text; `path` is for messages.
pub(super) fn parse(text: &str, path: &Path) -> Result<Raw, ConfigError> {
    let file: File = toml::from_str(text).map_err(|error| {
        let before = error
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        ConfigError::FileSyntax {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            message: error.message().replace('\n', " "),
        }
    })?;
    let shown = path.display();
    let name = |key: &str| format!("`{key}` in {shown}");
    Ok(Raw {
        socket_path: file
            .socket_path
            .map(|value| Given::new(value, name("socket-path"))),
        fd: file.fd.map(|value| Given::new(value, name("fd"))),
        ports: (1..)
            .zip(file.port)
            .map(|(number, port)| RawPort {
                origin: format!("[[port]] number {number} of {shown}"),
                name: port.name,
                socket: port.socket,
                fd: None,
                mac: port.mac,
                queues: port.queues,
                vlan: port.vlan,
                trunk: port.trunk,
            })
            .collect(),
        nics: (1..)
            .zip(file.nic)
            .map(|(number, nic)| RawNic {
                origin: format!("[[nic]] number {number} of {shown}"),
                ifname: nic.name,
                id: nic.id,
                queues: nic.queues,
                zerocopy: nic.zerocopy,
                attach: nic.attach,
                weight: nic.weight,
                set_channels: nic.set_channels,
                probe: nic.probe,
            })
            .collect(),
        topology: file.topology.map(|value| Given::new(value, name("topology"))),
        lb: file.lb.map(|value| Given::new(value, name("lb"))),
        poll: file.poll.map(|value| Given::new(value, name("poll"))),
        sleep_in: file.sleep_in.map(|value| Given::new(value, name("sleep-in"))),
        workers: file.workers.map(|value| Given::new(value, name("workers"))),
        cpus: file.cpus.map(|value| Given::new(value, name("cpus"))),
        control: file.control.map(|value| Given::new(value, name("control"))),
        state_dir: file.state_dir.map(|value| Given::new(value, name("state-dir"))),
        ring_dir: file.ring_dir.map(|value| Given::new(value, name("ring-dir"))),
        sessions: file.sessions.map(|value| Given::new(value, name("sessions"))),
        timeouts: file.timeouts.written_in(&format!("[timeouts] of {shown}")),
        limits: file.limits.written_in(&format!("[limits] of {shown}")),
        frames: file.frames.map(|value| Given::new(value, name("frames"))),
        updelay: file.updelay.map(|value| Given::new(value, name("updelay"))),
        flap_damping: file
            .flap_damping
            .map(|value| Given::new(value, name("flap-damping"))),
        allow_default_route_nic: file.allow_default_route_nic,
    })
}
