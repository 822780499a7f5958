//! What the operator asked for: the command line, the environment and the TOML file, merged and checked.
//!
//! [`from_args`] is the one way in. A [`Config`] that it returns has passed every check that needs no look at the
//! host; what the host says about NICs and privileges is checked by [`crate::host`].
//!
//! Precedence, per option: the command line, then the environment (`LB_ALGORITHM` only), then the file, then the
//! default. Sockets that came by socket activation belong to the ports with `socket=activation` by their names; if no port is
//! configured at all, each becomes a port. Ports and NICs are lists: one `--port`, `--socket-path` or `--fd` on the command line replaces all the
//! file's ports, and one `--nic` all the file's NICs.

mod activation;
mod check;
mod cli;
mod error;
mod file;
mod options;
mod raw;
mod sessions;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use vnic_dataplane::fabric::{self, VlanMode};
use vnic_dataplane::probe::{ProbeTarget, ProbeTargetError};
use vnic_lb::limits::{SessionLimits, Timeouts};
use vnic_lb::mac::Mac;

use crate::host::activation::{Activated, ActivationError};
pub use check::MAX_WEIGHT;
pub use error::ConfigError;

/// Where the control socket is unless `--control` says otherwise.
pub const DEFAULT_CONTROL: &str = "/run/vnic/control.sock";
/// Where state that outlives the daemon is kept unless `--state-dir` says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/vnic";
/// Sessions that the table holds unless `--sessions` says otherwise (about 21 MiB).
pub const DEFAULT_SESSIONS: usize = 262_144;
/// Milliseconds that a carrier must last unless `--updelay` says otherwise: switches' ports are up before they forward.
pub const DEFAULT_UPDELAY_MS: u32 = 200;
/// Most queue pairs of a port, and what a port offers unless `queues=` says otherwise.
pub const MAX_QUEUE_PAIRS: u16 = 8;
const _: () = assert!(MAX_QUEUE_PAIRS as usize <= fabric::MAX_QUEUE_PAIRS);
/// Most ports of one daemon.
pub const MAX_PORTS: usize = fabric::MAX_PORTS;
/// Most workers.
pub const MAX_WORKERS: usize = 64;

/// Everything that the daemon was asked to do, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// At least one, names, sockets and MACs all different.
    pub ports: Vec<PortConfig>,
    /// At most [`vnic_lb::MAX_NICS`]; none is a local switch between the ports.
    pub nics: Vec<NicConfig>,
    /// Always there with two or more NICs.
    pub topology: Option<Topology>,
    /// Which NIC a new session gets.
    pub lb: Algorithm,
    /// How workers wait.
    pub poll: PollMode,
    /// What idle workers sleep in.
    pub sleep_in: SleepMode,
    /// Datapath threads, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// CPU of each worker, in order: as many as workers, or empty (workers are not pinned then).
    pub cpus: Vec<usize>,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Folder of the hash key.
    pub state_dir: PathBuf,
    /// Folder of the files that keep where packed rings stand; `None`: beside each port's socket.
    pub ring_dir: Option<PathBuf>,
    /// Sessions that the table can hold.
    pub sessions: usize,
    /// How long sessions are kept when they are idle.
    pub timeouts: Timeouts,
    /// How many new sessions may come.
    pub limits: SessionLimits,
    /// Chunks (4096 bytes) of frame memory; `None`: the daemon computes what its rings need.
    pub frames: Option<u32>,
    /// How long a carrier must last before its NIC is alive again, in milliseconds.
    pub updelay_ms: u32,
    /// Leave a NIC out for a while that fails again and again.
    pub flap_damping: bool,
    /// Drive even the NIC that carries the host's default route.
    pub allow_default_route_nic: bool,
}

/// One guest vNIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Unique, `[A-Za-z0-9_.-]{1,32}`.
    pub name: String,
    /// Where the front-end comes in.
    pub endpoint: Endpoint,
    /// The guest's MAC; `None`: learned from the first acceptable source address.
    pub mac: Option<Mac>,
    /// Most queue pairs that the guest may use, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// The VLANs that the guest takes part in.
    pub vlan: VlanMode,
}

/// How a port is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Path of a Unix socket to listen on.
    Socket(PathBuf),
    /// A descriptor that the parent process left open: see [`crate::host::activation`].
    Fd(RawFd),
    /// A listening socket that came by socket activation, under the port's name, as this descriptor.
    Activated(RawFd),
}

/// One uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// Name of the host interface.
    pub ifname: String,
    /// Stable id that slots and pins are keyed by; the interface's name unless `id=` was given.
    pub id: String,
    /// Queues to drive; `None`: all that the interface has.
    pub queues: Option<u32>,
    /// Whether the driver must not copy.
    pub zerocopy: ZeroCopy,
    /// How the XDP program is attached.
    pub attach: AttachMode,
    /// Relative share of new sessions; 0 drains. `None`: the algorithm's own, which is 1 or the link speed.
    pub weight: Option<u32>,
    /// Set the interface's number of channels to `queues` while the daemon runs; only with `queues`.
    pub set_channels: bool,
    /// Who is asked whether frames arrive.
    pub probe: Option<ProbeTarget>,
}

/// The NIC that a text like the value of `--nic` describes, checked but for what the host says about it.
///
/// # Errors
///
/// What `--nic` would have been refused for.
pub fn nic_of(text: &str) -> Result<NicConfig, ConfigError> {
    options::nic(text).and_then(|raw| check::nic(&raw))
}

