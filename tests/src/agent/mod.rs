//! The agent inside the guest, its protocol, and the tests' end of it: JSON, one message a line, over a serial port.

mod client;
mod protocol;
mod server;

pub use client::AgentClient;
pub use protocol::{Command, Interface, Message, Output, Reply, Request};
pub use server::serve;
