//! The command line of `vnicd`.

use std::path::PathBuf;

use clap::Parser;

use super::error::ConfigError;
use super::options;
use super::raw::{Given, Raw};
use super::sessions::{FileLimits, FileTimeouts, Numbers};

const EXAMPLES: &str = "Examples:
  One guest over two NICs in one link aggregation group:
    vnicd --socket-path /run/vnic/vm.sock --nic eth1 --nic eth2 --topology lag
  Two guests, one with a fixed MAC, over one NIC:
    vnicd --port name=a,socket=/run/vnic/a.sock,mac=52:54:00:00:00:0a \\
          --port name=b,socket=/run/vnic/b.sock --nic eth1
  A local switch between two guests, without a NIC:
    vnicd --port name=a,socket=/run/vnic/a.sock --port name=b,socket=/run/vnic/b.sock
  QEMU's side of a port (vectors: two for each queue pair, and two):
    -accel kvm -cpu host -m 1G -smp 2
    -object memory-backend-memfd,id=ram,size=1G,share=on -machine memory-backend=ram
    -chardev socket,id=c0,path=/run/vnic/vm.sock,reconnect=1 -netdev vhost-user,id=n0,chardev=c0,queues=2
    -device virtio-net-pci,netdev=n0,mq=on,vectors=6
  Without KVM: -accel tcg, no -cpu, vectors=0 (QEMU 7.2 crashes there when a guest uses MSI-X with vhost-user).

Log: on stderr, by default at level info; RUST_LOG=debug (or vnic_backend=debug, warn, error) chooses another.
  error: something cannot do its job; warn: wrong, and survived; info: life cycle; debug: protocol messages.";

/// vhost-user backend for virtio-net: connects guests to AF_XDP sockets on up to eight host NICs and balances their
/// sessions over the NICs.
#[derive(Debug, Parser)]
#[command(name = "vnicd", version, after_help = EXAMPLES)]
pub(super) struct Cli {
    /// Unix socket of the only port, which is then named `port0`; its MAC is learned
    ///
    /// Excludes --fd and --port. Example: --socket-path /run/vnic/vm.sock
    #[arg(long, value_name = "PATH", help_heading = "Ports")]
    pub socket_path: Option<PathBuf>,

