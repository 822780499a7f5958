//! One port at run time: its front-end's connection, the protocol state, and the rings that workers run for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use tracing::{debug, info, warn};
use vnic_dataplane::fabric::{Port, PortState, QueuePair, Ring, VlanMode};
use vnic_dataplane::memory::frames::ChunkCache;
use vnic_dataplane::virtq;
use vnic_lb::mac::Mac;

use super::cursors::Cursors;
use super::events::Interest;
use super::log_budget::LogBudget;
use crate::control::report::RarpStats;
use crate::host::socket::BoundListener;
use crate::vhost::{Code, Connection, Device, Fault, Pending, Reply, Step};

/// Where a front-end comes in.
pub(super) enum Entrance {
    /// A socket that this daemon bound; unlinked when the daemon ends.
    Bound(BoundListener),
    /// A listening socket that the parent process handed over.
    Given(UnixListener),
    /// A connection that the parent process handed over: there is no second one.
    Connected,
}

impl Entrance {
    pub(super) fn listener(&self) -> Option<&UnixListener> {
        match self {
            Entrance::Bound(listener) => Some(listener.listener()),
            Entrance::Given(listener) => Some(listener),
            Entrance::Connected => None,
        }
    }
}

/// How the port got its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MacOrigin {
    Configured,
    Learned,
}

/// What is done once the workers have let go of the port's rings.
enum Then {
    /// Carry out the request that asked for it.
    Complete(Pending),
    /// Forget the front-end, which is gone.
    Forget,
}

/// Rings that were taken from the workers, until that has settled.
struct Quiesce {
    generation: u64,
    rings: Vec<(usize, Arc<Ring>)>,
    then: Then,
}

/// What the daemon must do after a call here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Outcome {
    /// The port's rings differ from what is published.
    pub(super) publish: bool,
    /// The connection's fd, or the wish to write, may have changed: look at `interest` again.
    pub(super) rewatch: bool,
}

/// Frames of protocol handled before other connections get their turn.
const MESSAGES_A_TURN: usize = 64;

/// A port and everything that runs for it.
pub(super) struct PortRuntime {
    pub(super) state: Arc<PortState>,
    pub(super) socket: String,
    pub(super) mac: Option<(Mac, MacOrigin)>,
    /// The address that was learned from the guest before this one.
    former: Option<Mac>,
    pub(super) vlan: VlanMode,
    entrance: Entrance,
    connection: Option<Connection>,
    device: Device,
    /// Keeps where packed rings stand.
    cursors: Cursors,
    /// Running rings by vhost-user index.
    rings: Vec<Option<Arc<Ring>>>,
    quiesce: Option<Quiesce>,
    /// Whether the listener is left alone for a while, see [`PortRuntime::accept_again`].
    accept_paused: bool,
    /// For every line that a front-end or a guest can cause.
    log: LogBudget,
    /// Times that the guest's driver broke a ring.
    broken_rings: u64,
    /// The front-end has asked to have the guest announced under this address.
    rarp: Option<Mac>,
    pub(super) rarp_stats: RarpStats,
}

impl PortRuntime {
    pub(super) fn new(
        state: Arc<PortState>,
        socket: String,
        mac: Option<Mac>,
        vlan: VlanMode,
        device: Device,
        entrance: Entrance,
        cursors: Cursors,
    ) -> PortRuntime {
        let rings = vec![None; state.pairs.len() * 2];
        PortRuntime {
            state,
            socket,
            mac: mac.map(|mac| (mac, MacOrigin::Configured)),
            former: None,
            vlan,
            entrance,
            connection: None,
            device,
            cursors,
            rings,
            quiesce: None,
            accept_paused: false,
            log: LogBudget::new(Instant::now()),
            broken_rings: 0,
            rarp: None,
            rarp_stats: RarpStats::default(),
        }
    }

    /// Serves a connection that was handed over at start.
    pub(super) fn adopt(&mut self, stream: UnixStream) -> io::Result<()> {
        self.connection = Some(Connection::new(stream)?);
        info!(port = self.state.name, "front-end connected");
        Ok(())
    }

    /// The listener, while connections may be taken from it. A front-end that just died is still being forgotten; the next one
    /// waits in the listener's queue meanwhile.
    pub(super) fn listener_interest(&self) -> Option<Interest> {
        if self.accept_paused || (self.quiesce.is_some() && self.connection.is_none()) {
            return None;
        }
        self.entrance
            .listener()
            .map(|listener| (listener.as_raw_fd(), true, false))
    }

