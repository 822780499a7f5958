//! The XDP program: loading, attaching, and its maps.
//!
//! The program is attached by a BPF link, which the kernel takes away with the process that holds it, however that ends. The
//! object is compiled from `dataplane/bpf/vnic.bpf.c` and kept in git; `scripts/build-bpf.sh --check` compares them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError as AyaError, Xdp, XdpMode};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use crate::probe::{Answers, ProbeTarget, expected};

static OBJECT: &[u8] = aya::include_bytes_aligned!("../bpf/vnic.bpf.o");

/// How to attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttachMode {
    /// In the driver if it can, else generic.
    #[default]
    Auto,
    /// In the driver, or an error.
    Native,
    /// Generic: after the driver has made an skb. Works everywhere, slower, copy mode only.
    Skb,
}

/// Frames that the program saw, over all CPUs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ProgramCounters {
    /// Frames to guests' addresses, redirected to sockets.
    pub redirected: u64,
    /// Frames passed to the host.
    pub passed: u64,
}

/// The program on one NIC. Dropping it detaches it.
pub struct Program {
    guest_macs: HashMap<MapData, [u8; 8], u32>,
    sockets: XskMap<MapData>,
    stats: PerCpuArray<MapData, u64>,
    probes: HashMap<MapData, [u8; 8], [u8; 20]>,
    answers: Arc<Answers>,
    mode: AttachMode,
    // Last: the maps' handles go first, the program with its link.
    _link: FdLink,
    _program: Ebpf,
}

/// Why the program cannot be loaded or attached, or a map not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Privileges are missing.
    #[error(
        "not permitted to load an XDP program for {ifname}: run as root, or give CAP_BPF and CAP_NET_ADMIN"
    )]
    NoPrivilege {
        /// Interface.
        ifname: String,
        /// EPERM.
        source: io::Error,
    },
    /// The kernel refuses the program.
    #[error("cannot load the XDP program for {ifname}: {reason} (Linux 5.18 or later is needed)")]
    Load {
        /// Interface.
        ifname: String,
        /// What the loader says, causes included.
        reason: String,
    },
    /// Somebody else's program is there.
    #[error(
        "another XDP program is attached to {ifname}: stop the program that owns it, or detach it with `ip link set dev {ifname} xdp off`"
    )]
    ForeignProgram {
        /// Interface.
        ifname: String,
        /// EBUSY or EEXIST.
        source: io::Error,
    },
    /// The interface is gone.
    #[error("there is no interface {ifname} (index {ifindex}): see `ip link`")]
    NoInterface {
        /// Interface.
        ifname: String,
        /// Its index.
        ifindex: u32,
        /// ENODEV.
        source: io::Error,
    },
    /// The driver cannot run it.
    #[error("cannot attach the XDP program to {ifname} in {mode} mode: {source}; try attach={other}")]
    Attach {
        /// Interface.
        ifname: String,
        /// `native` or `skb`.
        mode: &'static str,
        /// The other of the two.
        other: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A map could not be changed or read.
    #[error("the XDP program's map {map} on NIC queue or address {key}: {reason}")]
    Map {
        /// The map.
        map: &'static str,
        /// The key.
        key: String,
        /// What the loader says, causes included.
        reason: String,
    },
}

impl Program {
    /// Loads a program of its own for this interface and attaches it.
    ///
    /// # Errors
    ///
    /// See [`ProgramError`].
    pub fn attach(ifindex: u32, ifname: &str, mode: AttachMode) -> Result<Program, ProgramError> {
        let load = |reason: &(dyn std::error::Error + 'static)| load_error(ifname, reason);
        let missing = || ProgramError::Load {
            ifname: ifname.to_owned(),
            reason: "the embedded object lacks a part".to_owned(),
        };
        let mut ebpf = Ebpf::load(OBJECT).map_err(|error| load(&error))?;
        let guest_macs = HashMap::try_from(ebpf.take_map("guest_macs").ok_or_else(missing)?);
        let sockets = XskMap::try_from(ebpf.take_map("xsks").ok_or_else(missing)?);
        let stats = PerCpuArray::try_from(ebpf.take_map("stats").ok_or_else(missing)?);
        let probes = HashMap::try_from(ebpf.take_map("probes").ok_or_else(missing)?);
        let answers = Array::try_from(ebpf.take_map("answers").ok_or_else(missing)?);
        let program = ebpf.program_mut("vnic").ok_or_else(missing)?;
        let xdp: &mut Xdp = program.try_into().map_err(|error: AyaError| load(&error))?;
        xdp.load().map_err(|error| load(&error))?;
        let (link, mode) = attach(xdp, ifindex, ifname, mode)?;
        Ok(Program {
            guest_macs: guest_macs.map_err(|error| load(&error))?,
            sockets: sockets.map_err(|error| load(&error))?,
            stats: stats.map_err(|error| load(&error))?,
            probes: probes.map_err(|error| load(&error))?,
            answers: Arc::new(Answers::new(answers.map_err(|error| load(&error))?)),
            mode,
            _link: link,
            _program: ebpf,
        })
    }

    /// How it is attached: [`AttachMode::Native`] or [`AttachMode::Skb`].
    #[must_use]
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Redirects frames to this address from now on. At most 1024 addresses.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`] when there are too many.
    pub fn allow_mac(&mut self, mac: Mac) -> Result<(), ProgramError> {
        self.guest_macs
            .insert(key(mac), 1, 0)
            .map_err(|error| map_error("guest_macs", &mac, &error))
    }

    /// Passes frames to this address to the host again. Forgetting what was not allowed is no error.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`].
    pub fn forget_mac(&mut self, mac: Mac) -> Result<(), ProgramError> {
        match self.guest_macs.remove(&key(mac)) {
            Err(error) if !is_missing(&error) => Err(map_error("guest_macs", &mac, &error)),
            _ => Ok(()),
        }
    }

