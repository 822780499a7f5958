//! vnicd as its systemd units start it: sockets handed over by `systemd-socket-activate`, readiness told to a service manager, and, if asked
//! for, exactly the user's rights that vnicd.service gives. (No systemd runs as process 1 where tests run.)

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::binaries::{binary, source_root};
use crate::netns::Netns;
use crate::process::{Process, run, tail, wait_for};

/// How long vnicd may take until it says that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// What to start.
#[derive(Debug, Clone, Default)]
pub struct Activation {
    /// The sockets, as `NAME.sock` in the daemon's folder.
    pub sockets: Vec<String>,
    /// What names they are handed over with, in order and joined by `:`; `None`: without names.
    pub names: Option<String>,
    /// Further options of `systemd-socket-activate`, such as `--datagram`.
    pub options: Vec<String>,
    /// A namespace to run in.
    pub namespace: Option<String>,
    /// With the rights of vnicd.service, as an unprivileged user.
    pub confined: bool,
    /// But without this capability.
    pub without: Option<String>,
    /// vnicd's arguments.
    pub arguments: Vec<String>,
}

impl Activation {
    /// Sockets that are handed over by their own names.
    #[must_use]
    pub fn named(sockets: &[&str], arguments: &[&str]) -> Activation {
        Activation {
            sockets: sockets.iter().map(|name| (*name).to_owned()).collect(),
            names: Some(sockets.join(":")),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            ..Activation::default()
        }
    }

    /// The same in a network namespace.
    #[must_use]
    pub fn within(mut self, namespace: &Netns) -> Activation {
        self.namespace = Some(namespace.name().to_owned());
        self
    }
}

/// Sockets that wait for a first connection, or the vnicd that it started; killed when dropped.
pub struct UnitDaemon {
    folder: PathBuf,
    process: Process,
    manager: UnixDatagram,
}

