//! An engine between guests and in-memory NICs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vnic_lb::balancer::{Balancer, BalancerConfig};
use vnic_lb::limits::{SessionLimits, Timeouts};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicInfo;
use vnic_lb::pinned::Stations;
use vnic_lb::policy::Algorithm;

use crate::counters::DropReason;
use crate::engine::{Engine, EngineConfig, Event, Poll, SleepIn};
use crate::fabric::{Nic, NicQueue, NicState, Port, PortIndex, PortState, QueuePair, Ring};
use crate::memory::frames::{Census, ChunkCache, FrameMemory};
use crate::nic::memory::{MemoryPeer, waitable_pair};
use crate::virtq::testing::{Buffer, Driver, Kind};

/// Every test runs with each of these.
pub(super) const SETTINGS: [(usize, Poll); 4] = [
    (1, Poll::Busy),
    (2, Poll::Busy),
    (1, Poll::Adaptive),
    (2, Poll::Adaptive),
];

/// What guests' rings are like, and what idle workers sleep in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Habits {
    pub(super) kind: Kind,
    pub(super) event_idx: bool,
    pub(super) sleep_in: SleepIn,
}

impl Habits {
    pub(super) const USUAL: Habits = Habits {
        kind: Kind::Split,
        event_idx: true,
        sleep_in: SleepIn::Auto,
    };

    /// All that there are.
    pub(super) fn all() -> impl Iterator<Item = Habits> {
        let kinds = [Kind::Split, Kind::Packed].into_iter();
        let event_idx = kinds.flat_map(|kind| [true, false].map(|event_idx| (kind, event_idx)));
        event_idx.flat_map(|(kind, event_idx)| {
            [SleepIn::Auto, SleepIn::Epoll].map(|sleep_in| Habits {
                kind,
                event_idx,
                sleep_in,
            })
        })
    }
}

/// Far more than anything here takes; far less than the sleep that a lost wake-up would cost.
const PATIENCE: Duration = Duration::from_secs(60);

const CHUNKS: u32 = 4096;
const NIC_DEPTH: usize = 256;
const RING: u16 = 256;
pub(super) const HEADER: usize = 12;
pub(super) const BROADCAST: Mac = Mac([0xff; 6]);
/// Somebody beyond the NICs.
pub(super) const STRANGER: Mac = Mac([0x02, 0, 0, 0, 0x99, 1]);

pub(super) fn guest_mac(index: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, index + 1])
}

fn nic_mac(index: u8) -> Mac {
    Mac([0x02, 0, 0, 0, 0x77, index])
}

/// Waits until `done` gives something; `None` if it does not.
fn wait<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let value = done();
        if value.is_some() || start.elapsed() >= PATIENCE {
            return value;
        }
        std::thread::yield_now();
    }
}

/// A UDP frame of 64 bytes whose last 4 are `tag`.
pub(super) fn udp(dst: Mac, src: Mac, source_port: u16, tag: u32) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    frame.extend([0x08, 0x00]);
    frame.extend([0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 0, 0, src.0[5], 10, 0, 0, dst.0[5]]);
    frame.extend(source_port.to_be_bytes());
    frame.extend([0, 53, 0, 30, 0, 0]);
    frame.resize(60, 0);
    frame.extend(tag.to_be_bytes());
    frame
}

pub(super) fn tag(frame: &[u8]) -> u32 {
    u32::from_be_bytes(*frame.last_chunk().expect("a whole frame"))
}

pub(super) fn source_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[34], frame[35]])
}

pub(super) fn source(frame: &[u8]) -> Mac {
    Mac(*frame[6..].first_chunk().expect("a whole frame"))
}

/// A guest with one queue pair, whose driver keeps its receive ring filled.
pub(super) struct Guest {
    pub(super) state: Arc<PortState>,
    pub(super) mac: Option<Mac>,
    pub(super) tx: Driver,
    pub(super) rx: Driver,
    tx_ring: Option<Arc<Ring>>,
    rx_ring: Option<Arc<Ring>>,
    pub(super) tx_enabled: bool,
    /// The send ring is without a kick eventfd.
    pub(super) is_polled: bool,
    kick: Arc<EventFd>,
    posted: HashMap<u16, Vec<Buffer>>,
    outstanding: u16,
}

impl Guest {
    fn new(index: PortIndex, mac: Option<Mac>, workers: usize, habits: Habits) -> Guest {
        let driver = || {
            // Near the wrap of the indexes.
            let mut driver = Driver::of(habits.kind, RING, 65_500);
            driver.spec.event_idx = habits.event_idx;
            driver
        };
        let (tx, rx) = (driver(), driver());
        let mut guest = Guest {
            state: Arc::new(PortState::new(index, format!("p{index}"), 1, workers)),
            mac,
            tx_ring: Some(Arc::new(Ring::new(tx.ring()))),
            rx_ring: Some(Arc::new(Ring::new(rx.ring()))),
            tx,
            rx,
            tx_enabled: true,
            is_polled: false,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
            posted: HashMap::new(),
            outstanding: 0,
        };
        guest.post(RING - 1);
        guest
    }