    /// Gives the frames of a queue (0 to 63) to a socket that is bound to it. The kernel takes the entry away when the socket closes.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`].
    pub fn set_socket(&mut self, queue: u32, socket: impl AsFd) -> Result<(), ProgramError> {
        let fd = socket.as_fd().as_raw_fd();
        self.sockets
            .set(queue, fd, 0)
            .map_err(|error| map_error("xsks", &queue, &error))
    }

    /// Counts answers of `target` that arrive here for `asker`, the address of NIC `nic`, from now on. At most one NIC has an
    /// address.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`] when there are too many.
    pub fn expect_answers(
        &mut self,
        asker: Mac,
        nic: NicIndex,
        target: ProbeTarget,
    ) -> Result<(), ProgramError> {
        self.probes
            .insert(key(asker), expected(nic, target.mapped()), 0)
            .map_err(|error| map_error("probes", &asker, &error))
    }

    /// Counts no more answers for this address. Forgetting what was not expected is no error.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`].
    pub fn expect_no_answers(&mut self, asker: Mac) -> Result<(), ProgramError> {
        match self.probes.remove(&key(asker)) {
            Err(error) if !is_missing(&error) => Err(map_error("probes", &asker, &error)),
            _ => Ok(()),
        }
    }

    /// What was counted of that, to be looked at from any thread.
    #[must_use]
    pub fn answers(&self) -> Arc<Answers> {
        Arc::clone(&self.answers)
    }

    /// Counters since it was attached.
    ///
    /// # Errors
    ///
    /// [`ProgramError::Map`].
    pub fn counters(&self) -> Result<ProgramCounters, ProgramError> {
        let total = |index: u32| {
            let values = self
                .stats
                .get(&index, 0)
                .map_err(|error| map_error("stats", &index, &error))?;
            Ok(values.iter().sum())
        };
        Ok(ProgramCounters {
            redirected: total(0)?,
            passed: total(1)?,
        })
    }
}

fn load_error(ifname: &str, error: &(dyn std::error::Error + 'static)) -> ProgramError {
    let ifname = ifname.to_owned();
    match os_error(error) {
        Some(source) if is(&source, &[libc::EPERM, libc::EACCES]) => {
            ProgramError::NoPrivilege { ifname, source }
        }
        _ => ProgramError::Load {
            ifname,
            reason: with_causes(error),
        },
    }
}

/// Tries the modes that the caller allows, best first.
fn attach(
    xdp: &mut Xdp,
    ifindex: u32,
    ifname: &str,
    mode: AttachMode,
) -> Result<(FdLink, AttachMode), ProgramError> {
    if mode != AttachMode::Skb {
        match attach_as(xdp, ifindex, XdpMode::Driver) {
            Ok(link) => return Ok((link, AttachMode::Native)),
            Err(source) if mode == AttachMode::Native || is_final(&source) => {
                return Err(attach_error(ifindex, ifname, AttachMode::Native, source));
            }
            Err(source) => {
                tracing::debug!(ifname, %source, "no native XDP, falling back to generic");
            }
        }
    }
    match attach_as(xdp, ifindex, XdpMode::Skb) {
        Ok(link) => Ok((link, AttachMode::Skb)),
        Err(source) => Err(attach_error(ifindex, ifname, AttachMode::Skb, source)),
    }
}

fn attach_as(xdp: &mut Xdp, ifindex: u32, mode: XdpMode) -> Result<FdLink, io::Error> {
    let as_io = |error: AyaError| os_error(&error).unwrap_or_else(|| io::Error::other(with_causes(&error)));
    let id = xdp.attach_to_if_index(ifindex, mode).map_err(as_io)?;
    let link = xdp.take_link(id).map_err(as_io)?;
    // The loader falls back to netlink, which would leave the program on the NIC after kill -9. Dropping that link detaches it.
    FdLink::try_from(link)
        .map_err(|_| io::Error::other("the kernel has no BPF links for XDP (5.9 or later has)"))
}

/// Errors that another mode would not mend.
fn is_final(error: &io::Error) -> bool {
    is(
        error,
        &[libc::EBUSY, libc::EEXIST, libc::EPERM, libc::EACCES, libc::ENODEV],
    )
}

fn attach_error(ifindex: u32, ifname: &str, mode: AttachMode, source: io::Error) -> ProgramError {
    let ifname = ifname.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => ProgramError::ForeignProgram { ifname, source },
        Some(libc::EPERM | libc::EACCES) => ProgramError::NoPrivilege { ifname, source },
        Some(libc::ENODEV) => ProgramError::NoInterface {
            ifname,
            ifindex,
            source,
        },
        _ => {
            let (mode, other) = if mode == AttachMode::Native {
                ("native", "skb")
            } else {
                ("skb", "native")
            };
            ProgramError::Attach {
                ifname,
                mode,
                other,
                source,
            }
        }
    }
}

fn key(mac: Mac) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac.0;
    [a, b, c, d, e, f, 0, 0]
}

fn map_error(map: &'static str, key: &dyn std::fmt::Display, error: &dyn std::error::Error) -> ProgramError {
    ProgramError::Map {
        map,
        key: key.to_string(),
        reason: with_causes(error),
    }
}

fn is_missing(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref()
        .is_some_and(|error| matches!(error, aya::maps::MapError::KeyNotFound))
        || os_error(error).is_some_and(|error| is(&error, &[libc::ENOENT]))
}

fn is(error: &io::Error, codes: &[i32]) -> bool {
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// The system error at the bottom of a chain of causes.
fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(io::Error::from_raw_os_error(code));
        }
        next = error.source();
    }
    None
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}
