//! The control thread's handle on the workers: start, publish, know when a publication has settled, stop.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use arc_swap::ArcSwap;
use crossbeam_queue::ArrayQueue;
use crossbeam_utils::CachePadded;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd as WaitFd};
use nix::unistd::Pid;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vnic_lb::balancer::Balancer;
use vnic_lb::mac::Mac;
use vnic_lb::pinned::{Station, Stations};
use vnic_lb::{Clock, Millis};

use crate::counters::{PerWorker, WorkerCounters};
use crate::fabric::{Fabric, MAX_PORTS, MAX_QUEUE_PAIRS, Nic, Port, PortIndex};
use crate::memory::frames::FrameMemory;
use crate::memory::prefer_huge_pages;
use crate::virtq::RingError;
use crate::worker::{self, Waiter};

pub use crate::worker::{Poll, SleepIn};

/// What a worker tells the control thread. Rare: never more than one for each ring, port and worker until it is answered.
#[derive(Debug)]
pub enum Event {
    /// A port without a configured MAC sent its first acceptable source address.
    MacSeen {
        /// The port.
        port: PortIndex,
        /// The address.
        mac: Mac,
    },
    /// Topology `pinned`: a port sent a frame of a station that has no NIC of its own yet; it went by its slot.
    StationSeen {
        /// The port.
        port: PortIndex,
        /// The station.
        station: Station,
    },
    /// A driver broke a rule; the ring was marked broken and is left alone.
    RingBroken {
        /// The port.
        port: PortIndex,
        /// vhost-user ring index: 2 x queue pair for RX, + 1 for TX.
        ring: usize,
        /// The rule.
        error: RingError,
    },
    /// A worker panicked: its queues stand still, and nothing published settles any more.
    WorkerFailed {
        /// Which.
        worker: usize,
        /// The panic's message.
        cause: String,
    },
}

/// Room for one event of each ring, two of each port, and some for workers.
const EVENTS: usize = MAX_PORTS * (2 * MAX_QUEUE_PAIRS + 2) + 64;

/// What workers and the control thread share.
pub(crate) struct SharedState {
    pub(crate) fabric: ArcSwap<Fabric>,
    /// Generation of `fabric`, stored after it: one relaxed look a turn tells a worker whether to reload.
    pub(crate) generation: CachePadded<AtomicU64>,
    pub(crate) stopping: AtomicBool,
    started: Instant,
    pub(crate) memory: Arc<FrameMemory>,
    pub(crate) balancer: Arc<Balancer>,
    /// In topology `pinned`, where these decide instead of sessions.
    pub(crate) stations: Option<Arc<Stations>>,
    pub(crate) counters: PerWorker<WorkerCounters>,
    /// Wakes each worker from its sleep.
    pub(crate) wake: Box<[EventFd]>,
    /// For each worker, the last generation that it picked up.
    seen: Box<[CachePadded<AtomicU64>]>,
    events: ArrayQueue<Event>,
    /// Wakes the control thread: an acknowledgement or an event.
    notify: EventFd,
    /// Wakes whoever watches the NICs' links: the kernel refuses frames.
    suspect: Arc<WaitFd>,
}

impl SharedState {
    /// The balancer's clock: time since the start.
    #[allow(clippy::cast_possible_truncation, reason = "both numbers wrap by definition")]
    pub(crate) fn now(&self) -> Clock {
        let micros = self.started.elapsed().as_micros();
        Clock {
            millis: (micros / 1000) as Millis,
            micros: micros as u32,
        }
    }

    pub(crate) fn wake_all(&self) {
        for wake in &self.wake {
            let _ = wake.write(1);
        }
    }

    pub(crate) fn acknowledge(&self, worker: usize, generation: u64) {
        // Release: whoever reads this also sees everything the worker did with the older fabric.
        self.seen[worker].store(generation, Ordering::Release);
        let _ = self.notify.write(1);
    }

    /// A NIC's [`crate::fabric::NicState::suspect`] was set.
    pub(crate) fn suspect(&self) {
        let _ = self.suspect.write(1);
    }

    pub(crate) fn report(&self, event: Event) {
        // Cannot be full, see `EVENTS`; if it were, the counters would still tell.
        let _ = self.events.push(event);
        let _ = self.notify.write(1);
    }
}

