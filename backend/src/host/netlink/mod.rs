//! Netlink: what the kernel says of links and of their drivers, and what it is asked to change.
//!
//! Interfaces are named by index throughout, so that a new name changes nothing.

mod codec;
pub mod ethtool;
pub mod link;
pub mod netdev;
mod socket;
