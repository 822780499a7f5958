//! What the host has and allows: interfaces, carrier, privileges, sockets, inherited descriptors, kept state.

pub mod activation;
pub mod carrier;
pub mod channels;
pub mod cpus;
pub mod hash_key;
pub mod interface;
pub mod kernel;
pub mod memory;
pub mod netlink;
pub mod notify;
pub mod offload;
pub mod privileges;
pub mod socket;
pub mod survey;
