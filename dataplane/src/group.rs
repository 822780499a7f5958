//! Frames to groups (broadcast, multicast), copied to us by an AF_PACKET socket while the host gets them too.
//!
//! XDP can redirect or pass, not do both, so the program passes these to the host and the kernel copies them here. The copy is
//! not what was on the wire: the kernel has taken off a VLAN tag, and a sender on this host may have left the checksum to
//! a device. Both are put right here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use vnic_lb::mac::Mac;

use crate::checksum;
use crate::memory::frames::{ChunkCache, Frame};
use crate::xsk::packet_ring::{PacketRing, Slot};

/// Two addresses: where a VLAN tag goes.
const ADDRESSES: usize = 12;
const ETHERNET_HEADER: usize = 14;
const ETH_P_8021Q: u16 = 0x8100;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM (virtio 1.2, 5.1.6).
const NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_NONE.
const GSO_NONE: u8 = 0;

/// The group frames of one NIC.
pub struct GroupTap {
    ring: PacketRing,
    ifname: String,
    ifindex: libc::c_int,
    counters: GroupCounters,
}

/// Counters of a [`GroupTap`] since it was opened.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct GroupCounters {
    /// Frames received.
    pub frames: u64,
    /// Bytes received, VLAN tags included.
    pub bytes: u64,
    /// Dropped by the kernel: the ring was full.
    pub kernel_dropped: u64,
    /// Dropped: no chunk was free.
    pub no_chunk: u64,
    /// Dropped: longer than a slot, a checksum outside the frame, or several frames in one (a sender's segmentation offload).
    pub malformed: u64,
}

/// Why group frames cannot be received, or an address not be admitted.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Privileges are missing.
    #[error("not permitted to open a packet socket on {ifname}: run as root, or give CAP_NET_RAW")]
    NoPrivilege {
        /// Interface.
        ifname: String,
        /// EPERM.
        source: io::Error,
    },
    /// There is no such interface.
    #[error("there is no interface {ifname} (index {ifindex}): see `ip link`")]
    NoInterface {
        /// Interface.
        ifname: String,
        /// Its index.
        ifindex: u32,
        /// ENODEV.
        source: io::Error,
    },
    /// The NIC cannot be told to receive an address.
    #[error("{ifname} does not admit {what}: {source}")]
    Membership {
        /// Interface.
        ifname: String,
        /// The address, or `all multicast`.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot receive group frames on {ifname}: {source}")]
    Other {
        /// Interface.
        ifname: String,
        /// Why.
        source: io::Error,
    },
}

