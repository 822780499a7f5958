//! Which NIC a session leaves by: parsing, keys, the slot table, the session table and the algorithms.
//!
//! Pure logic. Nothing here does I/O, reads a clock or holds `unsafe`: time is passed in as [`Millis`], so
//! every rule is tested without a NIC and simulated at scale. `dataplane` calls one face, [`balancer::Balancer`].
#![forbid(unsafe_code)]

pub mod balancer;
mod counters;
pub mod health;
mod in_flight;
pub mod key;
pub mod mac;
pub mod nics;
pub mod parse;
pub mod pinned;
mod plan;
pub mod policy;
mod rebalance;
pub mod signals;
pub mod slots;
pub mod state;
pub mod table;
mod watch;

/// The most NICs (uplinks) that one daemon drives.
pub const MAX_NICS: usize = 8;

/// Milliseconds of a monotonic clock that the caller owns; wraps after 49 days, compared with wrapping arithmetic.
pub type Millis = u32;

/// A moment of the caller's monotonic clock. Milliseconds run timers; microseconds, which wrap after 71 minutes,
/// measure round trips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Clock {
    /// Milliseconds.
    pub millis: Millis,
    /// Microseconds, wrapping.
    pub micros: u32,
}

impl From<Millis> for Clock {
    fn from(millis: Millis) -> Clock {
        Clock {
            millis,
            micros: millis.wrapping_mul(1000),
        }
    }
}
