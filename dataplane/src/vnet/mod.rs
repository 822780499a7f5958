//! virtio-net on top of a ring: headers off and on, frames in and out, in bursts.
//!
//! What a guest sends is looked at first ([`look`]). Each frame is then copied once: into another guest's buffers ([`forward`]), or into
//! frame memory ([`take`]). [`finish`] gives the guest its buffers back.

mod forward;
mod header;
mod look;
mod rx;
mod tx;

pub use forward::forward;
pub use look::{Flaw, Look, finish, look, peek};
pub use rx::{GuestRxBurst, give_to_guest};
pub use tx::{WIRE_MIN_LEN, discard_from_guest, take};

#[cfg(test)]
mod tests;
