//! Virtqueues, AF_XDP sockets, the XDP program, and the workers that move frames between them.
//!
//! `unsafe` lives in [`memory`], [`virtq`] and [`xsk`], and where a worker hands io_uring its requests (`worker/wait/uring.rs`);
//! everything else here is safe code over their types.

pub mod checksum;
pub mod counters;
pub mod engine;
pub mod fabric;
pub mod group;
#[cfg(test)]
mod interleavings;
pub mod memory;
pub mod neighbour;
pub mod nic;
pub mod probe;
pub mod program;
pub mod switch;
pub mod virtq;
pub mod vnet;
mod worker;
pub mod xsk;