/// The value of `probe=`; `None` for `off`.
///
/// # Errors
///
/// If it is neither an address nor `off`.
pub fn probe_of(text: &str) -> Result<Option<ProbeTarget>, ProbeTargetError> {
    match text {
        "off" => Ok(None),
        target => target.parse().map(Some),
    }
}

/// A setting with a fixed list of words, the same on the command line and in the file.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// Every word that is accepted.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word that stands for it, in options, files and reports.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The meaning of a word, `None` for one that is not in [`Self::WORDS`].
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// What the NICs are plugged into; decides what may be balanced.
    Topology {
        /// One link aggregation group (static or LACP, MLAG, or ECMP towards the guest).
        Lag = "lag",
        /// Independent switch ports: a guest's address is behind one NIC at a time.
        Pinned = "pinned",
    }
}

words! {
    /// Which NIC a new session gets.
    Algorithm {
        /// By consistent hash of the session key.
        Hash = "hash",
        /// The NIC with the fewest sessions for its weight.
        LeastConn = "least_conn",
        /// By consistent hash, in proportion to weights or else link speeds.
        Weighted = "weighted",
        /// The NIC with the lowest latency for its idle capacity.
        Adaptive = "adaptive",
    }
}

impl Algorithm {
    /// The balancer's name for it.
    #[must_use]
    pub const fn policy(self) -> vnic_lb::policy::Algorithm {
        match self {
            Algorithm::Hash => vnic_lb::policy::Algorithm::Hash,
            Algorithm::LeastConn => vnic_lb::policy::Algorithm::LeastConn,
            Algorithm::Weighted => vnic_lb::policy::Algorithm::Weighted,
            Algorithm::Adaptive => vnic_lb::policy::Algorithm::Adaptive,
        }
    }
}

words! {
    /// How a worker waits when it finds nothing to do.
    PollMode {
        /// It never sleeps: lowest latency, a whole core.
        Busy = "busy",
        /// It spins a little, then arms notifications and sleeps.
        Adaptive = "adaptive",
    }
}

words! {
    /// What idle workers sleep in.
    SleepMode {
        /// io_uring where it is allowed, else epoll.
        Auto = "auto",
        /// epoll.
        Epoll = "epoll",
    }
}

words! {
    /// Whether AF_XDP sockets must be bound without copying.
    ZeroCopy {
        /// Where the driver can, else copy.
        Auto = "auto",
        /// Fail when the driver cannot.
        Require = "require",
        /// Always copy.
        Off = "off",
    }
}

words! {
    /// A switch.
    OnOff {
        /// Do it.
        On = "on",
        /// Do not.
        Off = "off",
    }
}

words! {
    /// Where the XDP program runs.
    AttachMode {
        /// In the driver where it can, else generic.
        Auto = "auto",
        /// In the driver, or fail.
        Native = "native",
        /// Generic (after the socket buffer is made).
        Skb = "skb",
    }
}

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Serve.
    Run(Box<Config>),
    /// Print [`capabilities_json`] and exit with 0, doing nothing else.
    PrintCapabilities,
}

/// Why there is no [`Action`].
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    /// `--help`, `--version`, or arguments that clap refused.
    #[error("{0}")]
    Clap(#[from] clap::Error),
    /// A file or a combination of options that was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Socket activation that contradicts itself.
    #[error(transparent)]
    Activation(#[from] ActivationError),
}

impl ArgsError {
    /// Prints the help, the version or the error where it belongs, and gives the exit code: 0 for help and version, 2 for
    /// everything else.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        match self {
            ArgsError::Clap(error) => {
                // Nothing can be done when stderr is closed.
                let _ = error.print();
                u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
            }
            ArgsError::Config(_) | ArgsError::Activation(_) => {
                eprintln!("vnicd: {self}");
                ExitCode::from(2)
            }
        }
    }
}

/// Reads the command line (the program's name first), the environment and, if one is named, the configuration file.
pub fn from_args<I, T>(args: I) -> Result<Action, ArgsError>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    resolve(
        args,
        std::env::var("LB_ALGORITHM").ok().filter(|word| !word.is_empty()),
        Activated::from_environment,
    )
}

/// [`from_args`] with the environment passed in, so that tests need not change the process's own.
fn resolve<I, T>(
    args: I,
    lb_algorithm: Option<String>,
    activated: impl FnOnce() -> Result<Activated, ActivationError>,
) -> Result<Action, ArgsError>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let cli = cli::Cli::try_parse_from(args)?;
    if cli.print_capabilities {
        return Ok(Action::PrintCapabilities);
    }
    let file = cli
        .config
        .as_deref()
        .map(file::read)
        .transpose()?
        .unwrap_or_default();
    let mut from_env = raw::Raw::default();
    if let Some(word) = lb_algorithm {
        from_env.lb = Some(raw::Given::new(word, "the environment variable LB_ALGORITHM"));
    }
    let raw = cli.into_raw()?.over(from_env).over(file);
    Ok(Action::Run(Box::new(check::check(raw, &activated()?)?)))
}

/// The answer to `--print-capabilities`, as QEMU's `vhost-user.json` has it (`VHostUserBackendCapabilities`; a backend
/// of type `net` has no optional features to name). One line without its end.
#[must_use]
pub fn capabilities_json() -> String {
    serde_json::json!({ "type": "net" }).to_string()
}
