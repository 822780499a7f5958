//! The joined loop in one process: guests' rings, a worker with its session table, and NICs in memory whose sending side completes at
//! once. What is measured is everything that the worker does to a frame; no kernel is involved.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use vnic_dataplane::engine::{Engine, EngineConfig, Poll, SleepIn};
use vnic_dataplane::fabric::{self, Nic, NicQueue, NicState, PortState, QueuePair};
use vnic_dataplane::memory::frames::FrameMemory;
use vnic_dataplane::memory::guest::{GuestMemory, RegionSpec};
use vnic_dataplane::nic::{NicRx, SinkTx, SourceRx, Window, memory};
use vnic_dataplane::virtq::{self, RingSpec};
use vnic_lb::balancer::{Balancer, BalancerConfig};
use vnic_lb::limits::{SessionLimits, Timeouts};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicInfo;
use vnic_lb::policy::Algorithm;
use vnic_tests::frontend::{Pages, RingPlace, SharedMemory};

use crate::driver::{Packed, RingKind, Split};
use crate::flood::{Counts, Flood, FloodPlan};
use crate::frames::{MIN_FRAME, Traffic};
use crate::port::{Layout, Port, PortPlan};

/// Chunks of frame memory: what vnicd takes with one worker.
const CHUNKS: u32 = 8192;
/// Frames that a NIC's ring holds.
const NIC_DEPTH: usize = 2048;
/// Bytes from one frame in memory to the next: a million of them must fit.
const STRIDE: u32 = 128;
/// Somebody beyond the NICs.
const STRANGER: [u8; 6] = [0x02, 0, 0, 0, 0x99, 1];
/// Time in which what is new is under way.
const PICK_UP: Duration = Duration::from_millis(20);
/// Far beyond what a worker needs to pick up a fabric.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which way the frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Direction {
    /// From the guests.
    ToNics,
    /// To the guests, each of which has sent a frame of each of its sessions before.
    FromNics,
}

/// What to run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JoinedPlan {
    /// Which way the frames go.
    pub direction: Direction,
    /// Packed rings.
    pub packed: bool,
    /// Sessions, of all guests together.
    pub sessions: u32,
    /// NICs that they are balanced over.
    pub nics: u8,
    /// Guests, one queue pair each.
    pub ports: u8,
    /// Descriptors of each ring.
    pub queue_size: u16,
    /// Workers.
    pub workers: usize,
    /// CPU of the first worker; the others have the next ones.
    pub cpu: usize,
    /// Before anything is counted, and counted.
    #[serde(skip)]
    pub times: [Duration; 2],
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct JoinedReport {
    /// Frames that arrived in a second.
    pub rate: f64,
    /// Nanoseconds of the worker for each of them.
    pub ns_per_frame: f64,
    /// Time in which the worker had nothing to do, as a part of all.
    pub idle: f64,
    /// Frames that the worker took and that did not arrive, of those that it took.
    pub dropped: f64,
    /// The share of the NIC that moved least, as a part of an even share.
    pub least_nic: f64,
    /// Sessions in the table at the end.
    pub sessions: u64,
    /// CPU time of the process, as a part of what two CPUs have: less than 1 if something else ran there.
    pub cpu_share: f64,
}

/// Runs it: the worker on its CPU, the generator where the caller is.
///
/// # Errors
/// If memory is short, or the worker does not do its work.
pub fn run(plan: &JoinedPlan) -> Result<JoinedReport> {
    if plan.packed {
        run_with::<Packed>(plan)
    } else {
        run_with::<Split>(plan)
    }
}

