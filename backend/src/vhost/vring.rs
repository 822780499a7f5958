//! One ring's part of the device state.
//!
//! Two switches that do not know of each other: *started* (from SET_VRING_KICK to GET_VRING_BASE) and *enabled*
//! (SET_VRING_ENABLE, or SET_FEATURES without bit 30). A ring that is started but disabled is processed without effect:
//! guest TX is consumed and dropped, guest RX gets nothing (vhost-user specification, "Ring states").

use std::sync::Arc;

use vhost::vhost_user::message::VhostUserVringAddrFlags;
use vmm_sys_util::eventfd::EventFd;
use vnic_dataplane::virtq::MAX_RING_SIZE;

use super::fault::Refusal;

/// Where the parts of a ring are, in the front-end's (user) addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddrs {
    /// Descriptor table; a packed ring's descriptor ring.
    pub desc: u64,
    /// Available ring; a packed ring's driver event suppression area.
    pub avail: u64,
    /// Used ring; a packed ring's device event suppression area.
    pub used: u64,
}

/// Which rules a ring's parameters are to obey.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Split (virtio 1.2, 2.7).
    Split,
    /// VIRTIO_F_RING_PACKED was acknowledged (2.8).
    Packed,
    /// SET_FEATURES has not come: what either format allows passes, and the rest is checked when the ring starts.
    Unknown,
}

impl Format {
    /// Where a ring begins whose base was never set: a packed ring's wrap counters begin at 1 (2.8.1).
    pub(super) fn first_base(self) -> u32 {
        match self {
            Format::Packed => 0x8000_8000,
            Format::Split | Format::Unknown => 0,
        }
    }
}

/// What was set for a ring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// 0 until SET_VRING_NUM.
    pub(super) size: u16,
    pub(super) addrs: Option<RingAddrs>,
    /// `None` until SET_VRING_BASE or the ring's first stop.
    pub(super) base: Option<u32>,
    /// The base as the front-end knows it: what it set, or was answered last. Between the two a ring moves on without it.
    pub(super) told: Option<u32>,
    /// GET_VRING_BASE came, and no SET_VRING_KICK since.
    pub(super) stopped: bool,
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
    /// Where to go on, as in GET_VRING_BASE.
    pub base: u32,
    /// The base that the front-end set or was answered last.
    pub told: u32,
    /// The front-end stopped it with GET_VRING_BASE, and so knows where it stands.
    pub stopped: bool,
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

pub(super) fn checked_size(format: Format, size: u32) -> Result<u16, Refusal> {
    match u16::try_from(size) {
        Ok(valid)
            if (1..=MAX_RING_SIZE).contains(&valid)
                && (format != Format::Split || valid.is_power_of_two()) =>
        {
            Ok(valid)
        }
        _ => Err(Refusal::QueueSize { size }),
    }
}

/// A packed ring's base has 32 bits, of which the ring's size says what is valid: that is checked when it starts.
pub(super) fn checked_base(format: Format, base: u32) -> Result<u32, Refusal> {
    if format == Format::Split && base > u32::from(u16::MAX) {
        return Err(Refusal::Base { base });
    }
    Ok(base)
}

pub(super) fn checked_enable(value: u32) -> Result<bool, Refusal> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Refusal::Enable { value }),
    }
}

/// Alignments of virtio 1.2, 2.7 and 2.8.10.1. They hold for user addresses too: regions are made of whole pages.
pub(super) fn checked_addrs(format: Format, flags: u32, addrs: RingAddrs) -> Result<(), Refusal> {
    // VHOST_VRING_F_LOG is the only flag there is, and the dirty log is not offered.
    const _: () = assert!(VhostUserVringAddrFlags::all().bits() == 1);
    if flags != 0 {
        return Err(Refusal::VringFlags { flags });
    }
    let parts = match format {
        Format::Split | Format::Unknown => [
            ("descriptor table", addrs.desc, 16),
            ("available ring", addrs.avail, 2),
            ("used ring", addrs.used, 4),
        ],
        Format::Packed => [
            ("descriptor ring", addrs.desc, 16),
            ("driver event suppression area", addrs.avail, 4),
            ("device event suppression area", addrs.used, 4),
        ],
    };
    match parts.into_iter().find(|(_, addr, align)| addr % align != 0) {
        Some((part, addr, align)) => Err(Refusal::Misaligned { part, addr, align }),
        None => Ok(()),
    }
}