/// How many workers, where, and how they wait.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Number of workers, at least 1.
    pub workers: usize,
    /// CPU of each worker, taken round robin; empty: not pinned.
    pub cpus: Vec<usize>,
    /// How they wait.
    pub poll: Poll,
    /// What those that sleep do it in.
    pub sleep_in: SleepIn,
}

/// Why the workers cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An eventfd could not be made.
    #[error("cannot make an eventfd: {0}; raise the limit of open files (ulimit -n)")]
    EventFd(#[source] io::Error),
    /// A thread could not be started.
    #[error("cannot start worker {worker}: {source}")]
    Thread {
        /// Which.
        worker: usize,
        /// Why.
        source: io::Error,
    },
    /// A worker would have nothing to wait on.
    #[error(
        "cannot make an epoll set for worker {worker}: {source}; raise the limit of open files (ulimit -n)"
    )]
    Epoll {
        /// Which.
        worker: usize,
        /// Why.
        source: io::Error,
    },
    /// A worker could not be pinned.
    #[error(
        "cannot pin worker {worker} to CPU {cpu}: {source}; give --cpus only CPUs that are online and allowed here"
    )]
    Pin {
        /// Which.
        worker: usize,
        /// Where.
        cpu: usize,
        /// Why.
        source: nix::Error,
    },
}

/// The running workers.
pub struct Engine {
    shared: Arc<SharedState>,
    threads: Vec<JoinHandle<()>>,
    host_macs: Arc<[Mac]>,
}

impl Engine {
    /// Starts the workers on an empty fabric; sessions decide which NIC a frame leaves by.
    pub fn start(
        config: &EngineConfig,
        memory: Arc<FrameMemory>,
        balancer: Arc<Balancer>,
    ) -> Result<Engine, EngineError> {
        Engine::start_with(config, memory, balancer, None)
    }

    /// The same for topology `pinned`: stations decide.
    pub fn start_pinned(
        config: &EngineConfig,
        memory: Arc<FrameMemory>,
        stations: Arc<Stations>,
    ) -> Result<Engine, EngineError> {
        let balancer = Arc::clone(stations.balancer());
        Engine::start_with(config, memory, balancer, Some(stations))
    }

    fn start_with(
        config: &EngineConfig,
        memory: Arc<FrameMemory>,
        balancer: Arc<Balancer>,
        stations: Option<Arc<Stations>>,
    ) -> Result<Engine, EngineError> {
        let workers = config.workers.max(1);
        for addresses in balancer.table_addresses() {
            prefer_huge_pages(addresses);
        }
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(EngineError::EventFd);
        let shared = Arc::new(SharedState {
            fabric: ArcSwap::from_pointee(Fabric::empty(workers)),
            generation: CachePadded::default(),
            stopping: AtomicBool::new(false),
            started: Instant::now(),
            memory,
            balancer,
            stations,
            counters: PerWorker::new(workers),
            wake: (0..workers).map(|_| eventfd()).collect::<Result<_, _>>()?,
            seen: (0..workers).map(|_| CachePadded::default()).collect(),
            events: ArrayQueue::new(EVENTS),
            notify: eventfd()?,
            suspect: {
                let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
                let made = WaitFd::from_flags(flags);
                Arc::new(made.map_err(|errno| EngineError::EventFd(errno.into()))?)
            },
        });
        let mut engine = Engine {
            shared,
            threads: Vec::with_capacity(workers),
            host_macs: Arc::default(),
        };
        let sleep_in = worker::choose(config.poll, config.sleep_in);
        for index in 0..workers {
            let cpu = (!config.cpus.is_empty()).then(|| config.cpus[index % config.cpus.len()]);
            engine.start_worker(index, cpu, config.poll, sleep_in)?;
        }
        Ok(engine)
    }