fn run_with<K: RingKind>(plan: &JoinedPlan) -> Result<JoinedReport> {
    ensure!(plan.nics > 0 && plan.ports > 0, "at least one NIC and one port");
    let guests = (0..plan.ports)
        .map(|index| guest(plan, index))
        .collect::<Result<Vec<_>>>()?;
    let mut ports: Vec<Port<'_, K::Ring<'_>>> = guests
        .iter()
        .map(|guest| Port::new(&guest.layout, &guest.memory))
        .collect();

    let host = Host::start(plan, &guests)?;
    let [warm_up, measured] = plan.times;
    let mut flood = |senders, measured| {
        let plan = FloodPlan {
            senders,
            warm_up: Duration::ZERO,
            measured,
            pauses: FloodPlan::PAUSES,
        };
        let flood = Flood::new(&mut ports, plan);
        flood.fed_through(Arc::clone(&host.window)).run()
    };
    flood(usize::MAX, warm_up)?;
    let idle_turn = host.idle_turn();
    let senders = match plan.direction {
        Direction::ToNics => usize::MAX,
        Direction::FromNics => {
            host.receive(plan);
            flood(0, PICK_UP)?;
            0
        }
    };
    let (turns_before, before) = (host.turns(), host.moved(plan.direction));
    let (began, cpu_before) = (Instant::now(), process_time()?);
    let report = flood(senders, measured)?;
    let cpu_share = share_of_two(cpu_before, began)?;
    let (turns, after) = (host.turns(), host.moved(plan.direction));
    let each: Vec<u64> = after.iter().zip(&before).map(|(now, then)| now - then).collect();
    let moved = each.iter().sum::<u64>();
    ensure!(moved > 0, "no NIC has moved anything");
    let of_ports = |what: fn(&Counts) -> u64| report.ports.iter().map(what).sum::<u64>();
    let (taken, arrived) = match plan.direction {
        Direction::ToNics => (of_ports(|counts| counts.sent), moved),
        Direction::FromNics => (moved, of_ports(|counts| counts.received)),
    };
    let [all, busy] = [0, 1].map(|at| exact(turns[at] - turns_before[at]));
    let least = each.iter().min().copied().unwrap_or(0);
    Ok(JoinedReport {
        rate: exact(arrived) / report.seconds,
        ns_per_frame: report.seconds * 1e9 / exact(arrived),
        idle: (all - busy) * idle_turn / report.seconds,
        // What was under way when the counters were read makes a difference of a few bursts.
        dropped: (1.0 - exact(arrived) / exact(taken)).max(0.0),
        least_nic: exact(least) * exact(each.len() as u64) / exact(moved),
        sessions: host.balancer.stats().sessions,
        cpu_share,
    })
}

#[allow(clippy::cast_precision_loss, reason = "ratios are not exact")]
fn exact(count: u64) -> f64 {
    count as f64
}

/// CPU time of this process.
pub(crate) fn process_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// CPU time of this process since then, as a part of what two CPUs have.
pub(crate) fn share_of_two(cpu_before: Duration, began: Instant) -> Result<f64> {
    let used = process_time()?.saturating_sub(cpu_before);
    Ok(used.as_secs_f64() / (2.0 * began.elapsed().as_secs_f64()))
}

/// What the frames of [`timed`] go between.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    /// The guests and the plan's NICs, in its direction and through the session table, 60 bytes each.
    Nics,
    /// The first guest and a second one, frames of this size.
    Guests(u32),
}

/// Times a number of frames.
pub type Timer<'t> = &'t mut dyn FnMut(u64) -> Result<Duration>;

