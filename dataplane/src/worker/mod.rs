//! A datapath thread: it polls its share of guest TX rings and NIC queues, switches frames, and waits when there are none.
//!
//! One turn looks at each queue of the share once and takes a bounded burst from each, so a busy guest delays its neighbours by no
//! more than that ([`allowance`]).

mod allowance;
mod deliver;
mod from_guest;
mod from_nic;
mod held;
mod pinned;
mod redrive;
mod sort;
#[cfg(test)]
mod tests;
mod to_guest;
mod wait;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vnic_lb::Clock;
use vnic_lb::balancer::{Balancer, Burst};
use vnic_lb::nics::NicIndex;

use crate::engine::SharedState;
use crate::fabric::{Fabric, Stock};
use crate::memory::frames::{ChunkCache, Frame, FrameMemory};
use crate::virtq::prepare_to_signal;
use allowance::{Allowance, BURST, LONG_BURST};
use deliver::Staged;
use held::Held;
use sort::Sorted;
pub use wait::{Poll, SleepIn};
pub(crate) use wait::{Waiter, choose};

/// Turns between two looks at the clock, of which each counts once more for every burst in it: a look costs as much as a frame, and a burst takes
/// microseconds, or tens of them where the kernel copies it.
const CLOCK_TURNS: usize = 16;

/// Frames of a busy worker between two looks at those that its NICs have in flight: each burst that is sent takes back what has left.
const SERVICE_FRAMES: usize = 512;

/// All that a worker needs beside the [`Fabric`].
struct Context {
    index: usize,
    memory: Arc<FrameMemory>,
    balancer: Arc<Balancer>,
    shared: Arc<SharedState>,
    stock: Stock,
    now: Clock,
    /// More sessions have timed out than were forgotten.
    upkeep_due: bool,
    /// Frames moved since the NICs' frames in flight were looked at.
    unserviced: usize,
    /// What the guests' rings may give in this turn.
    allowance: Allowance,
    /// The burst in hand from a guest.
    sorted: Sorted,
    /// Frames of the burst in hand.
    burst: Vec<Frame>,
    /// Frames on their way out by a NIC, beside what the balancer is told of them and what it answers.
    uplink: Vec<Frame>,
    observed: Burst,
    choices: Vec<Option<NicIndex>>,
    /// Frames by destination.
    staged: Staged,
    /// Copies of frames that a lost NIC had, beside what the balancer is told of them and what it answers.
    rescued: Vec<Frame>,
    rescued_observed: Burst,
    rescued_choices: Vec<Option<NicIndex>>,
}

/// Runs worker `index` until the engine stops.
pub(crate) fn run(index: usize, shared: Arc<SharedState>, mut waiter: Waiter) {
    prepare_to_signal();
    let memory = Arc::clone(&shared.memory);
    let mut context = Context {
        index,
        balancer: Arc::clone(&shared.balancer),
        stock: Stock::new(ChunkCache::new(Arc::clone(&memory))),
        memory,
        shared: Arc::clone(&shared),
        now: Clock::default(),
        upkeep_due: false,
        unserviced: 0,
        allowance: Allowance::new(),
        sorted: Sorted::new(),
        burst: Vec::with_capacity(BURST),
        uplink: Vec::with_capacity(BURST),
        observed: Burst::with_capacity(BURST),
        choices: Vec::with_capacity(BURST),
        staged: Staged::new(),
        rescued: Vec::new(),
        rescued_observed: Burst::default(),
        rescued_choices: Vec::new(),
    };
    while !shared.stopping.load(Ordering::Acquire) {
        // From here on nothing of an older fabric is in hand: no pointer, no guard, no frame of its queues.
        let fabric = shared.fabric.load_full();
        waiter.watch(&fabric);
        shared.acknowledge(index, fabric.generation);
        serve(&fabric, &mut context, &mut waiter);
    }
}

/// Takes turns until there is another fabric, or the engine stops.
fn serve(fabric: &Fabric, context: &mut Context, waiter: &mut Waiter) {
    let shared = Arc::clone(&context.shared);
    let counters = shared.counters.of(context.index);
    let mut held = Held::of_share(fabric, context.index);
    let mut turns_to_clock = 0;
    while shared.generation.load(Ordering::Acquire) == fabric.generation
        && !shared.stopping.load(Ordering::Acquire)
    {
        if turns_to_clock == 0 {
            turns_to_clock = CLOCK_TURNS;
            let before = std::mem::replace(&mut context.now, shared.now());
            if context.upkeep_due || before.millis != context.now.millis {
                context.upkeep_due = context.balancer.upkeep(context.now);
            }
        }
        let moved = context.turn(fabric, &mut held);
        turns_to_clock = turns_to_clock.saturating_sub(1 + moved / BURST);
        counters.turns.add(1);
        if moved > 0 {
            counters.busy_turns.add(1);
            waiter.busy();
        } else if waiter.idle(fabric, context, &mut held) {
            counters.sleeps.add(1);
            turns_to_clock = 0;
        }
    }
}

impl Context {
    /// One look at every queue of the share; returns the number of frames moved.
    fn turn(&mut self, fabric: &Fabric, held: &mut Held<'_>) -> usize {
        let share = &fabric.shares[self.index];
        let (mut moved, mut undelivered) = (0, 0);
        for ring in &mut held.rings {
            let taken = self.poll_guest(fabric, ring);
            moved += taken;
            undelivered += taken;
            // A NIC is visited, and kicked, once for what many guests have for it; but that does not wait for long.
            if undelivered >= LONG_BURST {
                self.deliver_staged(fabric);
                undelivered = 0;
            }
        }
        if undelivered > 0 {
            self.deliver_staged(fabric);
        }
        self.unserviced += moved;
        let service = moved == 0 || self.unserviced >= SERVICE_FRAMES;
        if service {
            self.unserviced = 0;
        }
        for queue in &mut held.nic_queues {
            moved += self.poll_nic(fabric, queue);
        }
        self.allowance.end_turn();
        if service {
            moved += self.service_queues(fabric, &share.nic_queues);
        }
        for &nic in &share.groups {
            moved += self.poll_group(fabric, nic);
        }
        moved + self.settle_debts(fabric)
    }
}
