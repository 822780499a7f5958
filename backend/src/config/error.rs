//! What can be wrong with a configuration, told so that it can be put right.

use std::io;
use std::path::PathBuf;

use vnic_dataplane::probe::ProbeTargetError;
use vnic_lb::MAX_NICS;
use vnic_lb::mac::{Mac, MacParseError};

/// A configuration that was refused: the thing, the cause and the cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text says what it and its fields are")]
pub enum ConfigError {
    #[error(
        "no port is configured: give `--socket-path /run/vnic/vm.sock` for one guest, or \
         `--port name=vm,socket=/run/vnic/vm.sock` once for each guest, or start vnicd through .socket units"
    )]
    NoPort,
    #[error(
        "`--socket-path` and `--fd` exclude each other: both say where the one port is; give only one of them"
    )]
    SocketPathAndFd,
    #[error(
        "`{short}` and `--port` exclude each other: `{short}` is the short form for a single port; \
         give every port as `--port name=NAME,socket=PATH`"
    )]
    ShortFormAndPort { short: &'static str },
    #[error("{origin} gives no interface: the first item is its name, as in `--nic eth1,weight=2`")]
    NicWithoutName { origin: String },
    #[error("{origin}: `set-channels=on` needs the number of queues to set: add `queues=N`")]
    SetChannelsWithoutQueues { origin: String },
    #[error("{origin} has no `{key}`: add `{key}={example}`")]
    MissingKey {
        origin: String,
        key: &'static str,
        example: &'static str,
    },
    #[error("unknown key `{key}` in {origin}: the keys are {allowed}")]
    UnknownKey {
        origin: String,
        key: String,
        allowed: String,
    },
    #[error("`{key}` is given twice in {origin}: give it once")]
    RepeatedKey { origin: String, key: String },
    #[error("`{item}` in {origin} is not KEY=VALUE: the keys are {allowed}")]
    NotKeyValue {
        origin: String,
        item: String,
        allowed: String,
    },
    #[error("`{value}` for {what} is not a whole number")]
    NotANumber { what: String, value: String },
    #[error("{value} for {what} is out of range: give {min} to {max}")]
    OutOfRange {
        what: String,
        value: i64,
        min: i64,
        max: i64,
    },
    #[error("`{value}` is not a possible value of {what}: give {allowed}")]
    NotAWord {
        what: String,
        value: String,
        allowed: String,
    },
    #[error("`{name}` cannot be the name of a port ({origin}): use 1 to 32 letters, digits, `_`, `.` or `-`")]
    BadPortName { origin: String, name: String },
    #[error(
        "`{id}` cannot be the id of a NIC ({origin}): use 1 to 32 letters, digits, `_`, `.`, `@`, `:` or `-`"
    )]
    BadNicId { origin: String, id: String },
    #[error("`probe` in {origin}: {source}")]
    BadProbe {
        origin: String,
        source: ProbeTargetError,
    },
    #[error(
        "`{ifname}` cannot be the name of an interface ({origin}): a name has 1 to 15 bytes, none of them `/` or space"
    )]
    BadInterfaceName { origin: String, ifname: String },
    #[error("{origin}: {source}")]
    BadMac { origin: String, source: MacParseError },
    #[error(
        "{mac} cannot be a guest's MAC ({origin}): it is {kind}; \
         use a unicast address such as 52:54:00:12:34:56"
    )]
    NotAStationMac {
        origin: String,
        mac: Mac,
        kind: &'static str,
    },
    #[error(
        "{origin} has `vlan` and `trunk`: give `vlan` for a guest that knows of no tags, `trunk` for one that tags its \
         frames itself"
    )]
    VlanAndTrunk { origin: String },
    #[error(
        "`{list}` for `trunk` in {origin} is not a list of VLANs: write ids from 1 to 4094 and ranges of them with `+` between, \
         as in 10-20+30"
    )]
    BadTrunk { origin: String, list: String },
    #[error(
        "port `{port}` has `socket=activation`, but no socket was handed over under that name ({found}): start vnicd through \
         a .socket unit with `FileDescriptorName={port}` (such as vnicd@{port}.socket), or give the port a path"
    )]
    NotActivated { port: String, found: String },
    #[error(
        "a socket was handed over under the name `{name}`, but no port of that name has `socket=activation` \
         (those that have: {ports}): stop and disable its .socket unit, or add `--port name={name},socket=activation`"
    )]
    UnexpectedSocket { name: String, ports: String },
    #[error(
        "two sockets were handed over under the name `{name}`, and a port has one: a .socket unit gives all its \
         `ListenStream=` the same name, so use one unit for each port (such as vnicd@{name}.socket)"
    )]
    DuplicateActivated { name: String },
    #[error("two ports are named `{name}`: give each its own name")]
    DuplicatePortName { name: String },
    #[error("ports `{first}` and `{second}` have the same socket {}: give each its own path", .path.display())]
    DuplicateSocket {
        first: String,
        second: String,
        path: PathBuf,
    },
    #[error(
        "ports `{first}` and `{second}` have the same MAC {mac}: give each guest its own address, or access to a VLAN of its own"
    )]
    DuplicateMac { first: String, second: String, mac: Mac },
    #[error("port `{port}` and the control socket have the same path {}: give one of them another", .path.display())]
    ControlIsPort { port: String, path: PathBuf },
    #[error(
        "{count} ports are configured, and one daemon serves at most {max}: start a second daemon for the rest"
    )]
    TooManyPorts { count: usize, max: usize },
    #[error("{count} NICs are configured, and one daemon drives at most {MAX_NICS}: leave {} out", .count - MAX_NICS)]
    TooManyNics { count: usize },
    #[error("NIC {ifname} is given twice: give each interface once")]
    DuplicateNic { ifname: String },
    #[error(
        "NICs {first} and {second} have the same id `{id}`, and sessions are keyed by it: \
         give each its own `id=`"
    )]
    DuplicateNicId {
        first: String,
        second: String,
        id: String,
    },
    #[error(
        "every NIC has weight 0, so that no NIC would take a session: give at least one a weight of 1 or more"
    )]
    NoWeight,
    #[error(
        "{count} NICs need `--topology`, since what they are plugged into decides what may be balanced: \
         add `--topology lag` if all their links belong to one link aggregation group of the switch, or \
         `--topology pinned` if they are plugged into independent switch ports"
    )]
    NoTopology { count: usize },
    #[error(
        "one port and no NIC: its guest could reach nobody; add a NIC with `--nic IF`, \
         or a second port for a switch between two guests"
    )]
    NothingToConnect,
    #[error(
        "the path of {what} has {length} bytes and a Unix socket's path at most {max} ({}): \
         use a shorter one, such as /run/vnic/vm.sock", .path.display())]
    PathTooLong {
        what: String,
        path: PathBuf,
        length: usize,
        max: usize,
    },
    #[error("the path of {what} is empty: give one, such as /run/vnic/vm.sock")]
    PathEmpty { what: String },
    #[error("`{list}` for {what} is not a list of CPUs: write numbers and ranges, as in 0,2-3")]
    BadCpuList { what: String, list: String },
    #[error("CPU {cpu} is named twice in {what}: a worker needs one to itself")]
    DuplicateCpu { what: String, cpu: usize },
    #[error(
        "{workers} workers and {cpus} CPUs do not match: name one CPU for each worker, \
         or leave `--workers` out to get one for each CPU"
    )]
    CpusDoNotMatch { workers: usize, cpus: usize },
    #[error("cannot read the configuration file {}: {source}", .path.display())]
    FileUnreadable { path: PathBuf, source: io::Error },
    #[error("{}, line {line}: {message}", .path.display())]
    FileSyntax {
        path: PathBuf,
        line: usize,
        message: String,
    },
}
