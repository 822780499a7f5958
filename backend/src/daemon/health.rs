//! The thread that watches the NICs' links and says which NICs are alive.
//!
//! It alone writes the balancer's alive set, by the rules of [`vnic_lb::health`]. It runs before ordinary threads if it may, sleeps nearly
//! all the time, and does nothing that can wait long: what is slow (opening, closing, netlink) is the control thread's or the
//! keeper's, which send it commands and read its news.

mod probes;

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::{TimeSpec, TimeValLike};
use tracing::debug;
use vnic_dataplane::engine::Watcher;
use vnic_dataplane::fabric::{Nic, NicState};
use vnic_dataplane::memory::frames::FrameMemory;
use vnic_dataplane::probe::Answers;
use vnic_lb::MAX_NICS;
use vnic_lb::balancer::Balancer;
use vnic_lb::health::{Cause, Event, Health, HealthConfig, Input};
use vnic_lb::nics::NicIndex;
use vnic_lb::pinned::{Move, Stations};

use self::probes::{ProbeView, Probes};
use super::guarded::Guarded;
use crate::host::carrier::CarrierWatch;

pub(super) use self::probes::ProbePlan;

/// Time between two looks at the links while frames move, and a NIC is driven without copies: its driver tells nobody that frames
/// stay on its ring. Also between looks for an answer that is late, and for a link while there is none.
const PACE: Duration = Duration::from_micros(250);

/// The same if the kernel copies the frames of all NICs: it refuses the first one after the loss, which wakes the thread at once. Each
/// look costs some 20 us of a core, most of them for going to sleep.
const COPY_PACE: Duration = Duration::from_millis(1);

/// The same while none do, so that an idle daemon costs next to nothing: what is lost then is told by netlink, and noticed with the
/// first frame that the kernel refuses, at the latest.
const IDLE_PACE: Duration = Duration::from_millis(20);

/// How long after the last frame the faster pace is kept.
const LINGER: Duration = Duration::from_millis(20);

/// Looks of which one reads everything; the others read one file, and only of links that are up.
const WHOLE_LOOK_EVERY: u32 = 8;

/// [`MAX_NICS`] as an index.
const NICS: NicIndex = 8;
const _: () = assert!(NICS as usize == MAX_NICS);

/// What the thread is told.
pub(super) enum Command {
    /// Watch a NIC from now on; one of that index is forgotten.
    Watch(NicIndex, Watched),
    /// Watch a NIC whose interface has come back, and probe it like this: it waits like one whose carrier was lost.
    WatchAgain(NicIndex, Watched, Option<ProbePlan>),
    /// A NIC is being removed.
    Forget(NicIndex),
    /// The interface left this network namespace.
    Left(NicIndex),
    /// The kernel said that something of a link changed: look now.
    Look,
    /// Probe like this from now on, or no more.
    Probe(NicIndex, Option<ProbePlan>),
    /// Something else was seen of a NIC.
    Input(NicIndex, Input),
}

/// A NIC under watch.
pub(super) struct Watched {
    carrier: CarrierWatch,
    state: Arc<NicState>,
    link: Arc<LinkView>,
    /// Its sockets, as long as somebody else keeps them open.
    nic: Weak<Nic>,
    answers: Arc<Answers>,
    zero_copy: bool,
}

/// What everybody may see of a link.
#[derive(Debug, Default)]
pub(super) struct LinkView {
    carrier: AtomicBool,
    pub(super) probes: ProbeView,
}

impl LinkView {
    /// Whether the link could carry frames at the last look.
    pub(super) fn has_carrier(&self) -> bool {
        self.carrier.load(Ordering::Relaxed)
    }
}

impl Watched {
    pub(super) fn new(
        carrier: CarrierWatch,
        state: Arc<NicState>,
        link: Arc<LinkView>,
        nic: &Arc<Nic>,
        answers: Arc<Answers>,
        zero_copy: bool,
    ) -> Watched {
        Watched {
            carrier,
            state,
            link,
            nic: Arc::downgrade(nic),
            answers,
            zero_copy,
        }
    }

