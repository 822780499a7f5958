//! One ring's part of the device state.
//!
//! Two switches that do not know of each other: *started* (from SET_VRING_KICK to GET_VRING_BASE) and *enabled*
//! (SET_VRING_ENABLE, or SET_FEATURES without bit 30). A ring that is started but disabled is processed without effect:
//! guest TX is consumed and dropped, guest RX gets nothing (vhost-user specification, "Ring states").

use std::sync::Arc;

use vhost::vhost_user::message::VhostUserVringAddrFlags;
use vmm_sys_util::eventfd::EventFd;

use super::fault::Refusal;

/// Largest ring (virtio 1.2, 2.7).
const MAX_RING_SIZE: u32 = 32768;

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

pub(super) fn checked_size(size: u32) -> Result<u16, Refusal> {
    match u16::try_from(size) {
        Ok(valid) if size.is_power_of_two() && size <= MAX_RING_SIZE => Ok(valid),
        _ => Err(Refusal::QueueSize { size }),
    }
}

pub(super) fn checked_base(base: u32) -> Result<u16, Refusal> {
    u16::try_from(base).map_err(|_| Refusal::Base { base })
}

pub(super) fn checked_enable(value: u32) -> Result<bool, Refusal> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Refusal::Enable { value }),
    }
}

/// Alignments of virtio 1.2, 2.7. They hold for user addresses too: regions are made of whole pages.
pub(super) fn checked_addrs(flags: u32, addrs: RingAddrs) -> Result<(), Refusal> {
    // VHOST_VRING_F_LOG is the only flag there is, and the dirty log is not offered.
    const _: () = assert!(VhostUserVringAddrFlags::all().bits() == 1);
    if flags != 0 {
        return Err(Refusal::VringFlags { flags });
    }
    let parts = [
        ("descriptor table", addrs.desc, 16),
        ("available ring", addrs.avail, 2),
        ("used ring", addrs.used, 4),
    ];
    match parts.into_iter().find(|(_, addr, align)| addr % align != 0) {
        Some((part, addr, align)) => Err(Refusal::Misaligned { part, addr, align }),
        None => Ok(()),
    }
}