    /// Offers `count` receive buffers.
    fn post(&mut self, count: u16) {
        for _ in 0..count {
            let (head, buffers) = self.rx.post(&[2048], None);
            self.posted.insert(head, buffers);
        }
    }

    /// Takes its receive buffers away, as far as the workers have not used them: a guest that stands still.
    pub(super) fn without_buffers(&mut self) {
        self.posted.clear();
        self.rx = Driver::new(RING, 0);
        self.rx_ring = Some(Arc::new(Ring::new(self.rx.ring())));
    }

    /// Begins a new receive ring in which nothing but these descriptors is available.
    pub(super) fn rx_with_raw(&mut self, descs: &[(u64, u32, u16)]) {
        let kind = match self.rx.spec.packed {
            true => Kind::Packed,
            false => Kind::Split,
        };
        self.posted.clear();
        self.rx = Driver::of(kind, RING, 0);
        self.rx.offer_raw(descs);
        self.rx_ring = Some(Arc::new(Ring::new(self.rx.ring())));
    }

    pub(super) fn rx_ring(&self) -> &Arc<Ring> {
        self.started_rx().expect("a started ring")
    }

    pub(super) fn tx_ring(&self) -> &Arc<Ring> {
        self.started_tx().expect("a started ring")
    }

    pub(super) fn started_rx(&self) -> Option<&Arc<Ring>> {
        self.rx_ring.as_ref()
    }

    pub(super) fn started_tx(&self) -> Option<&Arc<Ring>> {
        self.tx_ring.as_ref()
    }

    /// As GET_VRING_BASE of both rings does: the next publication lacks them.
    pub(super) fn stop(&mut self) -> (Arc<Ring>, Arc<Ring>) {
        (
            self.rx_ring.take().expect("a started ring"),
            self.tx_ring.take().expect("a started ring"),
        )
    }

    /// Goes on where `stop` had left off.
    pub(super) fn start(&mut self, stopped: (Arc<Ring>, Arc<Ring>)) {
        for (driver, ring, place) in [
            (&mut self.rx, stopped.0, &mut self.rx_ring),
            (&mut self.tx, stopped.1, &mut self.tx_ring),
        ] {
            driver.spec.base = ring.engine.lock().base();
            *place = Some(Arc::new(Ring::new(driver.ring())));
        }
    }

    /// Sends bytes behind a header of zeros, and kicks if the device asked for it; `false` when the ring is full.
    pub(super) fn send(&mut self, frame: &[u8]) -> bool {
        self.send_behind(&[0; HEADER], frame)
    }

    pub(super) fn send_behind(&mut self, header: &[u8], frame: &[u8]) -> bool {
        // Two descriptors for each.
        self.outstanding -= u16::try_from(self.tx.used().len()).expect("a ring's worth");
        if self.outstanding >= RING / 2 - 1 {
            return false;
        }
        let before = self.tx.offered();
        self.tx.send(&[header, frame], None);
        self.outstanding += 1;
        self.kick(before);
        true
    }

    /// Kicks if the device asked for it.
    pub(super) fn kick(&mut self, before: u32) {
        if self.tx.wants_kick(before) {
            self.kick.write(1).expect("room in an eventfd");
        }
    }

    /// As SET_VRING_KICK on a running ring does; to be published.
    pub(super) fn replace_kick(&mut self) {
        self.kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    }

    /// Takes what has arrived and offers as many buffers again.
    pub(super) fn received(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for (head, len) in self.rx.used() {
            let buffers = self.posted.remove(&head).expect("a buffer that was posted");
            let bytes = self.rx.read(buffers[0].0, len as usize);
            frames.push(bytes[HEADER..].to_vec());
            self.post(1);
        }
        frames
    }

    pub(super) fn drops(&self, reason: DropReason) -> u64 {
        self.state.counters.sum(|counters| counters.drops.get(reason))
    }

    fn view(&self) -> Port {
        let pair = QueuePair {
            tx: self.tx_ring.clone(),
            tx_kick: (!self.is_polled).then(|| Arc::clone(&self.kick)),
            tx_enabled: self.tx_enabled,
            rx: self.rx_ring.clone(),
        };
        Port::new(Arc::clone(&self.state), self.mac, vec![pair])
    }
}

