//! What is offered to a front-end.
//!
//! Neither set may shrink from one version or configuration to the next: a guest that negotiated a feature keeps it across
//! a reconnect and a live migration, and front-ends refuse a back-end that offers less than before. So nothing here depends
//! on how many queues a port has: VIRTIO_NET_F_MQ is offered even by a port with a single queue pair, and the number of
//! pairs is told by GET_QUEUE_NUM alone.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vnic_dataplane::memory::guest::MAX_REGIONS;

/// VIRTIO_F_VERSION_1, as a mask.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// VIRTIO_F_RING_PACKED, as a mask.
pub const RING_PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
/// VIRTIO_F_IN_ORDER, as a mask. Kept whether negotiated or not: each burst is completed in the order it was taken in.
pub const IN_ORDER: u64 = 1 << VIRTIO_F_IN_ORDER;
/// VIRTIO_NET_F_MRG_RXBUF, as a mask.
pub const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// VIRTIO_NET_F_MQ, as a mask.
pub const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
/// VIRTIO_RING_F_INDIRECT_DESC, as a mask.
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// VIRTIO_RING_F_EVENT_IDX, as a mask.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VHOST_USER_F_PROTOCOL_FEATURES (bit 30), as a mask. Never reaches the guest.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The answer to GET_FEATURES.
pub const OFFERED: u64 =
    VERSION_1 | RING_PACKED | IN_ORDER | MRG_RXBUF | MQ | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES;

/// The answer to GET_PROTOCOL_FEATURES.
///
/// CONFIG is left out on purpose: QEMU's net front-end keeps the configuration space itself and warns about the bit, and
/// there is nothing in the space yet that a front-end would not know better. Offering it later is allowed, taking it back
/// is not.
pub const OFFERED_PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::RARP)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Names of the feature bits set, as the specification has them; bits without a name here are left out.
#[must_use]
pub fn names(bits: u64) -> Vec<String> {
    [
        (VERSION_1, "VIRTIO_F_VERSION_1"),
        (RING_PACKED, "VIRTIO_F_RING_PACKED"),
        (IN_ORDER, "VIRTIO_F_IN_ORDER"),
        (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
        (MQ, "VIRTIO_NET_F_MQ"),
        (INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
        (EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .map(|(_, name)| name.to_owned())
    .collect()
}

/// The answer to GET_MAX_MEM_SLOTS: as many as KVM long had for a guest, so no front-end needs more.
pub const MAX_MEM_SLOTS: usize = MAX_REGIONS;
