//! The header before every frame in a virtio-net ring (virtio 1.2, 5.1.6).

use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::virtq::{Chain, Engine};

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is left to the device.
const F_NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_NONE: one frame as it is.
const GSO_NONE: u8 = 0;

/// `struct virtio_net_hdr_mrg_rxbuf`. Legacy drivers without MRG_RXBUF know only its first 10 bytes.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) hdr_len: U16,
    pub(super) gso_size: U16,
    pub(super) csum_start: U16,
    pub(super) csum_offset: U16,
    pub(super) num_buffers: U16,
}

/// Bytes of the header without `num_buffers`.
const LEGACY_LEN: usize = 10;

impl Header {
    /// Bytes of the header on this ring.
    #[inline]
    pub(super) fn len_on(ring: &impl Engine) -> usize {
        if ring.version_1() || ring.mergeable() {
            size_of::<Header>()
        } else {
            LEGACY_LEN
        }
    }

    /// Copies a chain's header, each byte once, wherever its descriptors split it. `None`: the chain is shorter.
    #[inline]
    pub(super) fn read(ring: &impl Engine, chain: &Chain) -> Option<Header> {
        let mut header = Header::default();
        let len = Header::len_on(ring);
        ring.read_once(chain, &mut header.as_mut_bytes()[..len])
            .then_some(header)
    }

    /// Whether a driver that negotiated no offload may send this. Other flags are to be ignored (5.1.6.2.2).
    #[inline]
    pub(super) fn asks_for_nothing(&self) -> bool {
        self.flags & F_NEEDS_CSUM == 0 && self.gso_type == GSO_NONE
    }
}
