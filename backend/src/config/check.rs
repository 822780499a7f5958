//! From what was written to what is meant: defaults, ranges, and rules that span several options.

use std::path::{Path, PathBuf};

use vnic_dataplane::fabric::vlan::{MAX_VLAN, VlanMode, VlanSet};
use vnic_lb::MAX_NICS;
use vnic_lb::mac::Mac;

use super::activation;
use super::error::ConfigError;
use super::raw::{Given, Raw, RawNic, RawPort};
use super::sessions;
use super::{
    Algorithm, AttachMode, Config, DEFAULT_CONTROL, DEFAULT_SESSIONS, DEFAULT_STATE_DIR, DEFAULT_UPDELAY_MS,
    Endpoint, MAX_PORTS, MAX_QUEUE_PAIRS, MAX_WORKERS, NicConfig, OnOff, PollMode, PortConfig, SleepMode,
    Topology, ZeroCopy,
};
use crate::host::activation::Activated;

/// Bytes of a Unix socket's path without its ending zero (`sun_path`, unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// Bytes of an interface's name without its ending zero (`IFNAMSIZ`).
const MAX_IFNAME: usize = 15;
const MAX_NAME: usize = 32;
/// More queues than any NIC has; what the interface itself has is checked against it later.
const MAX_NIC_QUEUES: u32 = 256;
/// Largest weight of a NIC.
pub const MAX_WEIGHT: u32 = 10_000;
/// Highest CPU number accepted (the kernel's CPU_SETSIZE).
const MAX_CPUS: usize = 1024;

/// Checks everything that can be checked without a look at the host.
pub(super) fn check(raw: Raw, activated: &Activated) -> Result<Config, ConfigError> {
    let control = raw
        .control
        .unwrap_or_else(|| Given::new(DEFAULT_CONTROL.into(), "the control socket"));
    check_socket_path("the control socket", &control.value)?;
    let ports = activation::ports(raw.socket_path, raw.fd, raw.ports, activated)?;
    if let Some(port) = ports
        .iter()
        .find(|port| port.endpoint == Endpoint::Socket(control.value.clone()))
    {
        return Err(ConfigError::ControlIsPort {
            port: port.name.clone(),
            path: control.value,
        });
    }
    let nics = nics(&raw.nics)?;
    if nics.is_empty() && ports.len() < 2 {
        return Err(ConfigError::NothingToConnect);
    }
    let topology = optional_word(raw.topology, Topology::from_word, Topology::WORDS)?;
    if nics.len() > 1 && topology.is_none() {
        return Err(ConfigError::NoTopology { count: nics.len() });
    }
    let (workers, cpus) = workers(raw.workers, raw.cpus)?;
    Ok(Config {
        ports,
        nics,
        topology,
        lb: optional_word(raw.lb, Algorithm::from_word, Algorithm::WORDS)?.unwrap_or(Algorithm::Hash),
        sleep_in: optional_word(raw.sleep_in, SleepMode::from_word, SleepMode::WORDS)?
            .unwrap_or(SleepMode::Auto),
        poll: optional_word(raw.poll, PollMode::from_word, PollMode::WORDS)?.unwrap_or(PollMode::Adaptive),
        workers,
        cpus,
        control: control.value,
        state_dir: raw
            .state_dir
            .map_or_else(|| DEFAULT_STATE_DIR.into(), |given| given.value),
        ring_dir: raw.ring_dir.map(|given| given.value),
        sessions: raw.sessions.map_or(Ok(DEFAULT_SESSIONS), |given| {
            in_range(given.value, 1024usize, 1 << 24, &given.origin)
        })?,
        timeouts: sessions::timeouts(&raw.timeouts)?,
        limits: sessions::limits(&raw.limits)?,
        frames: raw
            .frames
            .map(|given| in_range(given.value, 1024u32, 1 << 22, &given.origin))
            .transpose()?,
        updelay_ms: raw.updelay.map_or(Ok(DEFAULT_UPDELAY_MS), |given| {
            in_range(given.value, 0u32, 60_000, &given.origin)
        })?,
        flap_damping: optional_word(raw.flap_damping, OnOff::from_word, OnOff::WORDS)? != Some(OnOff::Off),
        allow_default_route_nic: raw.allow_default_route_nic.unwrap_or(false),
    })
}