impl GroupTap {
    /// Begins to receive what arrives on an interface for group addresses, and has the NIC admit all of them.
    ///
    /// # Errors
    ///
    /// See [`GroupError`].
    pub fn open(ifindex: u32, ifname: &str) -> Result<GroupTap, GroupError> {
        let name = || ifname.to_owned();
        let no_interface = |source| GroupError::NoInterface {
            ifname: name(),
            ifindex,
            source,
        };
        let index = libc::c_int::try_from(ifindex).map_err(|error| no_interface(io::Error::other(error)))?;
        let ring = PacketRing::open(index).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => GroupError::NoPrivilege {
                ifname: name(),
                source,
            },
            Some(libc::ENODEV | libc::ENXIO) => no_interface(source),
            _ => GroupError::Other {
                ifname: name(),
                source,
            },
        })?;
        // Guests' IPv6 solicited-node groups and the like. Counted by the kernel, and undone when the socket goes.
        ring.membership(index, libc::PACKET_MR_ALLMULTI, [0; 6], true)
            .map_err(|source| GroupError::Membership {
                ifname: name(),
                what: "all multicast".to_owned(),
                source,
            })?;
        Ok(GroupTap {
            ring,
            ifname: name(),
            ifindex: index,
            counters: GroupCounters::default(),
        })
    }

    /// Has the NIC receive frames to a guest's address, until [`GroupTap::withdraw`] or the end of the process.
    ///
    /// # Errors
    ///
    /// [`GroupError::Membership`].
    pub fn admit(&self, mac: Mac) -> Result<(), GroupError> {
        self.unicast(mac, true)
    }

    /// Undoes [`GroupTap::admit`].
    ///
    /// # Errors
    ///
    /// [`GroupError::Membership`].
    pub fn withdraw(&self, mac: Mac) -> Result<(), GroupError> {
        self.unicast(mac, false)
    }

    /// Has the NIC receive everything, until the end of the process: what opens a NIC that filters VLANs and cannot be told not to.
    ///
    /// # Errors
    ///
    /// [`GroupError::Membership`].
    pub fn admit_everything(&self) -> Result<(), GroupError> {
        self.ring
            .membership(self.ifindex, libc::PACKET_MR_PROMISC, [0; 6], true)
            .map_err(|source| GroupError::Membership {
                ifname: self.ifname.clone(),
                what: "everything (promiscuous mode)".to_owned(),
                source,
            })
    }

    fn unicast(&self, mac: Mac, join: bool) -> Result<(), GroupError> {
        self.ring
            .membership(self.ifindex, libc::PACKET_MR_UNICAST, mac.0, join)
            .map_err(|source| GroupError::Membership {
                ifname: self.ifname.clone(),
                what: mac.to_string(),
                source,
            })
    }

    /// Appends up to `max` frames to `out`, as they were on the wire; returns how many. No system call, never blocks.
    pub fn receive(&mut self, chunks: &mut ChunkCache, out: &mut Vec<Frame>, max: usize) -> usize {
        let mut count = 0;
        // Bounded by slots looked at, not by frames given: a flood of bad ones must not hold the loop.
        for _ in 0..max {
            let Some(slot) = self.ring.next() else { break };
            match frame_of(&slot, chunks) {
                Ok(frame) => {
                    self.counters.bytes += frame.len() as u64;
                    out.push(frame);
                    count += 1;
                }
                Err(Refused::NoChunk) => self.counters.no_chunk += 1,
                Err(Refused::Malformed) => self.counters.malformed += 1,
            }
        }
        self.counters.frames += count as u64;
        count
    }

    /// Readable when frames have arrived.
    #[must_use]
    pub fn wait_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Takes an error off the socket: the kernel leaves one when the interface is set down or goes away, and the socket stays
    /// readable until somebody asks for it.
    pub fn clear_error(&self) {
        let _ = nix::sys::socket::getsockopt(&self.ring, nix::sys::socket::sockopt::SocketError);
    }

    /// Counters since the tap was opened; asks the kernel for its drops.
    pub fn counters(&mut self) -> GroupCounters {
        self.counters.kernel_dropped += u64::from(self.ring.take_dropped());
        self.counters
    }
}

enum Refused {
    NoChunk,
    Malformed,
}

fn frame_of(slot: &Slot<'_>, chunks: &mut ChunkCache) -> Result<Frame, Refused> {
    let bytes = slot.bytes();
    let [flags, gso_type, _, _, _, _, start0, start1, offset0, offset1] = slot.vnet;
    if bytes.len() < ETHERNET_HEADER || slot.header.tp_len as usize != bytes.len() || gso_type != GSO_NONE {
        return Err(Refused::Malformed);
    }
    let checksum = if flags & NEEDS_CSUM == 0 {
        None
    } else {
        // The socket's vnet header is in the machine's byte order (TUNSETVNETLE has no counterpart here).
        let start = u16::from_ne_bytes([start0, start1]);
        let offset = u16::from_ne_bytes([offset0, offset1]);
        Some(checksum::complete(bytes, start, offset).ok_or(Refused::Malformed)?)
    };
    let tag = vlan_tag(&slot.header);
    let frame = chunks.alloc(bytes.len() + tag.map_or(0, |tag| tag.len()));
    let mut frame = frame.ok_or(Refused::NoChunk)?;
    let memory = chunks.memory();
    let (addresses, rest) = bytes.split_at(ADDRESSES);
    memory.write(&mut frame, 0, addresses);
    let mut moved = 0;
    if let Some(tag) = tag {
        memory.write(&mut frame, ADDRESSES, &tag);
        moved = tag.len();
    }
    memory.write(&mut frame, ADDRESSES + moved, rest);
    if let Some((field, value)) = checksum {
        // A field inside the addresses (csum_start is 0) would be a sender's bug; it is written where it says.
        let at = if field < ADDRESSES { field } else { field + moved };
        memory.write(&mut frame, at, &value);
    }
    Ok(frame)
}

/// The tag that the kernel took off, as it was in the frame.
fn vlan_tag(header: &libc::tpacket2_hdr) -> Option<[u8; 4]> {
    if header.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let with_type = header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    let [type0, type1] = if with_type {
        header.tp_vlan_tpid
    } else {
        ETH_P_8021Q
    }
    .to_be_bytes();
    let [tci0, tci1] = header.tp_vlan_tci.to_be_bytes();
    Some([type0, type1, tci0, tci1])
}