/// Has `work` time frames that take this way through a worker that is up and warm; of the plan, `times` is not used.
///
/// # Errors
/// If memory is short, or the worker does not start.
pub fn timed(plan: &JoinedPlan, way: Way, work: impl FnOnce(Timer<'_>)) -> Result<()> {
    if plan.packed {
        timed_with::<Packed>(plan, way, work)
    } else {
        timed_with::<Split>(plan, way, work)
    }
}

fn timed_with<K: RingKind>(plan: &JoinedPlan, way: Way, work: impl FnOnce(Timer<'_>)) -> Result<()> {
    let (guests, what): (_, fn(&Counts) -> u64) = match way {
        Way::Nics => {
            let guests = (0..plan.ports).map(|index| guest(plan, index));
            (guests.collect::<Result<Vec<_>>>()?, |counts| counts.sent)
        }
        Way::Guests(size) => {
            let guests = (0..2u8).map(|index| {
                let sends = Traffic {
                    from: guest_mac(index),
                    to: guest_mac(1 - index),
                    frames: plan.sessions,
                    first_flow: 0,
                    flows: plan.sessions,
                    sizes: vec![size],
                };
                Guest::new(plan, sends, None, None)
            });
            (guests.collect::<Result<Vec<_>>>()?, |counts| counts.received)
        }
    };
    let mut ports: Vec<Port<'_, K::Ring<'_>>> = guests
        .iter()
        .map(|guest| Port::new(&guest.layout, &guest.memory))
        .collect();
    let host = Host::start(plan, &guests)?;
    let flood_plan = FloodPlan {
        senders: if matches!(way, Way::Nics) { usize::MAX } else { 1 },
        warm_up: Duration::ZERO,
        measured: Duration::ZERO,
        pauses: FloodPlan::PAUSES,
    };
    let mut flood = Flood::new(&mut ports, flood_plan).fed_through(Arc::clone(&host.window));
    // Every frame in memory once: all sessions are there.
    flood.run_frames(u64::from(plan.sessions) + 1, what)?;
    let what = match (way, plan.direction) {
        (Way::Nics, Direction::FromNics) => {
            flood.only_receive();
            host.receive(plan);
            |counts: &Counts| counts.received
        }
        _ => what,
    };
    work(&mut |frames| flood.run_frames(frames, what));
    Ok(())
}

/// A worker that serves guests and NICs.
struct Host {
    // Ends first.
    engine: Engine,
    balancer: Arc<Balancer>,
    nics: Vec<Arc<Nic>>,
    /// What the NICs receive.
    window: Arc<Window>,
}

impl Host {
    fn start(plan: &JoinedPlan, guests: &[Guest]) -> Result<Host> {
        let memory = FrameMemory::new(CHUNKS)?;
        let balancer = balancer(plan);
        let window = Arc::new(Window::default());
        let nics = (0..plan.nics).map(|index| nic(plan, index, &memory, &window));
        let nics: Vec<Arc<Nic>> = nics.collect();
        for index in 0..plan.nics {
            balancer.alive().set(index, true);
        }
        let config = EngineConfig {
            workers: plan.workers,
            cpus: (plan.cpu..).take(plan.workers).collect(),
            poll: Poll::Busy,
            sleep_in: SleepIn::Auto,
        };
        let engine = Engine::start(&config, memory, Arc::clone(&balancer))?;
        let views = guests
            .iter()
            .zip(0..)
            .map(|(guest, index)| view(plan, guest, index));
        let generation = engine.publish(views.collect::<Result<_>>()?, nics.clone());
        let start = Instant::now();
        while engine.settled() < generation {
            ensure!(start.elapsed() < PATIENCE, "the worker does not start");
            std::thread::yield_now();
        }
        Ok(Host {
            engine,
            balancer,
            nics,
            window,
        })
    }

    /// The NICs receive from now on.
    fn receive(&self, plan: &JoinedPlan) {
        // One guest has room for all of them, also when it is about to offer a burst of buffers again.
        self.window.open(u64::from(plan.queue_size) * 3 / 4);
    }

    /// Frames that each NIC has sent or received.
    fn moved(&self, direction: Direction) -> Vec<u64> {
        let queues = self.nics.iter().map(|nic| &nic.queues[0]);
        let moved = queues.map(|queue| match direction {
            Direction::ToNics => queue.tx.lock().tx().counters().frames,
            Direction::FromNics => queue.rx_reader.counters().frames,
        });
        moved.collect()
    }

    /// Seconds of a turn in which there is nothing to do, as now.
    fn idle_turn(&self) -> f64 {
        std::thread::sleep(PICK_UP);
        let (began, before) = (Instant::now(), self.turns()[0]);
        std::thread::sleep(PICK_UP);
        began.elapsed().as_secs_f64() / exact(self.turns()[0] - before)
    }

    /// Turns of the workers, and those in which they moved something.
    fn turns(&self) -> [u64; 2] {
        let workers = self.engine.worker_counters();
        [
            workers.sum(|worker| worker.turns.get()),
            workers.sum(|worker| worker.busy_turns.get()),
        ]
    }
}

struct Guest {
    mac: [u8; 6],
    layout: Layout,
    memory: SharedMemory,
}

fn guest_mac(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, index + 1]
}

/// A guest that sends its share of the sessions to a stranger.
fn guest(plan: &JoinedPlan, index: u8) -> Result<Guest> {
    Guest::new(plan, outbound(plan, index), Some(STRIDE), None)
}

/// What it sends.
fn outbound(plan: &JoinedPlan, index: u8) -> Traffic {
    let flows = (plan.sessions / u32::from(plan.ports)).max(1);
    Traffic {
        from: guest_mac(index),
        to: STRANGER,
        frames: flows,
        first_flow: flows * u32::from(index),
        flows,
        sizes: vec![MIN_FRAME],
    }
}

/// What a NIC receives: of each of its share of the sessions of all guests an answer.
fn inbound(plan: &JoinedPlan, nic: u8) -> Box<[u8]> {
    let frames = (0..plan.ports).flat_map(|index| {
        let sends = outbound(plan, index);
        (0..sends.frames)
            .filter(move |number| number % u32::from(plan.nics) == u32::from(nic))
            .flat_map(move |number| {
                let mut frame = sends.frame(number);
                for (here, there, length) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
                    let (front, back) = frame.split_at_mut(there);
                    front[here..here + length].swap_with_slice(&mut back[..length]);
                }
                frame
            })
    });
    frames.collect()
}