pub(super) fn ports(
    socket_path: Option<Given<PathBuf>>,
    fd: Option<Given<i64>>,
    listed: &[RawPort],
    activated: &Activated,
) -> Result<Vec<PortConfig>, ConfigError> {
    let short = match (&socket_path, &fd) {
        (Some(_), Some(_)) => return Err(ConfigError::SocketPathAndFd),
        (Some(_), None) => Some("--socket-path"),
        (None, Some(_)) => Some("--fd"),
        (None, None) => None,
    };
    if let Some(short) = short {
        if !listed.is_empty() {
            return Err(ConfigError::ShortFormAndPort { short });
        }
        let origin = socket_path
            .as_ref()
            .map(|given| &given.origin)
            .or(fd.as_ref().map(|given| &given.origin));
        let only = RawPort {
            origin: origin.cloned().unwrap_or_default(),
            name: Some("port0".to_owned()),
            socket: socket_path.map(|given| given.value),
            fd: fd.map(|given| given.value),
            ..RawPort::default()
        };
        return Ok(vec![port(&only, activated)?]);
    }
    if listed.is_empty() {
        return Err(ConfigError::NoPort);
    }
    if listed.len() > MAX_PORTS {
        return Err(ConfigError::TooManyPorts {
            count: listed.len(),
            max: MAX_PORTS,
        });
    }
    let mut ports: Vec<PortConfig> = Vec::with_capacity(listed.len());
    for raw in listed {
        let new = port(raw, activated)?;
        for earlier in &ports {
            if earlier.name == new.name {
                return Err(ConfigError::DuplicatePortName { name: new.name });
            }
            let (first, second) = (earlier.name.clone(), new.name.clone());
            match (&earlier.endpoint, &new.endpoint) {
                (Endpoint::Socket(a), Endpoint::Socket(b)) if a == b => {
                    return Err(ConfigError::DuplicateSocket {
                        first,
                        second,
                        path: a.clone(),
                    });
                }
                _ => {}
            }
            let same_mac = new.mac == earlier.mac && !new.vlan.is_apart_from(&earlier.vlan);
            if let Some(mac) = new.mac.filter(|_| same_mac) {
                return Err(ConfigError::DuplicateMac { first, second, mac });
            }
        }
        ports.push(new);
    }
    Ok(ports)
}

fn port(raw: &RawPort, activated: &Activated) -> Result<PortConfig, ConfigError> {
    let origin = &raw.origin;
    let missing = |key, example| ConfigError::MissingKey {
        origin: origin.clone(),
        key,
        example,
    };
    let name = raw.name.clone().ok_or_else(|| missing("name", "vm"))?;
    if !is_name(&name, b"_.-") {
        return Err(ConfigError::BadPortName {
            origin: origin.clone(),
            name,
        });
    }
    let endpoint = match (&raw.socket, raw.fd) {
        (Some(path), _) if path.as_os_str() == activation::WORD => activation::endpoint(&name, activated)?,
        (Some(path), _) => {
            check_socket_path(&format!("port `{name}`"), path)?;
            Endpoint::Socket(path.clone())
        }
        (None, Some(fd)) => Endpoint::Fd(in_range(fd, 3, i32::MAX, origin)?),
        (None, None) => return Err(missing("socket", "/run/vnic/vm.sock")),
    };
    Ok(PortConfig {
        name,
        endpoint,
        mac: raw
            .mac
            .as_deref()
            .map(|text| station_mac(text, origin))
            .transpose()?,
        queue_pairs: raw.queues.map_or(Ok(MAX_QUEUE_PAIRS), |count| {
            in_range(count, 1, MAX_QUEUE_PAIRS, &format!("`queues` in {origin}"))
        })?,
        vlan: vlan_mode(raw)?,
    })
}

