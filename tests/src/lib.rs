//! Fixtures that the end-to-end tests and the demo share: network namespaces, a user-space LAG switch, QEMU guests with
//! an agent inside, the daemon under test, and the traffic that runs between guest and peer.
//!
//! Everything here needs root and works only inside namespaces that it makes itself.

pub mod agent;
pub mod binaries;
pub mod daemon;
pub mod fabric;
#[cfg(feature = "front-end")]
pub mod frontend;
pub mod lag;
#[cfg(feature = "front-end")]
pub mod ledger;
pub mod lock;
pub mod netns;
pub mod nic_host;
pub mod pcap;
pub mod process;
pub mod qemu;
pub mod scene;
pub mod switches;
pub mod sys;
pub mod testpmd;
pub mod traffic;
pub mod unit;
#[cfg(feature = "front-end")]
pub mod vm_host;
