//! The AF_PACKET socket with a mapped receive ring (TPACKET_V2) that takes frames to group addresses.
//!
//! The kernel writes each frame into a slot of shared memory and sets TP_STATUS_USER; we read it and give the slot back with
//! TP_STATUS_KERNEL. So looking for frames costs no system call. See packet(7) and the kernel's packet_mmap text.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::c_int;

use super::syscall::{self, Mapping};

/// Bytes of a slot: the largest frame there is room for is about 100 less. A power of two, so that blocks hold whole slots.
const SLOT: u32 = 16 * 1024;
const SLOTS: u32 = 128;
const BLOCK: u32 = 64 * 1024;

/// ETH_P_ALL and SOL_PACKET's numbers in the widths that the structs have.
const ALL_PROTOCOLS: u16 = 0x0003;
/// TPACKET_V2 of `enum tpacket_versions` (linux/if_packet.h).
const TPACKET_V2: c_int = 1;
/// struct virtio_net_hdr without num_buffers, which PACKET_VNET_HDR puts before each frame.
const VNET_HEADER: usize = 10;

/// An AF_PACKET socket on one interface and its ring.
pub(crate) struct PacketRing {
    ring: Mapping,
    next: u32,
    fd: OwnedFd,
}

/// One received frame, in the ring until this is dropped.
pub(crate) struct Slot<'a> {
    status: &'a AtomicU32,
    /// What the kernel says of the frame.
    pub(crate) header: libc::tpacket2_hdr,
    /// The virtio-net header before it.
    pub(crate) vnet: [u8; VNET_HEADER],
    /// Lent by [`Slot::bytes`] only, or safe code could keep it for longer than the slot.
    bytes: &'a [u8],
}

impl Slot<'_> {
    /// The frame from its destination address on, `tp_snaplen` bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes
    }
}

impl PacketRing {
    /// Opens a ring that receives frames whose destination has the group bit, coming in on this interface only.
    pub(crate) fn open(ifindex: c_int) -> io::Result<PacketRing> {
        // Protocol 0: nothing is received before bind.
        let fd = syscall::socket(libc::AF_PACKET, 0)?;
        syscall::attach_filter(&fd, &group_filter())?;
        for (option, value) in [
            (libc::PACKET_IGNORE_OUTGOING, 1),
            (libc::PACKET_VERSION, TPACKET_V2),
            (libc::PACKET_VNET_HDR, 1),
        ] {
            syscall::set_option(&fd, libc::SOL_PACKET, option, &value)?;
        }
        let request = libc::tpacket_req {
            tp_block_size: BLOCK,
            tp_block_nr: SLOTS * SLOT / BLOCK,
            tp_frame_size: SLOT,
            tp_frame_nr: SLOTS,
        };
        syscall::set_option(&fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let ring = Mapping::of_socket(&fd, (SLOTS * SLOT) as usize, 0)?;
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
            sll_protocol: ALL_PROTOCOLS.to_be(),
            sll_ifindex: ifindex,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        syscall::bind(&fd, &address)?;
        Ok(PacketRing { ring, next: 0, fd })
    }

    /// Joins or leaves a group of the interface: `kind` is PACKET_MR_UNICAST, PACKET_MR_ALLMULTI...
    pub(crate) fn membership(&self, ifindex: c_int, kind: c_int, mac: [u8; 6], join: bool) -> io::Result<()> {
        let [a, b, c, d, e, f] = mac;
        let request = libc::packet_mreq {
            mr_ifindex: ifindex,
            mr_type: u16::try_from(kind).map_err(io::Error::other)?,
            mr_alen: 6,
            mr_address: [a, b, c, d, e, f, 0, 0],
        };
        let option = if join {
            libc::PACKET_ADD_MEMBERSHIP
        } else {
            libc::PACKET_DROP_MEMBERSHIP
        };
        syscall::set_option(&self.fd, libc::SOL_PACKET, option, &request)
    }

    /// Frames dropped because the ring was full, since the last call (PACKET_STATISTICS resets itself).
    pub(crate) fn take_dropped(&self) -> u32 {
        syscall::get_option(&self.fd, libc::SOL_PACKET, libc::PACKET_STATISTICS)
            .map_or(0, |statistics: libc::tpacket_stats| statistics.tp_drops)
    }

    /// The next frame, if one has arrived.
    pub(crate) fn next(&mut self) -> Option<Slot<'_>> {
        let start = (self.next * SLOT) as usize;
        let status_at = self.ring.at::<AtomicU32>(start, 1).ok()?;
        // SAFETY: inside the ring and aligned (`at`); `tp_status` is the header's first field, which both sides use to hand the slot over.
        let status = unsafe { status_at.as_ref() };
        // Acquire: the frame was written before the status.
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return None;
        }
        self.next = (self.next + 1) % SLOTS;
        let header_at = self.ring.at::<libc::tpacket2_hdr>(start, 1).ok()?;
        // SAFETY: inside the ring and aligned; TP_STATUS_USER was seen, so the slot is ours until the status says otherwise, and the kernel does
        // not write to it. Any bytes are a valid header (integers).
        let header = unsafe { header_at.read() };
        let mac = usize::from(header.tp_mac);
        let len = header.tp_snaplen as usize;
        // The kernel is trusted with memory, but a slice past the slot must not be possible whatever it writes.
        let inside = mac >= VNET_HEADER + size_of::<libc::tpacket2_hdr>() && mac + len <= SLOT as usize;
        let (mac, len) = if inside { (mac, len) } else { (SLOT as usize, 0) };
        let vnet_at = self
            .ring
            .at::<[u8; VNET_HEADER]>(start + mac - VNET_HEADER, 1)
            .ok()?;
        let bytes_at = self.ring.at::<u8>(start + mac, len).ok()?;
        // SAFETY: inside the ring (`at`); the slot is ours as said above until `Slot` is dropped, and `Slot` lends the slice for no longer
        // than that; `&mut self` keeps a second `Slot` from being made.
        let (vnet, bytes) = unsafe { (vnet_at.read(), std::slice::from_raw_parts(bytes_at.as_ptr(), len)) };
        Some(Slot {
            status,
            header,
            vnet,
            bytes,
        })
    }
}

impl AsFd for PacketRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        // Release: our reads are over before the kernel may write again.
        self.status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
    }
}

/// Accepts frames whose first byte has its lowest bit set.
fn group_filter() -> [libc::sock_filter; 4] {
    let op = |code: u32| u16::try_from(code).expect("classic BPF codes are 16 bits");
    let filter = |code, jt, jf, k| libc::sock_filter {
        code: op(code),
        jt,
        jf,
        k,
    };
    [
        filter(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, 1),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
}