impl Guest {
    fn new(
        plan: &JoinedPlan,
        sends: Traffic,
        stride: Option<u32>,
        receive_buffer: Option<u32>,
    ) -> Result<Guest> {
        let mac = sends.from;
        let port = PortPlan {
            packed: plan.packed,
            in_order: false,
            queue_size: plan.queue_size,
            receives: sends.longest(),
            receive_buffer,
            sends,
            stride,
            pages: Pages::HugeIfFree,
        };
        let layout = port.layout()?;
        let memory = port.memory(&layout)?;
        Ok(Guest { mac, layout, memory })
    }
}

fn balancer(plan: &JoinedPlan) -> Arc<Balancer> {
    Balancer::new(&BalancerConfig {
        nics: (0..plan.nics)
            .map(|index| NicInfo {
                id: format!("nic{index}"),
                weight: None,
            })
            .collect(),
        algorithm: Algorithm::Hash,
        workers: plan.workers,
        timeouts: Timeouts::default(),
        limits: SessionLimits::default(),
        session_capacity: plan.sessions as usize * 5 / 4 + 4096,
        hash_key: [7; 16],
    })
}

/// A NIC that swallows what it is given.
fn nic(plan: &JoinedPlan, index: u8, memory: &Arc<FrameMemory>, window: &Arc<Window>) -> Arc<Nic> {
    let rx: Box<dyn NicRx> = match plan.direction {
        Direction::ToNics => Box::new(memory::pair(index, memory, 1).0),
        Direction::FromNics => {
            let window = Arc::clone(window);
            Box::new(SourceRx::new(inbound(plan, index), MIN_FRAME as usize, window))
        }
    };
    let tx = SinkTx::new(index, memory, NIC_DEPTH);
    Arc::new(Nic {
        state: Arc::new(NicState::new(index, format!("nic{index}"), plan.workers, 1500)),
        mac: Mac([0x02, 0, 0, 0, 0x77, index]),
        queues: Box::new([NicQueue::new(rx, Box::new(tx))]),
        group: None,
        partial_checksums: false,
    })
}

