//! The probes of the NICs: sent and looked at by the health thread, at its pace.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};
use vnic_dataplane::memory::frames::FrameMemory;
use vnic_dataplane::probe::{Answer, Asker, Injector, ProbeTarget, write_probe};
use vnic_lb::MAX_NICS;
use vnic_lb::balancer::Balancer;
use vnic_lb::health::{Cast, Input, Prober, Says};
use vnic_lb::nics::NicIndex;
use vnic_lb::{Millis, mac::Mac};

use super::Watched;

/// Whom a NIC asks, and in whose name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct ProbePlan {
    pub(in crate::daemon) target: ProbeTarget,
    pub(in crate::daemon) asker: Asker,
}

/// What everybody may see of a NIC's probes.
#[derive(Debug, Default)]
pub(in crate::daemon) struct ProbeView {
    pub(in crate::daemon) sent: AtomicU64,
    pub(in crate::daemon) answered: AtomicU64,
    /// Of the last answer, in microseconds; 0: none yet.
    pub(in crate::daemon) rtt_us: AtomicU32,
}

struct Probing {
    plan: ProbePlan,
    prober: Prober,
    /// The target's link-layer address, once it has answered.
    known: Option<Mac>,
    /// The probe under way asks where the target is, to have it echo then.
    asks_where: bool,
}

impl Probing {
    /// What the answer `from` this address says.
    fn says(&self, from: Mac) -> Says {
        match self.asks_where {
            false => Says::Well,
            true if self.known == Some(from) => Says::Known,
            true => Says::Found,
        }
    }

    /// Writes a probe, to everybody if the target's address is not known or may be another one now.
    fn write(&mut self, cast: Cast, bytes: &mut Vec<u8>) {
        let known = self.known.filter(|_| cast == Cast::Target);
        let ProbePlan { target, asker } = &self.plan;
        // Without an address of its own the NIC can ask for no echo.
        self.asks_where =
            matches!(target, ProbeTarget::Echo(_)) && asker.address.is_some() && known.is_none();
        write_probe(bytes, asker, *target, known);
    }
}

/// The probes of all NICs.
pub(super) struct Probes {
    of: [Option<Probing>; MAX_NICS],
    injector: Injector,
    bytes: Vec<u8>,
    /// As last read.
    answers: [Answer; MAX_NICS],
}

impl Probes {
    pub(super) fn new(memory: &Arc<FrameMemory>) -> Probes {
        Probes {
            of: Default::default(),
            injector: Injector::new(memory),
            bytes: Vec::new(),
            answers: Default::default(),
        }
    }

    /// Begins, goes on in another name, or ends; returns whether the NIC is to be judged anew.
    pub(super) fn set(&mut self, index: NicIndex, plan: Option<ProbePlan>, nics: &[Option<Watched>]) -> bool {
        let at = usize::from(index) % MAX_NICS;
        match (&mut self.of[at], plan) {
            (Some(probing), Some(plan)) if probing.plan.target == plan.target => {
                probing.plan = plan;
                false
            }
            (place, Some(plan)) => {
                self.answers = read(nics);
                *place = Some(Probing {
                    plan,
                    prober: Prober::new(self.answers[at].count),
                    known: None,
                    asks_where: false,
                });
                true
            }
            (place, None) => place.take().is_some(),
        }
    }

    /// Whether looks should be frequent although no frames move.
    pub(super) fn hurry(&self) -> bool {
        let mut probers = self.of.iter().flatten();
        probers.any(|probing| probing.prober.hurries() && probing.prober.waits())
    }

    /// Looks at what was answered and sends what is due; `tell` is called with what it says of a NIC. Returns whether workers must be
    /// woken.
    pub(super) fn look(
        &mut self,
        nics: &[Option<Watched>],
        balancer: &Balancer,
        now: Millis,
        busy: bool,
        mut tell: impl FnMut(NicIndex, Input),
    ) -> bool {
        if self.of.iter().flatten().any(|probing| probing.prober.waits()) {
            self.answers = read(nics);
        }
        let mut owing = false;
        for (index, (probing, watched)) in (0..).zip(self.of.iter_mut().zip(nics)) {
            let (Some(probing), Some(watched)) = (probing, watched) else {
                continue;
            };
            let link = watched.carrier.state();
            let nic = watched.nic.upgrade().filter(|_| link.usable && link.carrier);
            let Some(nic) = nic else {
                probing.prober.restart();
                continue;
            };
            let (answer, view) = (self.answers[usize::from(index)], &watched.link.probes);
            let (says, at_us) = (probing.says(answer.from), answer.at_ns / 1_000);
            let step = probing
                .prober
                .look(monotonic_us(), answer.count, at_us, says, busy);
            if step.answered {
                probing.known = Some(answer.from);
                view.answered.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(verdict) = step.verdict {
                self.injector.collect(&nic);
                tell(index, verdict);
            }
            if let Some(rtt_us) = step.rtt_us {
                view.rtt_us.store(rtt_us, Ordering::Relaxed);
                balancer.record_probe(index, now, place(probing.plan.target), rtt_us);
            }
            if let Some(cast) = step.send {
                probing.write(cast, &mut self.bytes);
                let injected = self.injector.send(&nic, &self.bytes);
                owing |= injected.owing;
                match injected.sent {
                    true => _ = view.sent.fetch_add(1, Ordering::Relaxed),
                    false => probing.prober.unsent(),
                }
            }
        }
        owing
    }
}

/// The answers of each NIC, by whichever NIC they came. An earlier socket's program is gone with its counts.
fn read(nics: &[Option<Watched>]) -> [Answer; MAX_NICS] {
    let mut all = [Answer::default(); MAX_NICS];
    for watched in nics.iter().flatten() {
        for (sum, answer) in all.iter_mut().zip(watched.answers.read()) {
            *sum = sum.and(answer);
        }
    }
    all
}

/// A number for the target that is the same for all NICs.
fn place(target: ProbeTarget) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(target)
}

/// The clock of the XDP program.
fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        // Since the start of the machine.
        time.tv_sec() * 1_000_000 + time.tv_nsec() / 1_000
    });
    u64::try_from(now).unwrap_or(0)
}
