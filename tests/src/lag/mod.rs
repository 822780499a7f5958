//! A small user-space switch with a static link-aggregation group.
//!
//! One side is the group: the ends of several veth pairs. The other side is one TAP interface in the peer's namespace,
//! so that the peer has one MAC behind all links, as a router behind a real LAG has. Frames from the peer are spread
//! over the live links by session; broadcast and multicast leave by one designated live link; frames from any link
//! go to the peer; nothing goes from link to link.

pub mod hash;
mod switch;

pub use switch::{Distribution, LagSwitch, LinkCounters};