    /// Inherited descriptor of the only port's socket, listening or connected
    ///
    /// The port is then named `port0`. Excludes --socket-path and --port. Example: --fd 3
    #[arg(
        long,
        value_name = "FDNUM",
        allow_hyphen_values = true,
        help_heading = "Ports"
    )]
    pub fd: Option<i64>,

    /// One port: name=NAME,socket=PATH[,mac=MAC][,queues=N][,vlan=ID|,trunk=LIST]; may be repeated
    ///
    /// mac: the guest's address; without it, the first acceptable source address that the guest sends is learned and
    /// kept. queues: the most queue pairs that the guest may use, 1 to 8 [default: 8].
    /// vlan: the guest knows of no tags and is in this VLAN (an access port). trunk: only frames with these tags pass, as in
    /// trunk=10-20+30. Without either every frame passes as it is, with any tag or none.
    /// socket=activation: the socket comes from systemd under the port's name (FileDescriptorName=); with no port configured,
    /// each such socket is a port.
    /// Example: --port name=web,socket=/run/vnic/web.sock,mac=52:54:00:12:34:56,queues=2
    #[arg(long = "port", value_name = "OPTIONS", help_heading = "Ports")]
    pub ports: Vec<String>,

    /// One host NIC: IF[,id=ID][,queues=N][,set-channels=on][,zerocopy=MODE][,attach=MODE][,weight=W][,probe=TARGET]; up to 8 times
    ///
    /// id: stable name that sessions are keyed by [default: the interface's name]. queues: receive queues to drive
    /// [default: all]; all must be. set-channels: on gives the interface that many (as `ethtool -L` does) until vnicd ends
    /// [default: off]. zerocopy: auto, require or off [default: auto]. attach: auto, native or skb, how the XDP program is
    /// attached [default: auto]. weight: relative share of new sessions, 0 to 10000, 0 takes none [default: 1,
    /// or the link speed: see --lb]. probe: ask this station in the NIC's own network whether frames arrive, about once a millisecond while
    /// they move: an IPv4 or IPv6 address (ARP, neighbour solicitation), icmp:IPV4 (echo) or off; three without answer in a row and the NIC is
    /// left out while another one's are answered [default: off].
    /// Example: --nic eth1,id=left,zerocopy=require,weight=10
    #[arg(long = "nic", value_name = "IF[,OPTIONS]", help_heading = "NICs")]
    pub nics: Vec<String>,

    /// What the NICs are plugged into; must be given with two or more NICs [possible values: lag, pinned]
    ///
    /// lag: one link aggregation group (static LAG, LACP, MLAG, or ECMP): sessions are balanced. pinned: independent
    /// switch ports of one network: whole guests are balanced, each of their addresses has one NIC, and the network is
    /// told when that changes. Example: --topology lag
    #[arg(long, value_name = "TOPOLOGY", help_heading = "NICs")]
    pub topology: Option<String>,

    /// Which NIC a new session gets, or with --topology pinned a guest [possible values: hash, least_conn, weighted, adaptive]
    /// [default: hash] [env: LB_ALGORITHM]
    ///
    /// hash: by consistent hash of the session, the same again after a restart. least_conn: the NIC with the fewest
    /// sessions for its weight. weighted: by consistent hash, in proportion to the weights or, without any, to the link
    /// speeds. adaptive: the NIC with the lowest latency for its idle capacity; busy sessions are moved when they
    /// pause. Example: --lb least_conn
    #[arg(long, value_name = "ALGORITHM", help_heading = "NICs")]
    pub lb: Option<String>,

    /// Milliseconds that a carrier must last before its NIC takes sessions again, 0 to 60000 [default: 200]
    ///
    /// A switch's port is up before it forwards. Not waited for when no other NIC is alive. Example: --updelay 2000
    #[arg(long, value_name = "MS", allow_hyphen_values = true, help_heading = "NICs")]
    pub updelay: Option<i64>,

    /// Whether a NIC that fails again and again is left out until it is quiet, for 20 s at most: on or off [default: on]
    ///
    /// The third failure within some seconds leaves it out: a carrier lost, probes lost, frames that it does not send. Example: --flap-damping off
    #[arg(long, value_name = "ON|OFF", help_heading = "NICs")]
    pub flap_damping: Option<String>,

    /// Drive the NIC of the host's default route, which is refused otherwise
    #[arg(long, help_heading = "NICs")]
    pub allow_default_route_nic: bool,

    /// How workers wait: busy (a whole core each) or adaptive (they sleep when idle) [default: adaptive]
    ///
    /// Example: --poll busy
    #[arg(long, value_name = "MODE", help_heading = "Workers")]
    pub poll: Option<String>,

    /// What idle workers of --poll adaptive sleep in: auto (io_uring where it is allowed, else epoll) or epoll [default: auto]
    ///
    /// Which one it is, is logged at the start. Example: --sleep-in epoll
    #[arg(long, value_name = "MODE", help_heading = "Workers")]
    pub sleep_in: Option<String>,

    /// Datapath threads, 1 to 64 [default: one for each CPU of --cpus, else 1]
    ///
    /// Example: --workers 2
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Workers")]
    pub workers: Option<i64>,

    /// CPUs that workers are pinned to, one each, in order [default: not pinned]
    ///
    /// Example: --cpus 0,2-3
    #[arg(long, value_name = "LIST", help_heading = "Workers")]
    pub cpus: Option<String>,

    /// Sessions that the table holds, 1024 to 16777216; memory is taken at start, about 81 bytes each [default: 262144]
    ///
    /// Example: --sessions 1048576
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Memory")]
    pub sessions: Option<i64>,

    /// Frame memory in chunks of 4096 bytes, 1024 to 4194304 [default: computed from the NICs' queues and the ports]
    ///
    /// Example: --frames 65536
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Memory")]
    pub frames: Option<i64>,

    /// Idle times in seconds after which sessions are forgotten: KEY=SECONDS,..., each 1 to 2073600
    ///
    /// tcp-syn-s: nothing but a SYN was seen [default: 30]. tcp-one-way-s: more than a SYN, of one end only
    /// [default: 30]. tcp-established-s: both ends have spoken [default: 3600].
    /// tcp-closing-s: both ends sent FIN [default: 30]. tcp-reset-s: an RST was seen [default: 10]. udp-one-way-s,
    /// udp-two-way-s: one end has spoken, both have [default: 30, 120]. icmp-s: echo [default: 30]. fragment-s: the rest of
    /// a fragmented datagram [default: 30]. other-s: SCTP, ESP, GRE [default: 60].
    /// Example: --timeouts tcp-established-s=7200,udp-two-way-s=300
    #[arg(long, value_name = "LIST", help_heading = "Sessions")]
    pub timeouts: Option<String>,

    /// Most sessions of the kinds that strangers can make: KEY=N,..., each 0 to 16777216
    ///
    /// Frames beyond are forwarded without a session. half-open: TCP sessions before the end of their handshake, at most a
    /// quarter of --sessions [default: 131072]. new-per-second: sessions made in a second [default: 1000000]. fragments:
    /// fragmented datagrams under way, at most a sixteenth of --sessions [default: 65536].
    /// Example: --limits half-open=20000,new-per-second=50000
    #[arg(long, value_name = "LIST", help_heading = "Sessions")]
    pub limits: Option<String>,

    /// Unix socket for `vnic` and other tools [default: /run/vnic/control.sock]
    #[arg(long, value_name = "PATH", help_heading = "Daemon")]
    pub control: Option<PathBuf>,

    /// Folder for what outlives the daemon, such as the key of the session hash [default: /var/lib/vnic]
    #[arg(long, value_name = "DIR", help_heading = "Daemon")]
    pub state_dir: Option<PathBuf>,

    /// Folder in which each port keeps where its packed rings stand, for after a restart or crash [default: beside each socket]
    ///
    /// The file is the port's NAME.rings there, and PATH.rings beside a socket PATH; it is made when a guest with packed rings
    /// connects. Example: --ring-dir /run/vnic
    #[arg(long, value_name = "DIR", help_heading = "Daemon")]
    pub ring_dir: Option<PathBuf>,

    /// TOML file with the same names as these options; the command line wins
    ///
    /// Ports are tables [[port]] (name, socket, mac, queues, vlan, trunk) and NICs tables [[nic]] (name, id, queues,
    /// set-channels, zerocopy, attach, weight, probe); --timeouts and --limits are tables [timeouts] and [limits]. A port or a NIC on the command line replaces all of the file's. Example:
    /// --config /etc/vnic/vnicd.toml
    #[arg(long, value_name = "FILE", help_heading = "Daemon")]
    pub config: Option<PathBuf>,

    /// Print what this backend can do, as JSON for QEMU's tools, and exit
    #[arg(long, help_heading = "Daemon")]
    pub print_capabilities: bool,
}

