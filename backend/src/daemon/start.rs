//! Setting the daemon up, in the order in which its parts need one another.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing::info;
use vnic_dataplane::engine::{Engine, EngineConfig, Poll, SleepIn};
use vnic_dataplane::fabric::{Nic, NicState, PortIndex, PortState, VlanMode};
use vnic_dataplane::memory::frames::{CHUNK_SIZE, ChunkCache, FrameMemory};
use vnic_dataplane::memory::guest;
use vnic_dataplane::virtq::prepare_to_signal;
use vnic_lb::MAX_NICS;
use vnic_lb::balancer::{Balancer, BalancerConfig};
use vnic_lb::health::HealthConfig;
use vnic_lb::mac::Mac;
use vnic_lb::nics::{NicIndex, NicInfo};
use vnic_lb::pinned::Stations;

use super::cursors::Cursors;
use super::drive::{self, Checked, Drive};
use super::events::{Events, Source};
use super::health::HealthThread;
use super::journal::Journal;
use super::keeper::Keeper;
use super::links::HostLinks;
use super::nic::NicRuntime;
use super::pinned::Pinning;
use super::port::{Entrance, PortRuntime};
use super::probes::Addresses;
use super::rarp::Rarps;
use super::stall::StallWatch;
use super::{Daemon, stall, uplinks};
use crate::config::{Config, Endpoint, PollMode, PortConfig, SleepMode, Topology};
use crate::control::server::Server;
use crate::host::activation::{Handed, Origin, PortSocket};
use crate::host::{activation, cpus, hash_key, kernel, memory, privileges, socket};
use crate::vhost::{Device, DeviceConfig, QueueNum};

/// Chunks that a worker and the hand-off rings may hold beyond what NIC rings do.
const CHUNKS_PER_WORKER: u32 = 2048;