/// The guest as the worker sees it.
fn view(plan: &JoinedPlan, guest: &Guest, index: u8) -> Result<fabric::Port> {
    let memory = GuestMemory::new(&[RegionSpec {
        guest_addr: 0,
        user_addr: guest.memory.user_address(0)?,
        size: guest.memory.bytes(),
        mmap_offset: 0,
        fd: Arc::new(guest.memory.file().try_clone()?.into()),
    }])?;
    let ring = |place: &RingPlace| {
        let spec = RingSpec {
            packed: plan.packed,
            size: place.size,
            desc_addr: guest.memory.user_address(place.descriptors)?,
            avail_addr: guest.memory.user_address(place.avail)?,
            used_addr: guest.memory.user_address(place.used)?,
            base: if plan.packed { 0x8000_8000 } else { 0 },
            event_idx: false,
            indirect: false,
            mergeable: true,
            version_1: true,
            call: None,
            memory: Arc::clone(&memory),
        };
        let ring = virtq::Ring::new(&spec).context("a ring of the bench")?;
        anyhow::Ok(Some(Arc::new(fabric::Ring::new(ring))))
    };
    let [receive, send] = &guest.layout.rings;
    let pair = QueuePair {
        tx: ring(send)?,
        tx_kick: None,
        tx_enabled: true,
        rx: ring(receive)?,
    };
    let state = PortState::new(index, format!("p{index}"), 1, plan.workers);
    Ok(fabric::Port::new(
        Arc::new(state),
        Some(Mac(guest.mac)),
        vec![pair],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::IMIX;
    use crate::verify::verify;

    fn plan(packed: bool, nics: u8) -> JoinedPlan {
        JoinedPlan {
            direction: Direction::ToNics,
            packed,
            sessions: 600,
            nics,
            ports: 2,
            queue_size: 256,
            workers: 1,
            cpu: 0,
            times: [Duration::from_millis(300), Duration::from_millis(200)],
        }
    }

    #[test]
    fn every_session_reaches_a_nic() {
        for packed in [false, true] {
            // However busy the machine is: at some time both threads run.
            let whole =
                (0..60).find_map(|_| run(&plan(packed, 3)).ok().filter(|report| report.sessions == 600));
            let report = whole.expect("a run that reaches every session");
            assert!(report.rate > 0.0 && report.least_nic > 0.1, "{report:?}");
        }
    }

    #[test]
    fn every_frame_of_a_nic_reaches_a_guest() {
        for packed in [false, true] {
            let plan = JoinedPlan {
                direction: Direction::FromNics,
                ..plan(packed, 3)
            };
            let whole = (0..60).find_map(|_| run(&plan).ok().filter(|report| report.sessions == 600));
            let report = whole.expect("a run that reaches every session");
            assert!(report.rate > 0.0 && report.dropped < 0.1, "{report:?}");
        }
    }

    /// As many frames as the ring has descriptors, and more, so that these are rewritten.
    fn exchange<K: RingKind>(packed: bool, frames: u32, sizes: &[u32], receive_buffer: Option<u32>) {
        let plan = plan(packed, 0);
        let guests = [(0, 1), (1, 0)].map(|(from, to)| {
            let sends = Traffic {
                from: guest_mac(from),
                to: guest_mac(to),
                frames,
                flows: 100,
                first_flow: 0,
                sizes: sizes.to_vec(),
            };
            (
                Guest::new(&plan, sends.clone(), None, receive_buffer).unwrap(),
                sends,
            )
        });
        let traffic = guests.each_ref().map(|(_, sends)| sends.clone());
        let guests = guests.map(|(guest, _)| guest);
        let mut ports: Vec<Port<'_, K::Ring<'_>>> = guests
            .iter()
            .map(|guest| Port::new(&guest.layout, &guest.memory))
            .collect();
        let _host = Host::start(&plan, &guests).unwrap();
        verify(&mut ports, &traffic, true, Duration::ZERO, 20 * u64::from(frames)).unwrap();
    }

    #[test]
    fn frames_between_guests_arrive_as_they_should() {
        for (frames, sizes) in [
            (256, &[60][..]),
            (256, &IMIX),
            (1000, &[1514]),
            (300, &[9014, 60]),
        ] {
            exchange::<Split>(false, frames, sizes, None);
            exchange::<Packed>(true, frames, sizes, None);
        }
    }

    /// A frame of 9014 bytes takes 5 buffers of 2048 and 18 of 512; one of 60 fills one of 72 bytes to its end.
    #[test]
    fn frames_arrive_in_several_buffers() {
        for (buffer, sizes) in [
            (2048, &[9014][..]),
            (512, &[9014, 60, 1514]),
            (72, &[60, 61, 200]),
        ] {
            exchange::<Split>(false, 256, sizes, Some(buffer));
            exchange::<Packed>(true, 256, sizes, Some(buffer));
        }
    }
}
