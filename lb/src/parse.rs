//! One look at a frame's headers; the offsets found serve balancing, checksums, GSO and GRO alike.
//!
//! Nothing here trusts the frame: every read is checked, every walk is capped, and a frame that makes no
//! sense is classed as such instead of being refused.

mod ip;
mod simple;
#[cfg(test)]
mod tests;
mod transport;

use crate::key::{Direction, SessionKey, proto};
use crate::mac::Mac;

/// EtherTypes that the parser looks behind (IEEE 802 numbers).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IEEE 802.1Q customer VLAN tag.
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// IEEE 802.1ad service VLAN tag.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// The service tag of equipment from before 802.1ad.
    pub const OLD_SERVICE_VLAN: u16 = 0x9100;
}

/// TCP flags as in byte 13 of the header (RFC 9293, 3.1).
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field is significant.
    pub const ACK: u8 = 0x10;
}

/// VLAN tags that are looked through; a frame with more has no session.
pub const MAX_VLAN_TAGS: usize = 2;

/// What a frame is to the balancer. [`Parsed::key`] means something else for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// An unfragmented packet of a session; the key is the session's.
    Session,
    /// The first fragment of a datagram; the key is the session's, and later fragments must follow it.
    FirstFragment,
    /// A fragment without a usable transport header; the key is the {addresses, protocol} to fall back on.
    LaterFragment,
    /// An ICMP or ICMPv6 error; the key is that of the session it reports on.
    IcmpError,
    /// No session; the key is what to hash: {addresses, protocol} of IP, else {MACs, VLANs, EtherType}.
    NonSession,
    /// Cut short or contradicting itself; the key is {MACs, VLANs, EtherType}.
    Malformed,
}

/// What one frame's headers say; a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    key: SessionKey,
    fragment_id: u32,
    ethertype: u16,
    /// Offset of the transport header, or 0.
    l4: u16,
    /// Offset of the network header, or 0.
    l3: u8,
    protocol: u8,
    tcp_flags: u8,
    vlan_tags: u8,
    class: Class,
    direction: Direction,
}

const _: () = assert!(size_of::<Parsed>() == 64);

impl Parsed {
    /// VLAN ids, outer first, 0 where there is none. A priority tag (id 0) is skipped, as it names no VLAN.
    #[must_use]
    pub const fn vlans(&self) -> [u16; MAX_VLAN_TAGS] {
        self.key.vlans()
    }

    /// VLAN tags present, priority tags included.
    #[must_use]
    pub const fn vlan_tags(&self) -> u8 {
        self.vlan_tags
    }

    /// EtherType behind the VLAN tags; 0 if the frame ends before it.
    #[must_use]
    pub const fn ethertype(&self) -> u16 {
        self.ethertype
    }

    /// Bytes before the network header, if there is one (IPv4 or IPv6).
    #[must_use]
    pub fn l3_offset(&self) -> Option<usize> {
        (self.l3 != 0).then(|| usize::from(self.l3))
    }

    /// Bytes before the transport header, if it is there whole: IP options and extension headers are behind it.
    #[must_use]
    pub fn l4_offset(&self) -> Option<usize> {
        (self.l4 != 0).then(|| usize::from(self.l4))
    }

    /// IP protocol behind the extension headers, if this is an IP packet.
    #[must_use]
    pub fn protocol(&self) -> Option<u8> {
        (self.l3 != 0).then_some(self.protocol)
    }

