//! Counters of the frame path: one padded copy per worker, written without locked instructions, added up when
//! somebody asks.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

/// A counter that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the owning worker may call this: two writers would lose counts (never memory safety).
    pub fn add(&self, count: u64) {
        // A plain load and store instead of a locked add: there is one writer, and readers need no ordering.
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(count),
            Ordering::Relaxed,
        );
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One copy of `T` for each worker, on cache lines of its own.
#[derive(Debug)]
pub struct PerWorker<T>(Box<[CachePadded<T>]>);

impl<T: Default> PerWorker<T> {
    /// A copy for each of `workers`.
    #[must_use]
    pub fn new(workers: usize) -> PerWorker<T> {
        PerWorker((0..workers).map(|_| CachePadded::new(T::default())).collect())
    }

    /// The copy that `worker` writes.
    #[must_use]
    pub fn of(&self, worker: usize) -> &T {
        &self.0[worker]
    }

    /// The sum over all workers of what `read` takes from each copy.
    pub fn sum(&self, read: impl Fn(&T) -> u64) -> u64 {
        self.0.iter().map(|copy| read(copy.deref())).sum()
    }
}

macro_rules! drop_reasons {
    ($( $(#[doc = $doc:literal])+ $variant:ident = $name:literal, )+) => {
        /// Why a frame was dropped. Each reason is a counter of the port or NIC that the frame came from (or, for
        /// the reasons that say "the destination", the one that it was going to).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum DropReason { $( $(#[doc = $doc])+ $variant, )+ }

        impl DropReason {
            /// All reasons, in the order of their counters.
            pub const ALL: &[DropReason] = &[ $( DropReason::$variant, )+ ];

            /// The name in statistics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( DropReason::$variant => $name, )+ }
            }
        }
    };
}

drop_reasons! {
    /// No chunk of frame memory was free.
    NoChunk = "no_chunk",
    /// Shorter than an Ethernet header.
    TooShort = "too_short",
    /// Longer than a frame may be, or than the destination's buffers hold.
    TooLong = "too_long",
    /// A virtio-net header that is malformed or asks for an offload that was not negotiated.
    BadHeader = "bad_header",
    /// The guest's ring is started but not enabled.
    RingDisabled = "ring_disabled",
    /// The source MAC is not the port's own (anti-spoofing).
    SpoofedSource = "spoofed_source",
    /// The source MAC cannot be learned: group, zero, a NIC's or another port's.
    MacRefused = "mac_refused",
    /// The destination is 01:80:c2:00:00:00 to 0f, which no bridge forwards.
    LinkLocalControl = "link_local_control",
    /// The destination is the port that sent the frame.
    ToItself = "to_itself",
    /// Nobody here has the destination MAC.
    UnknownDestination = "unknown_destination",
    /// It came from a NIC with the source MAC of a running local port: a loop.
    LoopedBack = "looped_back",
    /// Topology `pinned`: switches sent it to several NICs, and it is taken from another one.
    OtherNic = "other_nic",
    /// Its VLAN tag, or the lack of one, is not allowed on the port that it came from or was going to.
    VlanNotAllowed = "vlan_not_allowed",
    /// No NIC is alive.
    NoNicAlive = "no_nic_alive",
    /// The destination NIC's TX ring was full.
    NicRingFull = "nic_ring_full",
    /// The destination NIC's kernel side dropped it, for want of a carrier or of room, and the NIC stayed alive.
    NicRefused = "nic_refused",
    /// The destination port has no running, enabled RX ring.
    PortNotReady = "port_not_ready",
    /// The destination guest offered no receive buffer.
    NoGuestBuffer = "no_guest_buffer",
    /// Another thread held the destination ring and its hand-off ring was full.
    HandOffFull = "hand_off_full",
    /// The destination guest broke its ring.
    RingBroken = "ring_broken",
}

/// A counter for each [`DropReason`].
#[derive(Debug)]
pub struct DropCounters([Counter; DropReason::ALL.len()]);

impl Default for DropCounters {
    fn default() -> Self {
        DropCounters(std::array::from_fn(|_| Counter::default()))
    }
}

impl DropCounters {
    /// Counts `count` drops.
    pub fn add(&self, reason: DropReason, count: u64) {
        self.0[reason as usize].add(count);
    }

    /// Drops counted for `reason`.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].get()
    }
}

/// One worker's counters of one queue pair.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// Frames taken from the guest.
    pub guest_tx_frames: Counter,
    /// Bytes in them.
    pub guest_tx_bytes: Counter,
    /// Frames given to the guest.
    pub guest_rx_frames: Counter,
    /// Bytes in them.
    pub guest_rx_bytes: Counter,
    /// Notifications (call eventfd writes) sent to the guest for either ring.
    pub notifications: Counter,
}

/// One worker's counters of one port.
#[derive(Debug, Default)]
pub struct PortCounters {
    /// Frames that this port sent, or that were going to it, and were dropped.
    pub drops: DropCounters,
}

/// One worker's counters of one NIC.
#[derive(Debug, Default)]
pub struct NicCounters {
    /// Frames from or to this NIC that were dropped.
    pub drops: DropCounters,
    /// Copies of frames in flight that left by another NIC when this one was lost.
    pub redriven: Counter,
}

/// One worker's counters of itself.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Turns of the loop.
    pub turns: Counter,
    /// Turns that moved at least one frame, or came back to a ring that another thread had held.
    pub busy_turns: Counter,
    /// Times that it went to sleep.
    pub sleeps: Counter,
    /// Bursts that found their destination held by another thread.
    pub contended_bursts: Counter,
    /// Frames of those bursts, left on the destination's hand-off ring.
    pub handed_off_frames: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_distinct_names_and_counters() {
        let counters = DropCounters::default();
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, position);
            counters.add(*reason, 1);
        }
        let names: std::collections::HashSet<_> =
            DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        assert!(DropReason::ALL.iter().all(|reason| counters.get(*reason) == 1));
    }

    #[test]
    fn copies_add_up() {
        let counters = PerWorker::<WorkerCounters>::new(3);
        for worker in 0..3 {
            counters.of(worker).turns.add(10);
        }
        assert_eq!(counters.sum(|copy| copy.turns.get()), 30);
    }
}