    fn show(&self) {
        let state = self.carrier.state();
        self.link
            .carrier
            .store(state.usable && state.carrier, Ordering::Relaxed);
    }
}

/// What the thread tells.
#[derive(Debug, Clone)]
pub(super) enum News {
    /// A NIC became alive or dead.
    Turned { event: Event, at: Instant },
    /// A NIC's interface is gone.
    Vanished(NicIndex),
    /// Topology `pinned`: stations are other NICs' now, and are to be announced there.
    Moved(Vec<Move>),
}

/// The control thread's handle. Dropping it ends the thread.
pub(super) struct HealthThread {
    commands: Option<Sender<Command>>,
    news: Receiver<News>,
    wake: Arc<EventFd>,
    notify: Arc<EventFd>,
    thread: Guarded,
}

impl HealthThread {
    /// Takes the first look at `nics`, and starts.
    pub(super) fn start(
        config: HealthConfig,
        nics: Vec<(NicIndex, Watched)>,
        balancer: Arc<Balancer>,
        stations: Option<Arc<Stations>>,
        watcher: Watcher,
        memory: &Arc<FrameMemory>,
    ) -> io::Result<HealthThread> {
        let (commands, orders) = channel();
        let (teller, news) = channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let notify = Arc::new(EventFd::from_flags(flags)?);
        let wake = watcher.suspect();
        let mut pulse = Pulse {
            health: Health::new(config),
            nics: Default::default(),
            probes: Probes::new(memory),
            balancer,
            stations,
            watcher,
            teller,
            notify: Arc::clone(&notify),
            events: Vec::new(),
        };
        for (index, watched) in nics {
            pulse.watch(index, watched);
        }
        pulse.balancer.first_look_over();
        let alarm = Arc::clone(&notify);
        let tell = move || _ = alarm.write(1);
        let thread = Guarded::spawn("health", tell, move || pulse.run(&orders))?;
        Ok(HealthThread {
            commands: Some(commands),
            news,
            wake,
            notify,
            thread,
        })
    }

    pub(super) fn tell(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // Fails only when the thread has ended: with us, or by a panic, which ends us too.
            let _ = commands.send(command);
            let _ = self.wake.write(1);
        }
    }

    /// What the thread panicked with, if it did.
    pub(super) fn failure(&self) -> Option<&str> {
        self.thread.failure()
    }

    /// Readable when there is news, or none will come any more.
    pub(super) fn fd(&self) -> RawFd {
        self.notify.as_fd().as_raw_fd()
    }

    /// What the thread has told since the last call.
    pub(super) fn news(&self) -> Vec<News> {
        let _ = self.notify.read();
        self.news.try_iter().collect()
    }
}

impl Drop for HealthThread {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write(1);
        self.thread.join();
    }
}

/// What the thread works on.
struct Pulse {
    health: Health,
    nics: [Option<Watched>; MAX_NICS],
    probes: Probes,
    balancer: Arc<Balancer>,
    /// In topology `pinned`.
    stations: Option<Arc<Stations>>,
    watcher: Watcher,
    teller: Sender<News>,
    notify: Arc<EventFd>,
    /// Empty between two uses.
    events: Vec<Event>,
}

