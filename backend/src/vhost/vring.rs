//! One ring's part of the device state.
//!
//! Two switches that do not know of each other: *started* (from SET_VRING_KICK to GET_VRING_BASE) and *enabled*
//! (SET_VRING_ENABLE, or SET_FEATURES without bit 30). A ring that is started but disabled is processed without effect:
//! guest TX is consumed and dropped, guest RX gets nothing (vhost-user specification, "Ring states").

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Where the parts of a ring are, in the front-end's (user) addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// What was set for a ring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// 0 until SET_VRING_NUM.
    pub(super) size: u16,
    pub(super) addrs: Option<RingAddrs>,
    pub(super) base: u16,
    pub(super) kick: Option<Arc<EventFd>>,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) err: Option<Arc<EventFd>>,
    pub(super) started: bool,
    pub(super) enabled: bool,
}

impl Vring {
    /// Started, and nothing but memory can be missing.
    pub(super) fn ready(&self) -> bool {
        self.started && self.size != 0 && self.addrs.is_some()
    }
}

/// How a ring stands, for whoever runs it.
#[derive(Debug, Clone)]
pub struct RingView<'a> {
    /// Its index: even for guest RX, odd for guest TX (virtio 1.2, 5.1.2).
    pub index: usize,
    /// It is started and all it needs is known: process it.
    pub runnable: bool,
    /// It may have effects. A runnable ring that is not enabled: discard guest TX, give no guest RX.
    pub enabled: bool,
    /// SET_VRING_KICK came and no GET_VRING_BASE since.
    pub started: bool,
    /// Descriptors; 0 while unknown.
    pub size: u16,
    /// Its parts.
    pub addrs: Option<&'a RingAddrs>,
    /// Index of the next available entry to take.
    pub base: u16,
    /// Readable when the driver made buffers available. `None` on a started ring: poll it. It is an eventfd, but its
    /// flags are shared with the front-end: wait for it edge-triggered and never read it.
    pub kick: Option<Arc<EventFd>>,
    /// To be written when the driver wants to know of used buffers.
    pub call: Option<Arc<EventFd>>,
    /// To be written when the ring is found broken.
    pub err: Option<Arc<EventFd>>,
    /// Acknowledged features.
    pub features: u64,
}