impl Daemon {
    /// Sets everything up; whatever cannot be had is an error that says what to do.
    pub fn start(config: Config) -> Result<Daemon> {
        // Descriptors handed over are taken before this process opens any of its own.
        let entrances = config
            .ports
            .iter()
            .map(open_entrance)
            .collect::<Result<Vec<_>>>()?;
        cpus::check(&config.cpus)?;
        if !config.nics.is_empty() {
            kernel::check_af_xdp()?;
            if let Some(lacking) = kernel::lacks() {
                tracing::info!("{lacking}");
            }
        }
        // Blocked before any thread starts, so that all inherit it and only the signalfd hears of them.
        let mask: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        mask.thread_block().context("cannot block SIGTERM and SIGINT")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("cannot make a signalfd")?;

        let mut interfaces = drive::check_all(&config)?;
        let frames = config
            .frames
            .unwrap_or_else(|| default_frames(&config, &interfaces));
        if !config.nics.is_empty() {
            let queues = interfaces.iter().map(|nic| u64::from(nic.queues)).sum();
            privileges::check(drive::locked_bytes(queues, frames))?;
        }
        memory::check(u64::from(frames) * CHUNK_SIZE as u64)?;
        let control = Server::bind(&config.control)?;
        let links = match HostLinks::open() {
            Ok(links) => Some(links),
            // A local switch can do without, until it is to have a NIC.
            Err(error) if config.nics.is_empty() => {
                tracing::debug!("cannot hear of changes of the host's interfaces: {error}");
                None
            }
            Err(error) => return Err(error).context("cannot hear of changes of the host's interfaces"),
        };
        if let Some(links) = links.as_ref().filter(|_| !config.nics.is_empty()) {
            links.check(&config.ports)?;
        }
        let mut channels = Vec::new();
        for (nic, checked) in config.nics.iter().zip(&mut interfaces) {
            channels.push(checked.set_channels(nic)?);
        }
        let memory = FrameMemory::new(frames)?;
        if !memory.on_huge_pages() {
            info!(
                "frame memory lies on ordinary pages, which is slower: fewer than {} huge pages of 2 MiB are free",
                huge_pages(frames)
            );
        }
        let hash_key = match config.nics.is_empty() {
            // Nothing is balanced, so nothing needs to be kept.
            true => [0; 16],
            false => hash_key::load_or_create(&config.state_dir)?,
        };
        let balancer = Balancer::new(&BalancerConfig {
            nics: config
                .nics
                .iter()
                .map(|nic| NicInfo {
                    id: nic.id.clone(),
                    weight: nic.weight,
                })
                .collect(),
            algorithm: config.lb.policy(),
            session_capacity: match config.topology {
                // Stations decide there, and no session is ever made.
                Some(Topology::Pinned) => 1,
                _ => config.sessions,
            },
            workers: config.workers,
            timeouts: config.timeouts,
            limits: config.limits,
            hash_key,
        });
        let engine_config = EngineConfig {
            workers: config.workers,
            cpus: config.cpus.clone(),
            poll: match config.poll {
                PollMode::Busy => Poll::Busy,
                PollMode::Adaptive => Poll::Adaptive,
            },
            sleep_in: match config.sleep_in {
                SleepMode::Auto => SleepIn::Auto,
                SleepMode::Epoll => SleepIn::Epoll,
            },
        };
        let nics = open_nics(&config, interfaces, channels, &memory)?;
        for nic in &nics {
            // It is there: it was given at the start.
            let _ = balancer.set_link_speed(nic.index(), nic.interface.speed_mbps);
        }
        prepare_to_signal();
        let stations = (config.topology == Some(Topology::Pinned))
            .then(|| Arc::new(Stations::new(Arc::clone(&balancer))));
        let engine = match &stations {
            Some(stations) => Engine::start_pinned(&engine_config, Arc::clone(&memory), Arc::clone(stations)),
            None => Engine::start(&engine_config, Arc::clone(&memory), Arc::clone(&balancer)),
        }?;
        let mut health_config = HealthConfig {
            updelay_ms: config.updelay_ms,
            stall_ms: stall::STALL_MS,
            ..HealthConfig::default()
        };
        if !config.flap_damping {
            health_config.flap.suppress = f64::INFINITY;
        }
        let watched = uplinks::first_watch(&nics)?;
        let health = HealthThread::start(
            health_config,
            watched,
            Arc::clone(&balancer),
            stations.clone(),
            engine.watcher(),
            &memory,
        )
        .context("cannot start the thread that watches the NICs")?;
        let started = Instant::now();
        let mut daemon = Daemon {
            started,
            engine,
            health,
            ports: Vec::new(),
            nics,
            vacant: vacant(config.workers),
            leaving: Vec::new(),
            adding: Vec::new(),
            removals: Vec::new(),
            keeper: Keeper::start(Arc::clone(&memory)).context("cannot start the NICs' keeper")?,
            stalls: StallWatch::default(),
            journal: Journal::new(started),
            listeners: Vec::new(),
            links,
            balancer,
            pinned: stations.map(Pinning::new),
            rarps: Rarps::default(),
            addresses: Addresses::default(),
            chunks: ChunkCache::new(Arc::clone(&memory)),
            memory,
            control: Some(control),
            events: Events::new().context("cannot make an epoll set")?,
            signals,
            unpublished: true,
            generation: 0,
            failure: None,
            config,
        };
        daemon.add_ports(entrances)?;
        daemon.watch_all()?;
        let alive = daemon.balancer.alive().snapshot();
        // The first look was taken before the thread started, and is no news.
        let _ = daemon.health.news();
        for nic in &mut daemon.nics {
            nic.begin(alive >> nic.index() & 1 == 1);
        }
        if let Some(links) = &daemon.links {
            daemon.engine.reserve_macs(links.macs());
        }
        daemon.publish();
        daemon.arm_probes();
        Ok(daemon)
    }

    fn add_ports(&mut self, entrances: Vec<(Entrance, Option<UnixStream>)>) -> Result<()> {
        let configs = self.config.ports.clone();
        for (index, (config, (entrance, stream))) in configs.iter().zip(entrances).enumerate() {
            let queue_pairs = usize::from(config.queue_pairs);
            let index = PortIndex::try_from(index).context("too many ports")?;
            let state = Arc::new(PortState::new(
                index,
                config.name.clone(),
                queue_pairs,
                self.engine.workers(),
            ));
            let device = Device::new(DeviceConfig {
                max_queue_pairs: config.queue_pairs,
                queue_num_as: QueueNum::default(),
            });
            let path = socket_path(&config.endpoint, &entrance);
            let cursors = Cursors::new(self.config.ring_dir.as_deref(), &config.name, path.as_deref());
            let mut port = PortRuntime::new(
                state,
                endpoint_text(&config.endpoint, &entrance),
                config.mac,
                config.vlan.clone(),
                device,
                entrance,
                cursors,
            );
            if let Some(stream) = stream {
                port.adopt(stream)
                    .with_context(|| format!("port {}: cannot use the connection given", config.name))?;
            }
            self.ports.push(port);
            if let Some(mac) = config.mac {
                self.admit(mac);
            }
        }
        Ok(())
    }

