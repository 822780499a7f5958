//! The client's side of the control socket: blocking, for `vnic` and for tests.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::protocol::{CallError, Request};

/// Longest wait for the daemon to take or give the next bytes.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket, or nobody behind it.
    #[error(
        "no vnicd answers on {}: {source}; start vnicd, or name its control socket with --control PATH", .path.display()
    )]
    NotRunning {
        /// The control socket.
        path: PathBuf,
        /// What connecting said.
        source: io::Error,
    },
    /// The socket is somebody else's.
    #[error("no permission to use {}: run vnic as the user that runs vnicd (root, as a rule)", .path.display())]
    NoPermission {
        /// The control socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("vnicd on {} did not answer: {source}; look at its log", .path.display())]
    Broken {
        /// The control socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It takes too long.
    #[error(
        "vnicd on {} has not answered for {} s: what it was asked to change it may still change (`vnic events` tells when); if \
         it answers nobody, look at its log",
        .path.display(), .patience.as_secs_f64()
    )]
    TimedOut {
        /// The control socket.
        path: PathBuf,
        /// How long was waited.
        patience: Duration,
    },
    /// What came back is not of this protocol.
    #[error("vnicd on {} answered what this vnic does not understand ({source}): are both of one version?", .path.display())]
    Foreign {
        /// The control socket.
        path: PathBuf,
        /// What was wrong with it.
        source: serde_json::Error,
    },
    /// The daemon said no.
    #[error("vnicd refused: {0}")]
    Refused(#[from] CallError),
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    patience: Duration,
}

#[derive(Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    result: Value,
    error: Option<CallError>,
}

impl Client {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        Client::connect_for(path, TIMEOUT)
    }

    /// Connects; `patience`: the longest wait for the next bytes.
    fn connect_for(path: &Path, patience: Duration) -> Result<Client, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NoPermission {
                path: path.to_owned(),
            },
            _ => ClientError::NotRunning {
                path: path.to_owned(),
                source,
            },
        })?;
        let limit = |stream: &UnixStream| {
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))
        };
        limit(&stream).map_err(|source| ClientError::Broken {
            path: path.to_owned(),
            source,
        })?;
        Ok(Client {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            patience,
        })
    }

    /// Asks, and gives the result as JSON.
    pub fn call(&mut self, request: &Request) -> Result<Value, ClientError> {
        let mut line = String::new();
        let asked = self.stream.get_mut().write_all(request.to_line().as_bytes());
        let got = asked.and_then(|()| match self.stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        });
        got.map_err(|source| match source.kind() {
            // A socket's timeout is told as EAGAIN.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::TimedOut {
                path: self.path.clone(),
                patience: self.patience,
            },
            _ => ClientError::Broken {
                path: self.path.clone(),
                source,
            },
        })?;
        let answer: Answer = serde_json::from_str(&line).map_err(|source| self.foreign(source))?;
        match answer.error {
            Some(error) if !answer.ok => Err(error.into()),
            _ => Ok(answer.result),
        }
    }

    /// Asks, and gives the report.
    pub fn report<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        let value = self.call(request)?;
        serde_json::from_value(value).map_err(|source| self.foreign(source))
    }

    fn foreign(&self, source: serde_json::Error) -> ClientError {
        ClientError::Foreign {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_gives_up_is_told_that_the_change_may_still_come() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control.sock");
        let _silent = UnixListener::bind(&path).expect("a socket");
        let mut client = Client::connect_for(&path, Duration::from_millis(10)).expect("a connection");
        let request = Request::NicDrain { nic: "left".into() };
        let error = client.call(&request).expect_err("nobody answers").to_string();
        assert!(error.contains("may still change"), "{error}");
    }
}