impl Pulse {
    fn run(mut self, orders: &Receiver<Command>) {
        if let Err(error) = self.watcher.run_first() {
            debug!("links are watched at ordinary priority: {error}");
        }
        let wake = self.watcher.suspect();
        let (mut busy_turns, mut busy_at) = (0, None::<Instant>);
        let mut looks = 0u32;
        loop {
            let now = Instant::now();
            let turns = self.watcher.busy_turns();
            if turns != busy_turns {
                (busy_turns, busy_at) = (turns, Some(now));
            }
            // Without a NIC, frames move between guests only, and there is nothing to look at.
            let busy = busy_at.is_some_and(|at| now.duration_since(at) < LINGER)
                && self.nics.iter().any(Option::is_some);
            let woken = self.sleep(&wake, self.pace(busy));
            // Frames have nowhere to go: only a look at everything sees a link that comes back.
            let mut whole = busy && self.is_dark();
            loop {
                match orders.try_recv() {
                    Ok(command) => whole |= self.obey(command),
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
                }
            }
            looks = looks.wrapping_add(1);
            whole |= looks.is_multiple_of(WHOLE_LOOK_EVERY);
            self.look(whole, woken);
            self.probe(busy);
            self.health.tick(self.watcher.now(), &mut self.events);
            self.apply();
        }
    }

    /// How long until the next look, unless something wakes the thread.
    fn pace(&self, busy: bool) -> Duration {
        let zero_copy = || self.nics.iter().flatten().any(|nic| nic.zero_copy);
        match busy {
            _ if self.probes.hurry() => PACE,
            true if zero_copy() || self.is_dark() => PACE,
            true => COPY_PACE,
            false => IDLE_PACE,
        }
    }

    /// Whether no NIC is alive.
    fn is_dark(&self) -> bool {
        self.balancer.alive().snapshot() == 0
    }

    /// Sleeps for `pace`, less if time alone may change something sooner, or until woken; says whether it was woken.
    fn sleep(&self, wake: &EventFd, pace: Duration) -> bool {
        let due = self.health.next_deadline(self.watcher.now());
        let due = due.map_or(pace, |ms| Duration::from_millis(u64::from(ms)).max(PACE));
        let timeout = TimeSpec::nanoseconds(i64::try_from(pace.min(due).as_nanos()).unwrap_or(i64::MAX));
        let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        // An error (EINTR) is a wake-up like any other.
        let woken = ppoll(&mut fds, Some(timeout), None).unwrap_or(1) > 0;
        if woken {
            let _ = wake.read();
        }
        woken
    }

    /// Carries a command out; says whether to look at everything.
    fn obey(&mut self, command: Command) -> bool {
        let now = self.watcher.now();
        match command {
            Command::Watch(index, watched) => self.watch(index, watched),
            Command::WatchAgain(index, watched, plan) => self.watch_again(index, watched, plan),
            Command::Forget(index) => {
                if let Some(place) = self.nics.get_mut(usize::from(index)) {
                    *place = None;
                }
                self.probes.set(index, None, &self.nics);
                self.health.remove(index, now, &mut self.events);
            }
            Command::Left(index) => {
                if let Some(Some(nic)) = self.nics.get_mut(usize::from(index)) {
                    nic.carrier.left();
                    self.feed(index);
                }
            }
            Command::Look => return true,
            Command::Probe(index, plan) => {
                if self.probes.set(index, plan, &self.nics) {
                    let on = plan.is_some();
                    self.health
                        .input(index, now, Input::Probing { on }, &mut self.events);
                }
            }
            Command::Input(index, input) => self.health.input(index, now, input, &mut self.events),
        }
        self.apply();
        false
    }

    fn watch(&mut self, index: NicIndex, watched: Watched) {
        if self.take(index, watched) {
            self.health.add(index);
            self.feed(index);
            self.apply();
        }
    }

    /// The probes begin before its carrier is told, so that it cannot be alive without an answer.
    fn watch_again(&mut self, index: NicIndex, watched: Watched, plan: Option<ProbePlan>) {
        if self.take(index, watched) {
            self.probes.set(index, plan, &self.nics);
            self.health.add_again(index, self.watcher.now(), plan.is_some());
            self.feed(index);
            self.apply();
        }
    }