    /// The same number for all frames of a flow, in both directions: for spreading frames over a guest's receive queues.
    /// Cheap and not keyed, so a sender may choose the queue; nothing worse depends on it.
    #[must_use]
    pub fn flow_hash(&self) -> u32 {
        let mixed = self.key.words().into_iter().fold(0u64, |hash, word| {
            (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        // The upper half is the well-mixed one.
        let [a, b, c, d, ..] = mixed.to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    /// TCP flags ([`tcp_flag`]); 0 if there is no TCP header.
    #[must_use]
    pub const fn tcp_flags(&self) -> u8 {
        self.tcp_flags
    }

    /// Timestamp value and echo of a TCP segment (RFC 7323, 3.2), if its options begin as everybody's do (appendix A);
    /// else zeros. `bytes` are those that were parsed.
    #[must_use]
    pub fn timestamps(&self, bytes: &[u8]) -> [u32; 2] {
        if self.protocol != proto::TCP || self.class != Class::Session {
            return [0; 2];
        }
        transport::timestamps(bytes, usize::from(self.l4))
    }

    /// What the frame is to the balancer.
    #[must_use]
    pub const fn class(&self) -> Class {
        self.class
    }

    /// The session's key, or what stands for it: see [`Class`].
    #[must_use]
    pub const fn key(&self) -> &SessionKey {
        &self.key
    }

    /// Which end of the key sent the frame. An ICMP error's is that of the packet which it reports on, reversed.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        self.direction
    }

    /// Whether this is part of a fragmented datagram.
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        matches!(self.class, Class::FirstFragment | Class::LaterFragment)
    }

    /// The key by which fragments of one datagram find each other.
    pub(crate) fn fragment_key(&self) -> SessionKey {
        self.key.fragment(self.direction, self.fragment_id)
    }

    /// The key to look up in the session table, if frames of this class have one there.
    pub(crate) const fn session_key(&self) -> Option<&SessionKey> {
        match self.class {
            Class::Session | Class::FirstFragment | Class::IcmpError => Some(&self.key),
            Class::LaterFragment | Class::NonSession | Class::Malformed => None,
        }
    }
}

/// Parses the headers of an Ethernet frame. `bytes` is its beginning (all of it, or at least the first 256 bytes).
#[must_use]
#[inline]
pub fn parse(bytes: &[u8]) -> Parsed {
    simple::parse(bytes).unwrap_or_else(|| parse_any(bytes))
}

/// The parser for whatever may come. [`simple::parse`] answers the same where it answers.
#[cold]
#[inline(never)]
fn parse_any(bytes: &[u8]) -> Parsed {
    let mut vlans = [0u16; MAX_VLAN_TAGS];
    let Some((link, mut rest)) = bytes.split_first_chunk::<14>() else {
        return link_only([0; 12], vlans, 0, 0, Class::Malformed);
    };
    let [addresses @ .., type0, type1] = *link;
    let mut ethertype = u16::from_be_bytes([type0, type1]);
    let (mut named, mut tags, mut l3) = (0, 0u8, 14u8);
    while is_vlan(ethertype) && usize::from(tags) < MAX_VLAN_TAGS {
        let Some((&[tci0, tci1, type0, type1], behind)) = rest.split_first_chunk::<4>() else {
            return link_only(addresses, vlans, tags, ethertype, Class::Malformed);
        };
        let vlan = u16::from_be_bytes([tci0, tci1]) & 0xfff;
        if vlan != 0 {
            vlans[named] = vlan;
            named += 1;
        }
        ethertype = u16::from_be_bytes([type0, type1]);
        (rest, tags, l3) = (behind, tags + 1, l3 + 4);
    }
    let packet = match ethertype {
        ethertype::IPV4 => ip::parse_v4(vlans, rest),
        ethertype::IPV6 => ip::parse_v6(vlans, rest),
        _ => return link_only(addresses, vlans, tags, ethertype, Class::NonSession),
    };
    let Some(packet) = packet else {
        return link_only(addresses, vlans, tags, ethertype, Class::Malformed);
    };
    Parsed {
        key: packet.key,
        fragment_id: packet.fragment_id,
        ethertype,
        l4: packet.transport.map_or(0, |transport| u16::from(l3) + transport),
        l3,
        protocol: packet.protocol,
        tcp_flags: packet.tcp_flags,
        vlan_tags: tags,
        class: packet.class,
        direction: packet.direction,
    }
}

const fn is_vlan(ethertype: u16) -> bool {
    matches!(
        ethertype,
        ethertype::VLAN | ethertype::SERVICE_VLAN | ethertype::OLD_SERVICE_VLAN
    )
}

/// `addresses`: destination and source.
fn link_only(
    addresses: [u8; 12],
    vlans: [u16; MAX_VLAN_TAGS],
    vlan_tags: u8,
    ethertype: u16,
    class: Class,
) -> Parsed {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = addresses;
    let dst = Mac([d0, d1, d2, d3, d4, d5]).to_u64();
    let src = Mac([s0, s1, s2, s3, s4, s5]).to_u64();
    Parsed {
        key: SessionKey::of_link(dst, src, vlans, ethertype),
        fragment_id: 0,
        ethertype,
        l4: 0,
        l3: 0,
        protocol: 0,
        tcp_flags: 0,
        vlan_tags,
        class,
        direction: Direction::AToB,
    }
}