impl Cli {
    /// Takes the `key=value` lists apart.
    pub fn into_raw(self) -> Result<Raw, ConfigError> {
        fn given<T>(value: Option<T>, option: &str) -> Option<Given<T>> {
            value.map(|value| Given::new(value, format!("`{option}`")))
        }
        fn numbers(
            option: &str,
            text: Option<&String>,
            keys: &'static [&'static str],
        ) -> Result<Numbers, ConfigError> {
            text.map_or_else(|| Ok(Numbers::new()), |text| options::numbers(option, text, keys))
        }
        Ok(Raw {
            timeouts: numbers("--timeouts", self.timeouts.as_ref(), FileTimeouts::KEYS)?,
            limits: numbers("--limits", self.limits.as_ref(), FileLimits::KEYS)?,
            socket_path: given(self.socket_path, "--socket-path"),
            fd: given(self.fd, "--fd"),
            ports: self
                .ports
                .iter()
                .map(|text| options::port(text))
                .collect::<Result<_, _>>()?,
            nics: self
                .nics
                .iter()
                .map(|text| options::nic(text))
                .collect::<Result<_, _>>()?,
            topology: given(self.topology, "--topology"),
            lb: given(self.lb, "--lb"),
            poll: given(self.poll, "--poll"),
            sleep_in: given(self.sleep_in, "--sleep-in"),
            workers: given(self.workers, "--workers"),
            cpus: given(self.cpus, "--cpus"),
            control: given(self.control, "--control"),
            state_dir: given(self.state_dir, "--state-dir"),
            ring_dir: given(self.ring_dir, "--ring-dir"),
            sessions: given(self.sessions, "--sessions"),
            frames: given(self.frames, "--frames"),
            updelay: given(self.updelay, "--updelay"),
            flap_damping: given(self.flap_damping, "--flap-damping"),
            allow_default_route_nic: self.allow_default_route_nic.then_some(true),
        })
    }
}