    fn watch_all(&mut self) -> io::Result<()> {
        self.events
            .watch(Source::Signals, Some((self.signals.as_raw_fd(), true, false)))?;
        self.events
            .watch(Source::Engine, Some((self.engine.notify_fd(), true, false)))?;
        let loss = guest::loss_event()?;
        self.events
            .watch(Source::Memory, Some((loss.as_raw_fd(), true, false)))?;
        let links = self.links.as_ref().map(|links| (links.fd(), true, false));
        self.events.watch(Source::Links, links)?;
        self.events
            .watch(Source::Health, Some((self.health.fd(), true, false)))?;
        self.events
            .watch(Source::Keeper, Some((self.keeper.fd(), true, false)))?;
        let control = self
            .control
            .as_ref()
            .map(|server| (server.as_fd().as_raw_fd(), true, false));
        self.events.watch(Source::Control, control)?;
        for (at, port) in self.ports.iter().enumerate() {
            self.events
                .watch(Source::Listener(at), port.listener_interest())?;
            self.events.watch(Source::FrontEnd(at), port.interest())?;
        }
        Ok(())
    }
}

fn open_entrance(port: &PortConfig) -> Result<(Entrance, Option<UnixStream>)> {
    let name = &port.name;
    Ok(match &port.endpoint {
        Endpoint::Socket(path) => {
            let listener =
                socket::bind_listener(path, socket::PORT_MODE).with_context(|| format!("port {name}"))?;
            (Entrance::Bound(listener), None)
        }
        Endpoint::Fd(fd) => take(name, *fd, Origin::Option)?,
        Endpoint::Activated(fd) => take(name, *fd, Origin::Activation(name.clone()))?,
    })
}

fn take(port: &str, fd: RawFd, origin: Origin) -> Result<(Entrance, Option<UnixStream>)> {
    let socket = activation::take_fd(&Handed { fd, origin }).with_context(|| format!("port {port}"))?;
    Ok(match socket {
        PortSocket::Listener(listener) => (Entrance::Given(listener), None),
        PortSocket::Connected(stream) => (Entrance::Connected, Some(stream)),
    })
}

fn endpoint_text(endpoint: &Endpoint, entrance: &Entrance) -> String {
    if let Some(path) = socket_path(endpoint, entrance) {
        return path.display().to_string();
    }
    match endpoint {
        Endpoint::Socket(path) => path.display().to_string(),
        Endpoint::Fd(fd) | Endpoint::Activated(fd) => format!("fd {fd}"),
    }
}

/// Where the socket is that front-ends connect to, if it has a path.
fn socket_path(endpoint: &Endpoint, entrance: &Entrance) -> Option<PathBuf> {
    match endpoint {
        Endpoint::Socket(path) => Some(path.clone()),
        Endpoint::Fd(_) | Endpoint::Activated(_) => {
            let bound = entrance.listener()?.local_addr().ok()?;
            bound.as_pathname().map(Path::to_owned)
        }
    }
}

/// Opens every NIC of the start.
fn open_nics(
    config: &Config,
    checked: Vec<Checked>,
    channels: Vec<Option<crate::host::channels::ChannelsGuard>>,
    memory: &Arc<FrameMemory>,
) -> Result<Vec<NicRuntime>> {
    let needs_tags = config.ports.iter().any(|port| port.vlan != VlanMode::Transparent);
    let nics = config.nics.iter().zip(checked).zip(channels).enumerate();
    nics.map(|(index, ((nic, checked), channels))| {
        let index = NicIndex::try_from(index).context("too many NICs")?;
        let (id, mtu) = (nic.id.clone(), checked.interface.mtu);
        let state = Arc::new(NicState::new(index, id, config.workers, mtu));
        let drive = Drive::open(nic, &checked, channels, Arc::clone(&state), needs_tags, memory)?;
        Ok(NicRuntime::new(nic.clone(), checked.interface, state, drive))
    })
    .collect()
}

/// For the workers in the place of NICs that there are not.
fn vacant(workers: usize) -> Vec<Arc<Nic>> {
    let absent = |index| {
        let state = Arc::new(NicState::new(index, String::new(), workers, 0));
        Arc::new(Nic::absent(state, Mac::default()))
    };
    (0..).take(MAX_NICS).map(absent).collect()
}

/// Chunks for every NIC ring to be full at once, for what workers hold, and for a queue of a NIC that is added later.
fn default_frames(config: &Config, interfaces: &[Checked]) -> u32 {
    let spare = interfaces
        .iter()
        .map(|nic| nic.ring_chunks() / nic.queues.max(1))
        .max();
    let rings: u32 = interfaces
        .iter()
        .map(Checked::ring_chunks)
        .fold(spare.unwrap_or(0), u32::saturating_add);
    let workers = u32::try_from(config.workers)
        .unwrap_or(u32::MAX)
        .saturating_mul(CHUNKS_PER_WORKER);
    rings.saturating_add(workers).saturating_add(CHUNKS_PER_WORKER)
}

/// 2 MiB pages that frame memory takes.
fn huge_pages(frames: u32) -> u64 {
    (u64::from(frames) * CHUNK_SIZE as u64).div_ceil(2 << 20)
}
