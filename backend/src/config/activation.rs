//! Which activated socket is whose: a port with `socket=activation` has the socket of its own name.

use std::path::PathBuf;

use super::error::ConfigError;
use super::raw::{Given, RawPort};
use super::{Endpoint, PortConfig, check};
use crate::host::activation::Activated;

/// Instead of a path: the socket comes by activation. (A file of that name is `./activation`.)
pub(super) const WORD: &str = "activation";

/// The configured ports with their sockets, or, if there are none, a port for each activated socket. No socket is left over.
pub(super) fn ports(
    socket_path: Option<Given<PathBuf>>,
    fd: Option<Given<i64>>,
    mut listed: Vec<RawPort>,
    activated: &Activated,
) -> Result<Vec<PortConfig>, ConfigError> {
    let names = || activated.sockets.iter().map(|(name, _)| name);
    if let Some((_, name)) = names()
        .enumerate()
        .find(|(at, name)| names().take(*at).any(|earlier| earlier == *name))
    {
        return Err(ConfigError::DuplicateActivated { name: name.clone() });
    }
    if listed.is_empty() && socket_path.is_none() && fd.is_none() {
        listed = names()
            .map(|name| RawPort {
                origin: format!("FileDescriptorName={name}"),
                name: Some(name.clone()),
                socket: Some(WORD.into()),
                ..RawPort::default()
            })
            .collect();
    }
    let ports = check::ports(socket_path, fd, &listed, activated)?;
    let wanting: Vec<&str> = ports
        .iter()
        .filter(|port| matches!(port.endpoint, Endpoint::Activated(_)))
        .map(|port| port.name.as_str())
        .collect();
    if let Some(name) = names().find(|name| !wanting.contains(&name.as_str())) {
        return Err(ConfigError::UnexpectedSocket {
            name: name.clone(),
            ports: some_or_none(&wanting),
        });
    }
    Ok(ports)
}

/// The socket that was handed over for this port.
pub(super) fn endpoint(port: &str, activated: &Activated) -> Result<Endpoint, ConfigError> {
    if let Some((_, fd)) = activated.sockets.iter().find(|(name, _)| name == port) {
        return Ok(Endpoint::Activated(*fd));
    }
    let found = match activated.meant_for {
        Some(pid) => format!(
            "there are some for process {pid}: if that is a program that starts vnicd, it must do so by exec, without a fork"
        ),
        None => {
            let names: Vec<&str> = activated.sockets.iter().map(|(name, _)| name.as_str()).collect();
            format!("handed over: {}", some_or_none(&names))
        }
    };
    Err(ConfigError::NotActivated {
        port: port.to_owned(),
        found,
    })
}

fn some_or_none(names: &[&str]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}