    /// The connection's fd with whether to wait for reading and for writing. While rings are being taken back nothing is
    /// read, so the front-end's next message waits in its socket.
    pub(super) fn interest(&self) -> Option<Interest> {
        let connection = self.connection.as_ref()?;
        Some((
            connection.as_fd().as_raw_fd(),
            self.quiesce.is_none(),
            connection.wants_write(),
        ))
    }

    /// Whether nobody can come any more: a handed-over connection has ended.
    pub(super) fn is_finished(&self) -> bool {
        matches!(self.entrance, Entrance::Connected) && self.connection.is_none() && self.quiesce.is_none()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Whether any ring runs.
    pub(super) fn is_running(&self) -> bool {
        self.rings.iter().any(Option::is_some)
    }

    /// Whether a line that the guest has caused may be written now, and how many were withheld.
    pub(super) fn may_log(&mut self) -> Option<Option<u64>> {
        self.log.take(Instant::now())
    }

    /// Whether its rings are with the control thread for now, or for good.
    pub(super) fn is_quiescing(&self) -> bool {
        self.quiesce.is_some()
    }

    /// Takes a connection that waits on the listener: serves it if nobody is served, and closes it otherwise.
    pub(super) fn accept(&mut self) -> Outcome {
        let Some((listener, _)) = self.entrance.listener().zip(self.listener_interest()) else {
            return Outcome::default();
        };
        let mut publish = false;
        match listener.accept() {
            Ok((stream, _)) if self.connection.is_none() => match Connection::new(stream) {
                Ok(connection) => {
                    if let Some(withheld) = self.log.take(Instant::now()) {
                        info!(port = self.state.name, withheld, "front-end connected");
                    }
                    self.connection = Some(connection);
                    publish = self.forget_learned();
                }
                Err(error) => {
                    if let Some(withheld) = self.log.take(Instant::now()) {
                        warn!(
                            port = self.state.name,
                            withheld, "cannot serve a front-end: {error}"
                        );
                    }
                }
            },
            Ok(_) => {
                if let Some(withheld) = self.log.take(Instant::now()) {
                    warn!(
                        port = self.state.name,
                        withheld,
                        "turned a second front-end away: this port serves another one; give each guest a port of its own"
                    );
                }
                return Outcome::default();
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                return Outcome::default();
            }
            Err(error) => {
                // The connection stays in the queue, so the listener would wake us over and over.
                self.accept_paused = true;
                if let Some(withheld) = self.log.take(Instant::now()) {
                    let cure = match error.raw_os_error() {
                        Some(libc::EMFILE | libc::ENFILE) => "; raise the limit of open files (ulimit -n)",
                        _ => "",
                    };
                    warn!(
                        port = self.state.name,
                        withheld, "cannot accept a front-end, trying again in a moment: {error}{cure}"
                    );
                }
            }
        }
        Outcome {
            publish,
            rewatch: true,
        }
    }

    /// Another guest may come in, with another address; returns whether there was one that was learned. Not when the last one leaves: what it
    /// was is still shown then, and it takes part no more.
    fn forget_learned(&mut self) -> bool {
        let Some((mac, _)) = self.mac.take_if(|(_, origin)| *origin == MacOrigin::Learned) else {
            return false;
        };
        self.former = Some(mac);
        self.state.settle_mac();
        true
    }

    /// What [`PortRuntime::forget_learned`] has forgotten, once.
    pub(super) fn take_former(&mut self) -> Option<Mac> {
        self.former.take()
    }

    /// Time has passed: looks at the listener again if accepting had failed.
    pub(super) fn accept_again(&mut self) -> Outcome {
        Outcome {
            publish: false,
            rewatch: std::mem::take(&mut self.accept_paused),
        }
    }

    /// The connection is readable or writable.
    pub(super) fn on_ready(&mut self) -> Outcome {
        match self.talk() {
            Ok(publish) => Outcome {
                publish,
                rewatch: true,
            },
            Err(fault) => self.hang_up(&fault),
        }
    }

    fn talk(&mut self) -> Result<bool, Fault> {
        let Some(connection) = self.connection.as_mut() else {
            return Ok(false);
        };
        connection.flush()?;
        let mut publish = false;
        for _ in 0..MESSAGES_A_TURN {
            if self.quiesce.is_some() {
                break;
            }
            let Some(message) = self
                .connection
                .as_mut()
                .map_or(Ok(None), Connection::poll_message)?
            else {
                break;
            };
            debug!(
                port = self.state.name,
                "request {} {:?}", message.code, message.request
            );
            match self.device.handle(message)? {
                Step::Done {
                    reply,
                    changed,
                    refused,
                } => publish |= self.done(reply, changed, refused)?,
                Step::Quiesce(pending) => {
                    self.take_back(Then::Complete(pending));
                    publish = true;
                }
                Step::Announce { mac, acknowledge } => self.send_rarp(mac, acknowledge)?,
            }
        }
        Ok(publish)
    }

    /// The front-end asks to have its guest announced. With an address that is not the guest's nothing is, which does not end the
    /// connection: front-ends are told of an address by their users, and ports by theirs.
    fn send_rarp(&mut self, mac: Mac, acknowledge: Option<Code>) -> Result<(), Fault> {
        let taken = match self.mac {
            Some((own, _)) => own == mac,
            None => !mac.is_group() && !mac.is_zero(),
        };
        match taken {
            true => self.rarp = Some(mac),
            false => self.refuse_rarp(mac),
        }
        match (acknowledge, self.connection.as_mut()) {
            (Some(code), Some(connection)) => connection.send(Reply::number(code, u64::from(!taken))),
            _ => Ok(()),
        }
    }

    /// What the front-end has asked for since the last call.
    pub(super) fn take_rarp(&mut self) -> Option<Mac> {
        self.rarp.take()
    }

    /// Counts and tells that the guest cannot be announced under this address.
    pub(super) fn refuse_rarp(&mut self, mac: Mac) {
        self.rarp_stats.refused += 1;
        let Some(withheld) = self.log.take(Instant::now()) else {
            return;
        };
        let own = self.mac.map_or_else(
            || "the guest may not have it".to_owned(),
            |(own, _)| format!("the port's is {own}"),
        );
        warn!(
            port = self.state.name,
            withheld,
            "the front-end asks to announce {mac}, which is not done: {own}; give the port (mac=) and the front-end the same"
        );
    }

    fn done(&mut self, reply: Option<Reply>, changed: bool, refused: Option<Fault>) -> Result<bool, Fault> {
        if let Some(refused) = refused
            && let Some(withheld) = self.log.take(Instant::now())
        {
            warn!(port = self.state.name, withheld, "refused: {refused}");
        }
        if changed {
            self.start_rings();
        }
        if let (Some(reply), Some(connection)) = (reply, self.connection.as_mut()) {
            connection.send(reply)?;
        }
        for view in self.device.rings().filter(|view| view.stopped) {
            self.cursors.forget(view.index);
        }
        Ok(changed)
    }

    /// Hangs up if memory that the front-end shares is gone from its file.
    pub(super) fn check_memory(&mut self) -> Outcome {
        match self.device.lost_memory() {
            // Without a connection it is on its way out already.
            Some(guest_addr) if self.connection.is_some() => self.hang_up(&Fault::MemoryLost { guest_addr }),
            _ => Outcome::default(),
        }
    }

    /// The front-end is gone or must go.
    fn hang_up(&mut self, fault: &Fault) -> Outcome {
        if let Some(withheld) = self.log.take(Instant::now()) {
            if fault.is_clean_close() {
                info!(port = self.state.name, withheld, "front-end disconnected");
            } else {
                warn!(
                    port = self.state.name,
                    withheld, "front-end disconnected: {fault}"
                );
            }
        }
        self.connection = None;
        self.rarp = None;
        match &mut self.quiesce {
            // The request that it waited for has lost its meaning.
            Some(quiesce) => quiesce.then = Then::Forget,
            None => self.take_back(Then::Forget),
        }
        Outcome {
            publish: true,
            rewatch: true,
        }
    }

    /// Takes all rings from the workers; `published` says when that was done, `settle` goes on from there.
    fn take_back(&mut self, then: Then) {
        let rings = self
            .rings
            .iter_mut()
            .enumerate()
            .filter_map(|(at, ring)| Some((at, ring.take()?)))
            .collect();
        // Until `published` says which generation lacks the rings, none is late enough.
        self.quiesce = Some(Quiesce {
            generation: u64::MAX,
            rings,
            then,
        });
    }

    /// The daemon published the port as [`PortRuntime::view`] shows it.
    pub(super) fn published(&mut self, generation: u64) {
        if let Some(quiesce) = &mut self.quiesce
            && quiesce.generation == u64::MAX
        {
            quiesce.generation = generation;
        }
    }

    /// All workers have picked up `settled`: if that is late enough for the rings taken back, goes on with what waited.
    pub(super) fn settle(&mut self, settled: u64, chunks: &mut ChunkCache) -> Outcome {
        let Some(Quiesce { rings, then, .. }) = self.quiesce.take_if(|quiesce| quiesce.generation <= settled)
        else {
            return Outcome::default();
        };
        for (index, ring) in rings {
            self.device.set_base(index, ring.engine.lock().base());
            ring.engine.clear(chunks);
        }
        match then {
            Then::Complete(pending) => {
                let result = match self.device.complete(pending) {
                    Ok(Step::Done {
                        reply,
                        changed,
                        refused,
                    }) => self.done(reply, changed, refused),
                    // `complete` promises not to ask again; if it did, the front-end would hear no answer and hang up.
                    Ok(Step::Quiesce(_) | Step::Announce { .. }) => Ok(false),
                    Err(fault) => Err(fault),
                };
                match result {
                    Ok(publish) => Outcome {
                        publish,
                        rewatch: true,
                    },
                    Err(fault) => self.hang_up(&fault),
                }
            }
            Then::Forget => {
                self.device.reset();
                Outcome {
                    publish: false,
                    rewatch: true,
                }
            }
        }
    }

    /// Starts each ring that can run and does not yet.
    fn start_rings(&mut self) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if ring.is_some() {
                continue;
            }
            let Some(spec) = self.device.ring_spec(index) else {
                continue;
            };
            let keep = self
                .cursors
                .keeping(&self.state.name, &self.device, index, spec.packed);
            match virtq::Ring::keeping(&spec, keep.as_ref()) {
                Ok(mut engine) => {
                    // A predecessor may have ended between using buffers and notifying, and the driver waits still.
                    engine.notify();
                    debug!(
                        port = self.state.name,
                        ring = index,
                        packed = spec.packed,
                        base = engine.base(),
                        given = spec.base,
                        size = spec.size,
                        "ring starts"
                    );
                    *ring = Some(Arc::new(Ring::new(engine)));
                }
                Err(error) => {
                    self.broken_rings += 1;
                    report_broken(
                        &mut self.log,
                        &self.device,
                        &self.state.name,
                        index,
                        &error.to_string(),
                    );
                }
            }
        }
    }

    /// A worker found the driver breaking a rule: tells the front-end, and the log.
    pub(super) fn ring_broken(&mut self, ring: usize, cause: &str) {
        self.broken_rings += 1;
        report_broken(&mut self.log, &self.device, &self.state.name, ring, cause);
    }

    /// Times that the guest's driver broke a ring.
    pub(super) fn broken_rings(&self) -> u64 {
        self.broken_rings
    }

    /// The port as the workers are to see it.
    pub(super) fn view(&self) -> Port {
        let mut pairs = vec![QueuePair::default(); self.state.pairs.len()];
        for view in self.device.rings() {
            let Some(ring) = self.rings.get(view.index).and_then(Option::as_ref) else {
                continue;
            };
            let pair = &mut pairs[view.index / 2];
            if view.index % 2 == 1 {
                pair.tx = Some(Arc::clone(ring));
                pair.tx_kick = view.kick;
                pair.tx_enabled = view.enabled;
            } else if view.enabled {
                pair.rx = Some(Arc::clone(ring));
            }
        }
        Port::new(Arc::clone(&self.state), self.mac.map(|(mac, _)| mac), pairs).on_vlans(self.vlan.clone())
    }
}

fn report_broken(log: &mut LogBudget, device: &Device, port: &str, ring: usize, cause: &str) {
    if let Some(withheld) = log.take(Instant::now()) {
        warn!(
            port,
            ring,
            withheld,
            "the guest's driver broke this ring, it is left alone until the driver restarts it: {cause}"
        );
    }
    if let Some(err) = device.rings().nth(ring).and_then(|view| view.err) {
        let _ = virtq::signal(&err);
    }
}
