//! The control socket: what an operator and monitoring tools ask, and what the daemon answers. The protocol is described in
//! docs/control-protocol.md.

pub mod client;
pub mod flow;
pub mod protocol;
pub mod render;
pub mod report;
pub mod server;
pub mod station;
