//! virtio-net on top of a ring: headers off and on, frames in and out, in bursts.

mod header;
mod rx;
mod tx;

pub use rx::{GuestRxBurst, give_to_guest};
pub use tx::{GuestTxBurst, discard_from_guest, take_from_guest};

#[cfg(test)]
mod tests;