/// Everything together. NICs have one queue each, so that two workers share the sending side.
pub(super) struct Lab {
    pub(super) engine: Engine,
    pub(super) memory: Arc<FrameMemory>,
    pub(super) balancer: Arc<Balancer>,
    /// In topology `pinned`.
    pub(super) stations: Option<Arc<Stations>>,
    pub(super) nics: Vec<Arc<Nic>>,
    pub(super) peers: Vec<MemoryPeer>,
    pub(super) guests: Vec<Guest>,
    pub(super) poll: Poll,
    pub(super) habits: Habits,
}

impl Lab {
    /// `guests` with their addresses known, and `nics` alive; published and settled.
    pub(super) fn new((workers, poll): (usize, Poll), guests: u8, nics: u8) -> Lab {
        Lab::with_chunks((workers, poll), guests, nics, CHUNKS)
    }

    pub(super) fn with_chunks(settings: (usize, Poll), guests: u8, nics: u8, chunks: u32) -> Lab {
        Lab::with(settings, guests, nics, chunks, Habits::USUAL, false)
    }

    /// The NICs are plugged into independent switch ports. No station has been assigned yet.
    pub(super) fn pinned(settings: (usize, Poll), guests: u8, nics: u8) -> Lab {
        Lab::with(settings, guests, nics, CHUNKS, Habits::USUAL, true)
    }

    pub(super) fn with_habits(settings: (usize, Poll), guests: u8, nics: u8, habits: Habits) -> Lab {
        Lab::with(settings, guests, nics, CHUNKS, habits, false)
    }

    fn with(
        (workers, poll): (usize, Poll),
        guests: u8,
        nics: u8,
        chunks: u32,
        habits: Habits,
        pinned: bool,
    ) -> Lab {
        let memory = FrameMemory::new(chunks).expect("memory");
        let balancer = Balancer::new(&BalancerConfig {
            nics: (0..nics)
                .map(|index| NicInfo {
                    id: format!("nic{index}"),
                    weight: None,
                })
                .collect(),
            algorithm: Algorithm::Hash,
            session_capacity: 4096,
            workers,
            timeouts: Timeouts::default(),
            limits: SessionLimits::default(),
            hash_key: [7; 16],
        });
        let config = EngineConfig {
            workers,
            cpus: Vec::new(),
            poll,
            sleep_in: habits.sleep_in,
        };
        let stations = pinned.then(|| Arc::new(Stations::new(Arc::clone(&balancer))));
        let engine = match &stations {
            Some(stations) => Engine::start_pinned(&config, Arc::clone(&memory), Arc::clone(stations)),
            None => Engine::start(&config, Arc::clone(&memory), Arc::clone(&balancer)),
        };
        let mut lab = Lab {
            engine: engine.expect("workers"),
            balancer,
            stations,
            nics: Vec::new(),
            peers: Vec::new(),
            guests: (0..guests)
                .map(|index| Guest::new(index, Some(guest_mac(index)), workers, habits))
                .collect(),
            memory,
            poll,
            habits,
        };
        for index in 0..nics {
            let (rx, tx, peer) = waitable_pair(index, &lab.memory, NIC_DEPTH).expect("an eventfd");
            lab.add_nic(index, NicQueue::new(Box::new(rx), Box::new(tx)));
            lab.peers.push(peer);
        }
        lab.publish();
        lab
    }

    pub(super) fn add_nic(&mut self, index: u8, queue: NicQueue) {
        self.nics.push(Arc::new(Nic {
            state: Arc::new(NicState::new(
                index,
                format!("nic{index}"),
                self.engine.workers(),
                1500,
            )),
            mac: nic_mac(index),
            queues: Box::new([queue]),
            group: None,
            partial_checksums: false,
        }));
        self.balancer.alive().set(index, true);
    }

    /// Shows the workers how things are, without waiting for them.
    pub(super) fn publish_only(&self) -> u64 {
        let ports = self.guests.iter().map(Guest::view).collect();
        self.engine.publish(ports, self.nics.clone())
    }

    pub(super) fn publish(&self) {
        let generation = self.publish_only();
        self.settled(generation);
    }

    pub(super) fn settled(&self, generation: u64) {
        let settled = wait(|| (self.engine.settled() == generation).then_some(()));
        self.found("an acknowledgement", settled);
    }

    /// Waits until `done` gives something.
    pub(super) fn wait_for<T>(&mut self, what: &str, mut done: impl FnMut(&mut Lab) -> Option<T>) -> T {
        let value = wait(|| done(self));
        self.found(what, value)
    }