    fn start_worker(
        &mut self,
        index: usize,
        cpu: Option<usize>,
        poll: Poll,
        sleep_in: SleepIn,
    ) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        let waiter = Waiter::new(&shared, index, poll, sleep_in).map_err(|source| EngineError::Epoll {
            worker: index,
            source,
        })?;
        let (pinned, outcome) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || {
                let result = cpu.map_or(Ok(()), pin);
                let failed = result.is_err();
                let _ = pinned.send(result);
                if !failed {
                    run_to_the_end(index, shared, waiter);
                }
            })
            .map_err(|source| EngineError::Thread {
                worker: index,
                source,
            })?;
        self.threads.push(thread);
        match (outcome.recv(), cpu) {
            (Ok(Err(source)), Some(cpu)) => Err(EngineError::Pin {
                worker: index,
                cpu,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.threads.len()
    }

    /// No port may learn these addresses of the host, from the next publication on.
    pub fn reserve_macs(&mut self, macs: Vec<Mac>) {
        self.host_macs = macs.into();
    }

    /// Replaces what the workers see; returns the new generation. It has settled once [`Engine::settled`] reaches it.
    pub fn publish(&self, ports: Vec<Port>, nics: Vec<Arc<Nic>>) -> u64 {
        let generation = self.shared.generation.load(Ordering::Relaxed) + 1;
        let fabric =
            Fabric::new(generation, ports, nics, self.workers()).with_host_macs(Arc::clone(&self.host_macs));
        self.shared.fabric.store(Arc::new(fabric));
        self.shared.generation.store(generation, Ordering::Release);
        self.wake();
        generation
    }

    /// Has every worker look at all its queues.
    pub fn wake(&self) {
        self.shared.wake_all();
    }

    /// What another thread needs to watch the NICs for the workers.
    #[must_use]
    pub fn watcher(&self) -> Watcher {
        Watcher(Arc::clone(&self.shared))
    }

    /// The newest generation that every worker has picked up: nobody uses anything that only older ones held.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.shared
            .seen
            .iter()
            .map(|seen| seen.load(Ordering::Acquire))
            .min()
            .unwrap_or(0)
    }

    /// Readable when a generation may have settled or an event waits.
    #[must_use]
    pub fn notify_fd(&self) -> RawFd {
        self.shared.notify.as_raw_fd()
    }

    /// Clears [`Engine::notify_fd`]; call before looking at [`Engine::settled`] and [`Engine::next_event`].
    pub fn clear_notify(&self) {
        let _ = self.shared.notify.read();
    }

    /// The next event, oldest first.
    #[must_use]
    pub fn next_event(&self) -> Option<Event> {
        self.shared.events.pop()
    }

    /// The time as the workers tell it to the balancer.
    #[must_use]
    pub fn now(&self) -> Millis {
        self.shared.now().millis
    }

    /// The workers' counters of themselves.
    #[must_use]
    pub fn worker_counters(&self) -> &PerWorker<WorkerCounters> {
        &self.shared.counters
    }
}

/// The workers as a thread sees them that watches the NICs' links.
#[derive(Clone)]
pub struct Watcher(Arc<SharedState>);

impl Watcher {
    /// Readable when a NIC's [`crate::fabric::NicState::suspect`] was set; to be read, and written to wake the watcher for other
    /// reasons.
    #[must_use]
    pub fn suspect(&self) -> Arc<WaitFd> {
        Arc::clone(&self.0.suspect)
    }

    /// Has every worker look at all its queues, for frames of a NIC that was lost.
    pub fn wake_workers(&self) {
        self.0.wake_all();
    }

    /// Turns of all workers that moved a frame: no frame is lost while they stand still.
    #[must_use]
    pub fn busy_turns(&self) -> u64 {
        self.0.counters.sum(|worker| worker.busy_turns.get())
    }

    /// The time as the workers tell it to the balancer.
    #[must_use]
    pub fn now(&self) -> Millis {
        self.0.now().millis
    }

    /// Has the calling thread run before every ordinary one, so that it keeps its pace when all cores are busy. It must sleep most of
    /// the time.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_SYS_NICE or a limit (`ulimit -r`) that allows it.
    pub fn run_first(&self) -> io::Result<()> {
        crate::xsk::run_first()
    }
}

impl Drop for Engine {
    /// Stops and joins the workers; each ends after the turn that it is in.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.wake();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Runs a worker; should it panic, which is a bug of ours, the control thread must hear of it.
fn run_to_the_end(index: usize, shared: Arc<SharedState>, waiter: Waiter) {
    let state = Arc::clone(&shared);
    // Whatever state the worker left behind, nobody trusts it any more.
    let run = AssertUnwindSafe(|| worker::run(index, shared, waiter));
    if let Err(panic) = catch_unwind(run) {
        state.report(Event::WorkerFailed {
            worker: index,
            cause: panic_message(&*panic),
        });
    }
}

/// The message of a panic that was caught.
#[must_use]
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}

fn pin(cpu: usize) -> Result<(), nix::Error> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}