fn vlan_mode(raw: &RawPort) -> Result<VlanMode, ConfigError> {
    let origin = &raw.origin;
    match (raw.vlan, &raw.trunk) {
        (None, None) => Ok(VlanMode::Transparent),
        (Some(id), None) => in_range(id, 1, MAX_VLAN, &format!("`vlan` in {origin}")).map(VlanMode::Access),
        (None, Some(list)) => vlan_list(list)
            .map(VlanMode::Trunk)
            .ok_or_else(|| ConfigError::BadTrunk {
                origin: origin.clone(),
                list: list.clone(),
            }),
        (Some(_), Some(_)) => Err(ConfigError::VlanAndTrunk {
            origin: origin.clone(),
        }),
    }
}

/// `10-20+30`.
fn vlan_list(text: &str) -> Option<VlanSet> {
    let id = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse()
            .ok()
            .filter(|id| digits && (1..=MAX_VLAN).contains(id))
    };
    let mut ids: Vec<u16> = Vec::new();
    for item in text.split('+') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last) = (id(first)?, id(last)?);
        if first > last {
            return None;
        }
        ids.extend(first..=last);
    }
    Some(VlanSet::new(ids))
}

fn station_mac(text: &str, origin: &str) -> Result<Mac, ConfigError> {
    let mac: Mac = text.parse().map_err(|source| ConfigError::BadMac {
        origin: origin.to_owned(),
        source,
    })?;
    let kind = if mac.is_zero() {
        "all zero"
    } else if mac == Mac::BROADCAST {
        "the broadcast address"
    } else if mac.is_group() {
        "a multicast address"
    } else {
        return Ok(mac);
    };
    Err(ConfigError::NotAStationMac {
        origin: origin.to_owned(),
        mac,
        kind,
    })
}

fn nics(listed: &[RawNic]) -> Result<Vec<NicConfig>, ConfigError> {
    if listed.len() > MAX_NICS {
        return Err(ConfigError::TooManyNics { count: listed.len() });
    }
    let mut nics: Vec<NicConfig> = Vec::with_capacity(listed.len());
    for raw in listed {
        let new = nic(raw)?;
        for earlier in &nics {
            if earlier.ifname == new.ifname {
                return Err(ConfigError::DuplicateNic { ifname: new.ifname });
            }
            if earlier.id == new.id {
                return Err(ConfigError::DuplicateNicId {
                    first: earlier.ifname.clone(),
                    second: new.ifname,
                    id: new.id,
                });
            }
        }
        nics.push(new);
    }
    if !nics.is_empty() && nics.iter().all(|nic| nic.weight == Some(0)) {
        return Err(ConfigError::NoWeight);
    }
    Ok(nics)
}

pub(super) fn nic(raw: &RawNic) -> Result<NicConfig, ConfigError> {
    let origin = &raw.origin;
    let ifname = raw.ifname.clone().ok_or_else(|| ConfigError::MissingKey {
        origin: origin.clone(),
        key: "name",
        example: "eth1",
    })?;
    // What the kernel's dev_valid_name() refuses; `..` would also leave the folder in sysfs.
    let bad =
        |byte: u8| byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte.is_ascii_control();
    if ifname.is_empty()
        || ifname.len() > MAX_IFNAME
        || ifname == "."
        || ifname == ".."
        || ifname.bytes().any(bad)
    {
        return Err(ConfigError::BadInterfaceName {
            origin: origin.clone(),
            ifname,
        });
    }
    let id = raw.id.clone().unwrap_or_else(|| ifname.clone());
    if raw.id.is_some() && !is_name(&id, b"_.@:-") {
        return Err(ConfigError::BadNicId {
            origin: origin.clone(),
            id,
        });
    }
    let word = |key: &str, value: &Option<String>| {
        value
            .clone()
            .map(|value| Given::new(value, format!("`{key}` in {origin}")))
    };
    let set_channels = optional_word(
        word("set-channels", &raw.set_channels),
        OnOff::from_word,
        OnOff::WORDS,
    )? == Some(OnOff::On);
    if set_channels && raw.queues.is_none() {
        return Err(ConfigError::SetChannelsWithoutQueues {
            origin: origin.clone(),
        });
    }
    Ok(NicConfig {
        set_channels,
        queues: raw
            .queues
            .map(|count| in_range(count, 1, MAX_NIC_QUEUES, &format!("`queues` in {origin}")))
            .transpose()?,
        zerocopy: optional_word(
            word("zerocopy", &raw.zerocopy),
            ZeroCopy::from_word,
            ZeroCopy::WORDS,
        )?
        .unwrap_or(ZeroCopy::Auto),
        attach: optional_word(
            word("attach", &raw.attach),
            AttachMode::from_word,
            AttachMode::WORDS,
        )?
        .unwrap_or(AttachMode::Auto),
        probe: raw
            .probe
            .as_deref()
            .map_or(Ok(None), super::probe_of)
            .map_err(|source| ConfigError::BadProbe {
                origin: origin.clone(),
                source,
            })?,
        weight: raw
            .weight
            .map(|weight| in_range(weight, 0, MAX_WEIGHT, &format!("`weight` in {origin}")))
            .transpose()?,
        ifname,
        id,
    })
}

