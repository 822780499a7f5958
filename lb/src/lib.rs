//! Which NIC a session leaves by: parsing, keys, the slot table, the session table and the algorithms.
//!
//! Pure logic. Nothing here does I/O, reads a clock or holds `unsafe`: time is passed in as [`Millis`], so
//! every rule is tested without a NIC and simulated at scale. `dataplane` calls one face, [`balancer::Balancer`].
#![forbid(unsafe_code)]

pub mod balancer;
mod counters;
pub mod key;
pub mod mac;
pub mod nics;
pub mod parse;
pub mod policy;
pub mod slots;
pub mod state;
pub mod table;

/// The most NICs (uplinks) that one daemon drives.
pub const MAX_NICS: usize = 8;

/// Milliseconds of a monotonic clock that the caller owns; wraps after 49 days, compared with wrapping arithmetic.
pub type Millis = u32;
