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
use vnic_dataplane::nic::{SinkTx, memory};
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
/// Far beyond what a worker needs to pick up a fabric.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JoinedPlan {
    /// Packed rings.
    pub packed: bool,
    /// Sessions, of all guests together.
    pub sessions: u32,
    /// NICs that they are balanced over.
    pub nics: u8,
    /// Guests that send, one queue pair each.
    pub ports: u8,
    /// Descriptors of each ring.
    pub queue_size: u16,
    /// CPU of the worker.
    pub cpu: usize,
    /// Before anything is counted, and counted.
    #[serde(skip)]
    pub times: [Duration; 2],
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct JoinedReport {
    /// Frames that the NICs sent in a second.
    pub rate: f64,
    /// Nanoseconds of the worker for each of them.
    pub ns_per_frame: f64,
    /// Looks of the generator at which the worker had not taken enough for another burst, of all its looks.
    pub refused: f64,
    /// Frames that the worker took from the guests and no NIC sent, of those that it took.
    pub dropped: f64,
    /// The share of the NIC that sent least, as a part of an even share.
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
    let flood = |ports: &mut [_], measured| {
        let plan = FloodPlan {
            both: true,
            warm_up: Duration::ZERO,
            measured,
            pauses: FloodPlan::PAUSES,
        };
        Flood::new(ports, plan).run()
    };
    flood(&mut ports, warm_up)?;
    let before = host.sent();
    let (began, cpu_before) = (Instant::now(), process_time()?);
    let report = flood(&mut ports, measured)?;
    let cpu_share = share_of_two(cpu_before, began)?;
    let after = host.sent();
    let each: Vec<u64> = after.iter().zip(&before).map(|(now, then)| now - then).collect();
    ensure!(each.iter().sum::<u64>() > 0, "no NIC has sent anything");
    Ok(sum_up(
        &each,
        report.seconds,
        &report.ports,
        (host.balancer.stats().sessions, cpu_share),
    ))
}

#[allow(clippy::cast_precision_loss, reason = "ratios are not exact")]
fn sum_up(nics: &[u64], seconds: f64, ports: &[Counts], (sessions, cpu_share): (u64, f64)) -> JoinedReport {
    let sent = nics.iter().sum::<u64>() as f64;
    let of_ports = |what: fn(&Counts) -> u64| ports.iter().map(what).sum::<u64>() as f64;
    let taken = of_ports(|counts| counts.sent);
    let least = nics.iter().min().copied().unwrap_or(0) as f64;
    JoinedReport {
        rate: sent / seconds,
        ns_per_frame: seconds * 1e9 / sent,
        refused: of_ports(|counts| counts.refused) / of_ports(|counts| counts.looks),
        // What was under way when the counters were read makes a difference of a few bursts.
        dropped: (1.0 - sent / taken).max(0.0),
        least_nic: least * nics.len() as f64 / sent,
        sessions,
        cpu_share,
    }
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

/// Where the frames of [`timed`] go.
#[derive(Debug, Clone, Copy)]
pub enum Destination {
    /// Through the session table to the plan's NICs, 60 bytes each.
    Nics,
    /// From the first guest to a second one, frames of this size.
    Guest(u32),
}

/// Times a number of frames.
pub type Timer<'t> = &'t mut dyn FnMut(u64) -> Result<Duration>;

/// Has `work` time frames that take this way through a worker that is up and warm; of the plan, `times` is not used.
///
/// # Errors
/// If memory is short, or the worker does not start.
pub fn timed(plan: &JoinedPlan, to: Destination, work: impl FnOnce(Timer<'_>)) -> Result<()> {
    if plan.packed {
        timed_with::<Packed>(plan, to, work)
    } else {
        timed_with::<Split>(plan, to, work)
    }
}

fn timed_with<K: RingKind>(plan: &JoinedPlan, to: Destination, work: impl FnOnce(Timer<'_>)) -> Result<()> {
    let (guests, what): (_, fn(&Counts) -> u64) = match to {
        Destination::Nics => {
            let guests = (0..plan.ports).map(|index| guest(plan, index));
            (guests.collect::<Result<Vec<_>>>()?, |counts| counts.sent)
        }
        Destination::Guest(size) => {
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
    let _host = Host::start(plan, &guests)?;
    let flood_plan = FloodPlan {
        both: matches!(to, Destination::Nics),
        warm_up: Duration::ZERO,
        measured: Duration::ZERO,
        pauses: FloodPlan::PAUSES,
    };
    let mut flood = Flood::new(&mut ports, flood_plan);
    // Every frame in memory once: all sessions are there.
    flood.run_frames(u64::from(plan.sessions) + 1, what)?;
    work(&mut |frames| flood.run_frames(frames, what));
    Ok(())
}

/// A worker that serves guests and NICs.
struct Host {
    // Ends first.
    _engine: Engine,
    balancer: Arc<Balancer>,
    nics: Vec<Arc<Nic>>,
}

impl Host {
    fn start(plan: &JoinedPlan, guests: &[Guest]) -> Result<Host> {
        let memory = FrameMemory::new(CHUNKS)?;
        let balancer = balancer(plan);
        let nics: Vec<Arc<Nic>> = (0..plan.nics).map(|index| nic(index, &memory)).collect();
        for index in 0..plan.nics {
            balancer.alive().set(index, true);
        }
        let config = EngineConfig {
            workers: 1,
            cpus: vec![plan.cpu],
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
            _engine: engine,
            balancer,
            nics,
        })
    }

    /// Frames that each NIC has sent.
    fn sent(&self) -> Vec<u64> {
        self.nics
            .iter()
            .map(|nic| nic.queues[0].tx.lock().tx().counters().frames)
            .collect()
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
    let flows = (plan.sessions / u32::from(plan.ports)).max(1);
    let sends = Traffic {
        from: guest_mac(index),
        to: STRANGER,
        frames: flows,
        first_flow: flows * u32::from(index),
        flows,
        sizes: vec![MIN_FRAME],
    };
    Guest::new(plan, sends, Some(STRIDE), None)
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
        workers: 1,
        timeouts: Timeouts::default(),
        limits: SessionLimits::default(),
        session_capacity: plan.sessions as usize * 5 / 4 + 4096,
        hash_key: [7; 16],
    })
}

/// A NIC that swallows what it is given.
fn nic(index: u8, memory: &Arc<FrameMemory>) -> Arc<Nic> {
    let (rx, ..) = memory::pair(index, memory, 1);
    let tx = SinkTx::new(index, memory, NIC_DEPTH);
    Arc::new(Nic {
        state: Arc::new(NicState::new(index, format!("nic{index}"), 1, 1500)),
        mac: Mac([0x02, 0, 0, 0, 0x77, index]),
        queues: Box::new([NicQueue::new(Box::new(rx), Box::new(tx))]),
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
    let state = PortState::new(index, format!("p{index}"), 1, 1);
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
            packed,
            sessions: 600,
            nics,
            ports: 2,
            queue_size: 256,
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
