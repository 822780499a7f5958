//! Which NICs are alive: a state machine that is told what others see, and says what follows from it.
//!
//! The rules: what a NIC loses counts at once, what it gets back counts late. A NIC is alive when it has a carrier
//! for [`HealthConfig::updelay_ms`], has not flapped too often, and (with probes) answers them. Without a carrier it is
//! dead whatever else is said. Other faults (probes lost, frames stuck, kicks that fail) kill it only if there is a better
//! NIC: sending by a suspect is better than by none. While no probe of any NIC is answered, it is the target that is gone, and
//! probes count for nothing. A NIC that fails again and again, in whatever way, is left out until it is quiet. When no NIC is alive,
//! the best that has a carrier is taken at once.
//!
//! How to use it: make one [`Health`], [`Health::add`] each NIC ([`Health::add_again`] if its interface has come back), pass everything that is seen to [`Health::input`] as it is
//! seen, and call [`Health::tick`] at [`Health::next_deadline`] or every few milliseconds. Both append an [`Event`] for
//! each change: pass it to [`crate::balancer::Balancer::set_alive`], log it, and tell it to the operator.

mod cause;
mod flap;
mod nic;
mod probe;
#[cfg(test)]
mod tests;

pub use self::cause::Cause;
pub use self::flap::FlapDamping;
pub use self::nic::Fitness;
use self::nic::NicHealth;
pub use self::probe::{Cast, Prober, Says, Step};
use crate::nics::{NicIndex, NicSet};
use crate::{MAX_NICS, Millis};

/// How patient to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HealthConfig {
    /// How long a carrier must last before its NIC is alive again, in milliseconds. A switch's port is up before it
    /// forwards. Not for a carrier that was there at the first look.
    pub updelay_ms: Millis,
    /// Probes lost in a row that make a NIC suspect.
    pub probe_losses: u32,
    /// How long frames may wait for completion before the NIC is suspect, in milliseconds; ten times as long
    /// while it receives pause frames, which stop a healthy NIC too.
    pub stall_ms: Millis,
    /// Failed kicks within a second that make a NIC suspect. `ENETDOWN`, `ENODEV` and `ENXIO` do at once.
    pub kick_errors: u32,
    /// How long a NIC stays suspect after its last stall or failed kick, in milliseconds: while it is dead nothing is sent,
    /// so nothing can show that it works again.
    pub fault_hold_ms: Millis,
    /// When a NIC that comes and goes is left out.
    pub flap: FlapDamping,
}

impl Default for HealthConfig {
    fn default() -> HealthConfig {
        HealthConfig {
            updelay_ms: 200,
            probe_losses: 3,
            stall_ms: 100,
            kick_errors: 16,
            fault_hold_ms: 1_000,
            flap: FlapDamping::default(),
        }
    }
}

/// Something that was seen of a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Its carrier (`carrier` in sysfs, or `IFLA_CARRIER`), and how often it was lost so far (`carrier_down_count`, or
    /// `IFLA_CARRIER_DOWN_COUNT`): a rise shows a loss too short to be seen itself.
    Carrier {
        /// There is a carrier.
        up: bool,
        /// Losses so far, if the kernel counts them.
        down_count: Option<u32>,
    },
    /// The interface is administratively up (`IFF_UP`) and there.
    Link {
        /// It can be used.
        up: bool,
    },
    /// The oldest frame on its transmit ring has waited for so long. 0 tells that frames move again.
    TxWaiting {
        /// Milliseconds.
        for_ms: Millis,
        /// The NIC has received pause frames meanwhile.
        paused: bool,
    },
    /// Kicks of its transmit rings failed since the last look.
    KickFailed {
        /// The kernel's last error number.
        errno: i32,
        /// How many.
        count: u32,
    },
    /// Probes are sent from now on, or no more: what was known from them is forgotten. A NIC that is probed comes back only
    /// after an answer.
    Probing {
        /// They are.
        on: bool,
    },
    /// A probe was answered.
    ProbeOk,
    /// A probe was not answered in time.
    ProbeLost,
}

/// A NIC became alive or dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Which one.
    pub nic: NicIndex,
    /// Whether it is alive now.
    pub alive: bool,
    /// Why.
    pub cause: Cause,
    /// When.
    pub at: Millis,
}

/// A NIC's health, as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicReport {
    /// Whether it can carry frames.
    pub alive: bool,
    /// What made it so; the time of the last [`Event`].
    pub since: Option<(Cause, Millis)>,
    /// What it waits for, or suffers from, now.
    pub fitness: Fitness,
    /// Carrier losses seen since it was added.
    pub losses: u32,
}

/// The health of all NICs.
#[derive(Debug)]
pub struct Health {
    config: HealthConfig,
    nics: [Option<NicHealth>; MAX_NICS],
}

impl Health {
    /// Without NICs.
    #[must_use]
    pub fn new(config: HealthConfig) -> Health {
        Health {
            config,
            nics: [const { None }; MAX_NICS],
        }
    }

