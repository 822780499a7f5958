//! Probes of what lies behind a link: small frames that a station nearby answers, sent by a NIC in its own name.
//!
//! A NIC asks in its own name (its MAC address, its IP address if it has one in the target's subnet), so the answer comes to
//! that address, by whichever NIC the switch chooses. The XDP program counts it on its way to the host (`bpf/vnic.bpf.c`); [`Answers`]
//! reads the counts. When to send and what to make of it is decided by `vnic_lb::health`.

mod answers;
mod frame;
mod inject;
mod target;

pub(crate) use answers::expected;
pub use answers::{Answer, Answers};
pub use frame::{Asker, write_probe};
pub use inject::{Injected, Injector};
pub use target::{ProbeTarget, ProbeTargetError};