impl UnitDaemon {
    /// Opens the sockets. vnicd itself is started by the first connection.
    ///
    /// # Errors
    /// If a socket does not appear.
    pub fn listen(folder: &Path, activation: &Activation) -> Result<UnitDaemon> {
        let vnicd = if activation.confined {
            // The user must reach the program and write its sockets and state.
            let copy = folder.join("vnicd");
            fs::copy(binary("vnicd")?, &copy)?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?;
            copy
        } else {
            binary("vnicd")?
        };
        let notify = folder.join("notify");
        let manager = UnixDatagram::bind(&notify)?;
        fs::set_permissions(&notify, fs::Permissions::from_mode(0o777))?;
        manager.set_nonblocking(true)?;
        let mut command = match &activation.namespace {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name, "systemd-socket-activate"]);
                command
            }
            None => Command::new("systemd-socket-activate"),
        };
        let paths: Vec<PathBuf> = activation
            .sockets
            .iter()
            .map(|name| folder.join(format!("{name}.sock")))
            .collect();
        for path in &paths {
            command.arg("--listen").arg(path);
        }
        if let Some(names) = &activation.names {
            command.arg(format!("--fdname={names}"));
        }
        command
            .args(&activation.options)
            .arg(format!("--setenv=NOTIFY_SOCKET={}", notify.display()))
            .arg("--setenv=RUST_BACKTRACE=1");
        if activation.confined {
            command.args(confinement(activation.without.as_deref())?);
        }
        command
            .arg(vnicd)
            .arg("--control")
            .arg(folder.join("control.sock"))
            .arg("--state-dir")
            .arg(folder.join("state"))
            .args(&activation.arguments);
        let mut process = Process::start("vnicd", command, &folder.join("vnicd.log"))?;
        wait_for("the sockets", READY_LIMIT, Duration::from_millis(10), || {
            process.must_run()?;
            Ok(paths.iter().all(|path| path.exists()).then_some(()))
        })?;
        Ok(UnitDaemon {
            folder: folder.to_owned(),
            process,
            manager,
        })
    }

    /// Connects to a socket as a front-end does, which starts vnicd if nobody has.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(&self, name: &str) -> Result<UnixStream> {
        let path = self.socket(name);
        // The path exists a moment before the socket listens.
        let what = format!("a connection to {}", path.display());
        wait_for(&what, READY_LIMIT, Duration::from_millis(10), || {
            Ok(UnixStream::connect(&path).ok())
        })
    }

    /// Where a socket is.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.sock"))
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The next message to the service manager, if one has come.
    ///
    /// # Errors
    /// Those of recv(2).
    pub fn told(&self) -> Result<Option<String>> {
        let mut buffer = [0; 1024];
        match self.manager.recv(&mut buffer) {
            Ok(length) => Ok(Some(String::from_utf8_lossy(&buffer[..length]).into_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until vnicd has told the service manager what contains `text`.
    ///
    /// # Errors
    /// If it ends, or does not in time; with the end of its log.
    pub fn wait_told(&mut self, text: &str) -> Result<String> {
        let what = format!("`{text}` from vnicd to its manager");
        wait_for(&what, READY_LIMIT, Duration::from_millis(10), || {
            while let Some(message) = self.told()? {
                if message.contains(text) {
                    return Ok(Some(message));
                }
            }
            self.process.must_run()?;
            Ok(None)
        })
        .with_context(|| format!("the end of vnicd's log:\n{}", tail(self.process.log(), 30)))
    }

    /// Waits for the end of a vnicd that must refuse; returns its exit code and what it wrote.
    ///
    /// # Errors
    /// If it does not end.
    pub fn refusal(&mut self) -> Result<(i32, String)> {
        let status = self.process.wait(READY_LIMIT)?;
        Ok((status.code().unwrap_or(-1), tail(self.process.log(), 50)))
    }
}

/// What a unit file of qemu/systemd says for `key`.
///
/// # Errors
/// If it says nothing.
pub fn unit_setting(unit: &str, key: &str) -> Result<String> {
    let path = source_root().join("qemu/systemd").join(unit);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    match found {
        Some(value) => Ok(value.to_owned()),
        None => bail!("{} has no {key}=", path.display()),
    }
}

/// Whether LimitMEMLOCK=infinity can be had here, which takes CAP_SYS_RESOURCE (or a hard limit that is infinite already).
#[must_use]
pub fn can_unlimit_memlock() -> bool {
    run(Command::new("prlimit").args(["--memlock=unlimited:unlimited", "true"])).is_ok()
}

/// A command prefix that gives what follows the rights of vnicd.service, as user and group 65534. Where the limit on locked memory cannot be
/// raised, CAP_IPC_LOCK stands in for it: the kernel asks for either one, in the same places.
fn confinement(without: Option<&str>) -> Result<Vec<String>> {
    anyhow::ensure!(unit_setting("vnicd.service", "LimitMEMLOCK")? == "infinity");
    let unlimited = can_unlimit_memlock();
    let set = |key: &str| -> Result<String> {
        let names = unit_setting("vnicd.service", key)?;
        let mut set = "-all".to_owned();
        for name in names
            .split_whitespace()
            .chain((!unlimited).then_some("CAP_IPC_LOCK"))
        {
            if Some(name) != without {
                set.push_str(",+");
                set.push_str(&name.trim_start_matches("CAP_").to_lowercase());
            }
        }
        Ok(set)
    };
    let (ambient, bounding) = (set("AmbientCapabilities")?, set("CapabilityBoundingSet")?);
    let mut command: Vec<String> = Vec::new();
    if unlimited {
        command.extend(["prlimit", "--memlock=unlimited:unlimited"].map(str::to_owned));
    }
    command.extend([
        "setpriv".to_owned(),
        "--reuid=65534".to_owned(),
        "--regid=65534".to_owned(),
        "--clear-groups".to_owned(),
        format!("--inh-caps={ambient}"),
        format!("--ambient-caps={ambient}"),
        format!("--bounding-set={bounding}"),
        "--no-new-privs".to_owned(),
        "--pdeathsig=KILL".to_owned(),
    ]);
    Ok(command)
}
