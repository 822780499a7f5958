//! What an engine and its guests stand at: for the message of a test that waits in vain.

use std::fmt::{self, Display, Formatter};
use std::sync::Arc;

use super::lab::{Guest, Lab};
use crate::counters::DropReason;
use crate::fabric::Ring;
use crate::virtq::testing::Driver;

impl Display for Lab {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} workers, {:?}, {:?}",
            self.engine.workers(),
            self.poll,
            self.habits
        )?;
        let counters = self.engine.worker_counters();
        for worker in 0..self.engine.workers() {
            let counters = counters.of(worker);
            writeln!(
                f,
                "worker {worker}: {} turns, {} of them busy, {} sleeps, {} bursts contended, {} frames handed off",
                counters.turns.get(),
                counters.busy_turns.get(),
                counters.sleeps.get(),
                counters.contended_bursts.get(),
                counters.handed_off_frames.get()
            )?;
        }
        writeln!(
            f,
            "settled: {}; {:?}",
            self.engine.settled(),
            self.memory.census()
        )?;
        for guest in &self.guests {
            write_guest(f, guest)?;
        }
        for nic in &self.nics {
            write!(f, "{}: dropped", nic.state.id)?;
            write_drops(f, |reason| {
                nic.state.counters.sum(|counters| counters.drops.get(reason))
            })?;
            for queue in &nic.queues {
                write!(f, "; handed off and left: {}", queue.tx.has_handed_off())?;
                if let Some(sender) = queue.tx.try_lock() {
                    write!(
                        f,
                        ", pending: {}, {:?}",
                        sender.is_pending(),
                        sender.tx().counters()
                    )?;
                }
            }
            writeln!(f)?;
        }
        // Takes them away: nobody waits for them any more.
        std::iter::from_fn(|| self.engine.next_event()).try_for_each(|event| writeln!(f, "event: {event:?}"))
    }
}

fn write_guest(f: &mut Formatter<'_>, guest: &Guest) -> fmt::Result {
    let pair = &guest.state.pairs[0];
    write!(
        f,
        "{}: {} frames sent, {} received; dropped",
        guest.state.name,
        pair.sum(|counters| counters.guest_tx_frames.get()),
        pair.sum(|counters| counters.guest_rx_frames.get())
    )?;
    write_drops(f, |reason| guest.drops(reason))?;
    writeln!(f)?;
    write_ring(f, "TX", guest.started_tx(), &guest.tx)?;
    write_ring(f, "RX", guest.started_rx(), &guest.rx)
}

fn write_ring(f: &mut Formatter<'_>, name: &str, ring: Option<&Arc<Ring>>, driver: &Driver) -> fmt::Result {
    write!(f, "  {name} ring")?;
    match ring {
        None => write!(f, " stopped")?,
        Some(ring) => {
            if ring.is_broken() {
                write!(f, " broken")?;
            }
            write!(f, ", handed off and left: {}", ring.engine.has_handed_off())?;
            match ring.engine.try_lock() {
                None => write!(f, ", held by a worker")?,
                Some(engine) => write!(
                    f,
                    ", device: base {:#x}, sees buffers: {}",
                    engine.base(),
                    engine.has_available()
                )?,
            }
        }
    }
    writeln!(f, "; driver: {driver}")
}

fn write_drops(f: &mut Formatter<'_>, count: impl Fn(DropReason) -> u64) -> fmt::Result {
    let mut none = true;
    for &reason in DropReason::ALL {
        let count = count(reason);
        if count > 0 {
            none = false;
            write!(f, " {count} {}", reason.name())?;
        }
    }
    if none { write!(f, " nothing") } else { Ok(()) }
}
