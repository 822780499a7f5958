//! Virtqueues, device side.

use std::sync::Arc;

use crate::memory::guest::GuestMemory;

/// What is needed to run one ring; made by the control thread when the ring starts.
#[derive(Clone)]
pub struct RingSpec {
    /// Descriptors: a power of two, at most 32768.
    pub size: u16,
    /// Descriptor table, as a front-end (user) address.
    pub desc_addr: u64,
    /// Available ring, as a user address.
    pub avail_addr: u64,
    /// Used ring, as a user address.
    pub used_addr: u64,
    /// Index of the next available entry to take (GET/SET_VRING_BASE).
    pub base: u16,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub mergeable: bool,
    /// VIRTIO_F_VERSION_1 was negotiated (the header is then 12 bytes always).
    pub version_1: bool,
    /// Written when the driver wants to know of used buffers; `None`: the driver polls.
    pub call: Option<Arc<vmm_sys_util::eventfd::EventFd>>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
}

/// A rule of the virtio specification that the driver broke; the ring is unusable from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A ring part lies outside the guest's memory or is not aligned (virtio 1.2, 2.7).
    #[error("the {part} at {addr:#x} is outside the guest's memory or not aligned")]
    BadAddress {
        /// Which part.
        part: &'static str,
        /// User address.
        addr: u64,
    },
}

/// A split virtqueue (virtio 1.2, 2.7), device side, with its pointers resolved.
pub struct SplitRing {
    _private: (),
}

impl SplitRing {
    /// Resolves and checks the ring's addresses.
    pub fn new(_spec: &RingSpec) -> Result<SplitRing, RingError> {
        unimplemented!()
    }

    /// Index of the next available entry that would be taken: the answer to GET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u16 {
        unimplemented!()
    }

    /// Asks the driver for notifications (kicks), then looks again: `true` means work is there, do not sleep.
    pub fn arm(&mut self) -> bool {
        unimplemented!()
    }

    /// Tells the driver not to kick.
    pub fn disarm(&mut self) {
        unimplemented!()
    }

    /// Whether the driver has made buffers available that were not taken yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        unimplemented!()
    }

    /// Notifies the driver of the used buffers published since the last call, if it asked to be told.
    /// Returns whether it wrote the call eventfd.
    pub fn notify(&mut self) -> bool {
        unimplemented!()
    }
}
