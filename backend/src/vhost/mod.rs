//! The vhost-user protocol, back-end side, for virtio-net.
//!
//! Three layers, each usable without the one above it:
//!
//! - [`message`]: bytes and fds to a checked [`Message`], and a [`Reply`] to bytes. Pure.
//! - [`connection`]: one Unix socket, never blocking: keeps half messages, hands fds to the message they came with, buffers
//!   replies.
//! - [`device`]: what the messages mean: features, memory, the state of each ring ([`vring`]). No I/O but mapping memory. It
//!   never touches a running ring: where a request would, it says [`Step::Quiesce`] and waits for [`Device::complete`].
//!
//! A caller polls a [`Connection`] for a message, hands it to [`Device::handle`], stops and restarts rings as the answer
//! asks, and sends the reply. Any [`Fault`] ends the connection and nothing else.
//!
//! # Why not a ready-made handler
//!
//! `vhost`'s `BackendReqHandler`, and `vhost-user-backend` on top of it, cannot serve QEMU's net front-end: they refuse
//! SET_VRING_ENABLE before SET_FEATURES (which QEMU sends), block the thread on half a message, lose the stream when a
//! signal interrupts a read after a header, and end a connection whose refusal they have already reported. One thread here
//! serves many front-ends, so none may hold it up; hence an own message layer over that crate's message bodies, request
//! numbers and flags.

pub mod connection;
pub mod device;
mod eventfd;
pub mod fault;
pub mod features;
pub mod message;
mod regions;
pub mod vring;

pub use connection::Connection;
pub use device::{Device, DeviceConfig, MapMemory, Pending, QueueNum, Step};
pub use fault::{Fault, Refusal};
pub use message::{Code, Message, Reply};
pub use regions::SharedRegion;
pub use vring::{RingAddrs, RingView};