    /// Takes in what is needed to watch a NIC; `false`: there is no such index.
    fn take(&mut self, index: NicIndex, watched: Watched) -> bool {
        let Some(place) = self.nics.get_mut(usize::from(index)) else {
            return false;
        };
        *place = Some(watched);
        self.probes.set(index, None, &self.nics);
        true
    }

    fn look(&mut self, whole: bool, woken: bool) {
        for index in 0..NICS {
            let Some(Some(nic)) = self.nics.get_mut(usize::from(index)) else {
                continue;
            };
            let suspect = woken && nic.state.suspect.swap(false, Ordering::AcqRel);
            if (whole || suspect || nic.carrier.glance()) && nic.carrier.poll() {
                if nic.carrier.vanished() {
                    self.tell(News::Vanished(index));
                }
                self.feed(index);
                self.apply();
            }
        }
    }

    /// Sends the probes that are due, and looks at what was answered.
    fn probe(&mut self, busy: bool) {
        let now = self.watcher.now();
        let Pulse {
            health,
            nics,
            probes,
            balancer,
            events,
            ..
        } = self;
        let owing = probes.look(nics, balancer, now, busy, |index, verdict| {
            health.input(index, now, verdict, events);
        });
        if owing {
            self.watcher.wake_workers();
        }
        self.apply();
    }

    /// Tells the rules what the last look at a NIC found.
    fn feed(&mut self, index: NicIndex) {
        let Some(Some(nic)) = self.nics.get(usize::from(index)) else {
            return;
        };
        nic.show();
        let (now, state) = (self.watcher.now(), nic.carrier.state());
        let carrier = Input::Carrier {
            up: state.carrier,
            down_count: Some(state.losses),
        };
        for input in [Input::Link { up: state.usable }, carrier] {
            self.health.input(index, now, input, &mut self.events);
        }
    }

    /// Lets everybody know what changed, the workers first.
    fn apply(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        let (mut lost, mut turned) = (false, false);
        for event in events.drain(..) {
            let watched = self.nics.get(usize::from(event.nic)).and_then(Option::as_ref);
            let flag = watched.map(|nic| &nic.state.lost);
            if event.alive {
                if let Some(flag) = flag {
                    flag.store(false, Ordering::Release);
                }
                self.balancer.set_alive(event.nic, true, event.at);
            } else {
                self.balancer.set_alive(event.nic, false, event.at);
                // After that, or copies of its frames would be sent to it again.
                if let Some(flag) = flag {
                    flag.store(true, Ordering::Release);
                }
                lost = true;
            }
            turned = true;
            self.tell(News::Turned {
                event,
                at: Instant::now(),
            });
        }
        if lost {
            self.watcher.wake_workers();
        }
        // The workers use the same NICs already.
        if let Some(stations) = self.stations.as_ref().filter(|_| turned) {
            let moves = stations.settle(self.watcher.now());
            if !moves.is_empty() {
                self.tell(News::Moved(moves));
            }
        }
        self.events = events;
    }

    fn tell(&self, news: News) {
        let _ = self.teller.send(news);
        let _ = self.notify.write(1);
    }
}

/// The cause of a change in a few words, for reports and logs; `before`: of the change before it.
pub(super) fn words(cause: Cause, vanished: bool, before: Option<Cause>) -> String {
    match (cause, before) {
        (Cause::LinkDown, _) if vanished => "vanished".to_owned(),
        (Cause::LinkDown, _) => "set down".to_owned(),
        (Cause::CarrierLost, _) => "carrier lost".to_owned(),
        (Cause::CarrierBlinked, _) => "carrier flapped".to_owned(),
        (Cause::Fit, Some(Cause::LinkDown)) => "set up".to_owned(),
        (Cause::Fit, Some(Cause::CarrierLost | Cause::CarrierBlinked)) => "carrier back".to_owned(),
        (Cause::Fit, Some(Cause::ProbesLost { .. } | Cause::NotProbed)) => {
            "probes are answered again".to_owned()
        }
        (other, _) => other.to_string(),
    }
}