    /// What [`wait`] gave.
    fn found<T>(&self, what: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| panic!("no sign of {what}\n{self}"))
    }

    /// A guest sends, however long the ring is full.
    pub(super) fn send(&mut self, guest: usize, frame: &[u8]) {
        self.wait_for("room in a ring", |lab| {
            lab.guests[guest].send(frame).then_some(())
        });
    }

    /// A NIC's peer sends, as soon as the NIC offers it room.
    pub(super) fn inject(&mut self, nic: usize, frame: &[u8]) {
        self.wait_for("room in a NIC", |lab| lab.peers[nic].inject(frame).then_some(()));
    }

    pub(super) fn collect(&mut self, nic: usize) -> Vec<u8> {
        self.wait_for("a frame at a NIC", |lab| lab.peers[nic].collect())
    }

    /// The next frame at any NIC, and which.
    pub(super) fn collect_any(&mut self) -> (usize, Vec<u8>) {
        self.wait_for("a frame at some NIC", |lab| {
            lab.peers
                .iter_mut()
                .enumerate()
                .find_map(|(nic, peer)| Some((nic, peer.collect()?)))
        })
    }

    /// The next frame that a guest receives; there must not be more.
    pub(super) fn receive(&mut self, guest: usize) -> Vec<u8> {
        self.receive_all(guest, 1).remove(0)
    }

    pub(super) fn receive_all(&mut self, guest: usize, count: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.wait_for("a frame at a guest", |lab| {
            frames.extend(lab.guests[guest].received());
            (frames.len() >= count).then_some(())
        });
        assert_eq!(frames.len(), count);
        frames
    }

    /// What a guest receives until that and what was dropped for `reason` make up `count` frames.
    pub(super) fn receive_until_dropped(
        &mut self,
        guest: usize,
        reason: DropReason,
        count: u64,
    ) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.wait_for("every frame received or dropped", |lab| {
            let guest = &mut lab.guests[guest];
            frames.extend(guest.received());
            (frames.len() as u64 + guest.drops(reason) >= count).then_some(())
        });
        assert_eq!(frames.len() as u64 + self.guests[guest].drops(reason), count);
        frames
    }

    /// Waits for a drop and returns once it is counted exactly `count` times.
    pub(super) fn dropped(&self, guest: usize, reason: DropReason, count: u64) {
        let guest = &self.guests[guest];
        let dropped = wait(|| (guest.drops(reason) >= count).then_some(()));
        self.found(reason.name(), dropped);
        assert_eq!(guest.drops(reason), count, "{}", reason.name());
    }

    pub(super) fn nic_drops(&self, nic: usize, reason: DropReason) -> u64 {
        self.nics[nic]
            .state
            .counters
            .sum(|counters| counters.drops.get(reason))
    }

    pub(super) fn nic_dropped(&self, nic: usize, reason: DropReason, count: u64) {
        let dropped = wait(|| (self.nic_drops(nic, reason) >= count).then_some(()));
        self.found(reason.name(), dropped);
        assert_eq!(self.nic_drops(nic, reason), count, "{}", reason.name());
    }

    pub(super) fn event(&self) -> Event {
        self.found("an event", wait(|| self.engine.next_event()))
    }

    /// Waits until every worker has had a whole turn since the call (and so has done all that there was to do).
    pub(super) fn turn(&self) {
        self.publish();
        self.publish();
    }

    /// Nothing more arrives anywhere, and when all is taken down every chunk is free again.
    pub(super) fn end(mut self) {
        self.turn();
        for guest in &mut self.guests {
            assert_eq!(guest.received(), Vec::<Vec<u8>>::new(), "{}", guest.state.name);
        }
        for peer in &mut self.peers {
            assert_eq!(peer.collect(), None);
        }
        self.take_down();
    }

    /// Whatever is under way: every chunk comes back.
    pub(super) fn take_down(self) {
        let Lab {
            engine,
            memory,
            nics,
            peers,
            guests,
            ..
        } = self;
        drop(engine);
        let mut chunks = ChunkCache::new(Arc::clone(&memory));
        for nic in &nics {
            nic.queues.iter().for_each(|queue| queue.tx.clear(&mut chunks));
        }
        for guest in &guests {
            for ring in [&guest.rx_ring, &guest.tx_ring].into_iter().flatten() {
                ring.engine.clear(&mut chunks);
            }
        }
        drop((nics, peers, guests, chunks));
        let all_free = Census {
            free: memory.chunk_count(),
            ..Census::default()
        };
        assert_eq!(memory.census(), all_free);
        assert_eq!(memory.state_errors(), 0);
    }
}

/// Frames in the order of sending, by sender.
pub(super) fn by_source(frames: impl IntoIterator<Item = Vec<u8>>) -> HashMap<Mac, VecDeque<u32>> {
    let mut sources: HashMap<Mac, VecDeque<u32>> = HashMap::new();
    for frame in frames {
        sources.entry(source(&frame)).or_default().push_back(tag(&frame));
    }
    sources
}
