//! The netdev family of generic netlink (kernel 6.3 and later): what a driver can do for XDP and AF_XDP.

use std::io;

use nix::sys::socket::SockProtocol;

use super::codec::{attributes, u32_of, u64_of};
use super::socket::{GENL_HEADER, Netlink, generic};

const DEV_GET: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
const XDP_ZC_MAX_SEGS: u16 = 4;
const XSK_FEATURES: u16 = 6;

/// Bits of [`DeviceFeatures::xdp`] (`NETDEV_XDP_ACT_*`, linux/netdev.h).
pub const XDP_BASIC: u64 = 1;
/// XDP_REDIRECT in the driver.
pub const XDP_REDIRECT: u64 = 1 << 1;
/// AF_XDP zero-copy.
pub const XSK_ZEROCOPY: u64 = 1 << 3;
/// Frames of several buffers reach the program.
pub const XDP_RX_SG: u64 = 1 << 5;
/// Bit of [`DeviceFeatures::xsk`]: the NIC computes checksums of AF_XDP frames.
pub const XSK_TX_CHECKSUM: u64 = 1 << 1;

/// What a driver can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceFeatures {
    /// `XDP_*` and `XSK_ZEROCOPY`.
    pub xdp: u64,
    /// Most buffers of a frame in zero-copy mode; 0 if not told.
    pub zero_copy_segments: u32,
    /// `XSK_TX_*`; 0 also on kernels before 6.8.
    pub xsk: u64,
}

/// Asks the kernel.
pub struct Netdev {
    netlink: Netlink,
    family: u16,
}

impl Netdev {
    /// # Errors
    /// ENOENT on a kernel before 6.3; those of the socket.
    pub fn open() -> io::Result<Netdev> {
        let mut netlink = Netlink::open(SockProtocol::NetlinkGeneric)?;
        let family = netlink.family("netdev")?;
        Ok(Netdev { netlink, family })
    }

    /// What the driver of an interface can do.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn features(&mut self, ifindex: u32) -> io::Result<DeviceFeatures> {
        let request = generic(self.family, DEV_GET).put(IFINDEX, &ifindex.to_ne_bytes());
        let mut features = DeviceFeatures::default();
        self.netlink.ask(&request, |message| {
            for (kind, value) in attributes(message.body.get(GENL_HEADER..).unwrap_or_default()) {
                match kind {
                    XDP_FEATURES => features.xdp = u64_of(value).unwrap_or(0),
                    XDP_ZC_MAX_SEGS => features.zero_copy_segments = u32_of(value).unwrap_or(0),
                    XSK_FEATURES => features.xsk = u64_of(value).unwrap_or(0),
                    _ => {}
                }
            }
        })?;
        Ok(features)
    }
}