    /// How patient it is.
    #[must_use]
    pub fn config(&self) -> &HealthConfig {
        &self.config
    }

    /// Changes the patience from now on.
    pub fn set_config(&mut self, config: HealthConfig) {
        self.config = config;
    }

    /// Begins with a NIC: dead until its carrier is told. One of that index is forgotten.
    pub fn add(&mut self, nic: NicIndex) {
        if let Some(place) = self.nics.get_mut(usize::from(nic)) {
            *place = Some(NicHealth::default());
        }
    }

    /// Begins anew with a NIC whose interface was gone and is back: dead until its carrier is told, has lasted for the updelay and, if
    /// it is `probed`, a probe was answered. How often it has failed before counts on.
    pub fn add_again(&mut self, nic: NicIndex, now: Millis, probed: bool) {
        if let Some(place) = self.nics.get_mut(usize::from(nic)) {
            *place = Some(NicHealth::returned(place.take(), now, probed));
        }
    }

    /// Forgets a NIC. Appends events of others that its going makes alive, not its own.
    pub fn remove(&mut self, nic: NicIndex, now: Millis, events: &mut Vec<Event>) {
        if let Some(place) = self.nics.get_mut(usize::from(nic)) {
            *place = None;
        }
        self.settle(now, events);
    }

    /// Takes in what was seen of a NIC; unknown NICs are ignored. Appends what changes because of it.
    pub fn input(&mut self, nic: NicIndex, now: Millis, input: Input, events: &mut Vec<Event>) {
        if let Some(Some(health)) = self.nics.get_mut(usize::from(nic)) {
            health.input(&self.config, now, input);
            self.settle(now, events);
        }
    }

    /// Lets time pass: appends what changes because of it.
    pub fn tick(&mut self, now: Millis, events: &mut Vec<Event>) {
        self.settle(now, events);
    }

    /// Milliseconds until time alone may change something; `None`: nothing waits.
    #[must_use]
    pub fn next_deadline(&self, now: Millis) -> Option<Millis> {
        let waits = self.nics.iter().flatten().filter(|nic| !nic.alive);
        let heed = self.heeds_probes();
        waits.filter_map(|nic| nic.wait_ms(&self.config, heed, now)).min()
    }

    /// Whether probes tell NICs apart: some NIC's are answered, or some NIC is not probed. Else it is the target that is gone.
    fn heeds_probes(&self) -> bool {
        let mut usable = self.nics.iter().flatten().filter(|nic| nic.has_carrier());
        usable.any(|nic| nic.answers(&self.config))
    }

    /// The NICs that are alive.
    #[must_use]
    pub fn alive(&self) -> NicSet {
        let nics = self.nics.iter().enumerate();
        nics.filter(|(_, nic)| nic.as_ref().is_some_and(|nic| nic.alive))
            .fold(0, |set, (at, _)| set | 1 << at)
    }

    /// The state of one NIC.
    #[must_use]
    pub fn report(&self, nic: NicIndex, now: Millis) -> Option<NicReport> {
        let health = self.nics.get(usize::from(nic))?.as_ref()?;
        Some(NicReport {
            alive: health.alive,
            since: health.since,
            fitness: health.fitness(&self.config, self.heeds_probes(), now),
            losses: health.losses,
        })
    }

    /// Brings the NICs to what their fitness says.
    fn settle(&mut self, now: Millis, events: &mut Vec<Event>) {
        let (config, heed) = (self.config, self.heeds_probes());
        for nic in self.nics.iter_mut().flatten() {
            nic.forget_past(&config, now);
            if !heed {
                nic.acquit();
            }
        }
        let fitness = |nic: &NicHealth| nic.fitness(&config, heed, now);
        let best = self.nics.iter().flatten().map(fitness).min();
        let suspects_must_go = best.is_some_and(|best| !best.is_suspect());
        for (index, nic) in (0u8..).zip(&mut self.nics) {
            let Some(nic) = nic else { continue };
            let fitness = fitness(nic);
            let alive = match fitness {
                Fitness::Fit => true,
                Fitness::Down(_) => false,
                _ if fitness.is_suspect() && suspects_must_go => false,
                // What it waits for holds back a dead NIC only.
                _ => nic.alive,
            };
            if alive != nic.alive || nic.flapped {
                nic.turn(index, alive, fitness.cause(), now, events);
            }
        }
        if self.alive() != 0 {
            return;
        }
        // Nothing to lose: the best that there is, without waiting.
        let usable = (0u8..).zip(&mut self.nics).filter_map(|(index, nic)| {
            let nic = nic.as_mut()?;
            let fitness = nic.fitness(&config, heed, now);
            (!matches!(fitness, Fitness::Down(_))).then_some((fitness, index, nic))
        });
        if let Some((_, index, nic)) = usable.min_by_key(|&(fitness, index, _)| (fitness, index)) {
            nic.turn(index, true, Cause::LastResort, now, events);
        }
    }
}
