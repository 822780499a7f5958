//! The header before every frame in a virtio-net ring (virtio 1.2, 5.1.6).

use zerocopy::byteorder::little_endian::U16;
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::virtq::{Engine, HEADER};

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is left to the device.
const F_NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_NONE: one frame as it is.
const GSO_NONE: u8 = 0;

/// `struct virtio_net_hdr_mrg_rxbuf`. Legacy drivers without MRG_RXBUF know only its first 10 bytes.
#[derive(Debug, Default, Clone, Copy, IntoBytes, Immutable, KnownLayout, Unaligned)]
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

impl Header {
    /// Bytes of the whole header.
    pub(super) const LEN: usize = HEADER;
    pub(super) const LEN_U8: u8 = 12;
    /// Bytes of the header without `num_buffers`.
    pub(super) const LEGACY_LEN: usize = 10;
    pub(super) const LEGACY_LEN_U8: u8 = 10;

    /// The header of a frame that takes this many buffers.
    #[inline]
    pub(super) fn of_buffers(count: usize) -> Header {
        // There are at most as many chains as descriptors, of which there are at most 32768.
        Header {
            num_buffers: u16::try_from(count).unwrap_or(u16::MAX).into(),
            ..Header::default()
        }
    }

    /// Bytes of the header on this ring.
    #[inline]
    pub(super) fn len_on(ring: &impl Engine) -> usize {
        if ring.version_1() || ring.mergeable() {
            Header::LEN
        } else {
            Header::LEGACY_LEN
        }
    }

    /// Whether a driver that negotiated no offload may send the header that begins so. Other flags are to be ignored
    /// (5.1.6.2.2).
    #[inline]
    pub(super) fn asks_for_nothing([flags, gso_type]: [u8; 2]) -> bool {
        flags & F_NEEDS_CSUM == 0 && gso_type == GSO_NONE
    }
}

const _: () = assert!(
    Header::LEN == size_of::<Header>()
        && Header::LEN == Header::LEN_U8 as usize
        && Header::LEGACY_LEN == Header::LEGACY_LEN_U8 as usize
);