fn workers(
    workers: Option<Given<i64>>,
    cpus: Option<Given<String>>,
) -> Result<(usize, Vec<usize>), ConfigError> {
    let asked = workers
        .map(|given| in_range(given.value, 1usize, MAX_WORKERS, &given.origin))
        .transpose()?;
    let Some(cpus) = cpus else {
        return Ok((asked.unwrap_or(1), Vec::new()));
    };
    let list = cpu_list(&cpus.value, &cpus.origin)?;
    let count = asked.unwrap_or(list.len().min(MAX_WORKERS));
    if count != list.len() {
        return Err(ConfigError::CpusDoNotMatch {
            workers: count,
            cpus: list.len(),
        });
    }
    Ok((count, list))
}

/// `0,2-3` in the order given.
fn cpu_list(text: &str, what: &str) -> Result<Vec<usize>, ConfigError> {
    let bad = || ConfigError::BadCpuList {
        what: what.to_owned(),
        list: text.to_owned(),
    };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<usize>()
            .ok()
            .filter(|cpu| digits && *cpu < MAX_CPUS)
            .ok_or_else(bad)
    };
    let mut cpus = Vec::new();
    for item in text.split(',') {
        let (first, last) = match item.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(item)?, number(item)?),
        };
        if first > last {
            return Err(bad());
        }
        for cpu in first..=last {
            if cpus.contains(&cpu) {
                return Err(ConfigError::DuplicateCpu {
                    what: what.to_owned(),
                    cpu,
                });
            }
            cpus.push(cpu);
        }
    }
    Ok(cpus)
}

fn optional_word<T>(
    given: Option<Given<String>>,
    from_word: fn(&str) -> Option<T>,
    words: &[&str],
) -> Result<Option<T>, ConfigError> {
    let Some(given) = given else { return Ok(None) };
    match from_word(&given.value) {
        Some(meaning) => Ok(Some(meaning)),
        None => Err(ConfigError::NotAWord {
            what: given.origin,
            value: given.value,
            allowed: words.join(", "),
        }),
    }
}

pub(super) fn in_range<T>(value: i64, min: T, max: T, what: &str) -> Result<T, ConfigError>
where
    T: TryFrom<i64> + TryInto<i64> + PartialOrd + Copy,
{
    T::try_from(value)
        .ok()
        .filter(|small| *small >= min && *small <= max)
        .ok_or_else(|| ConfigError::OutOfRange {
            what: what.to_owned(),
            value,
            min: min.try_into().unwrap_or(i64::MIN),
            max: max.try_into().unwrap_or(i64::MAX),
        })
}

fn is_name(text: &str, also: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || also.contains(&byte))
}

fn check_socket_path(what: &str, path: &Path) -> Result<(), ConfigError> {
    let length = path.as_os_str().len();
    if length == 0 {
        return Err(ConfigError::PathEmpty {
            what: what.to_owned(),
        });
    }
    if length > MAX_SOCKET_PATH {
        return Err(ConfigError::PathTooLong {
            what: what.to_owned(),
            path: path.to_owned(),
            length,
            max: MAX_SOCKET_PATH,
        });
    }
    Ok(())
}
