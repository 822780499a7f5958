//! IPv4 and IPv6 headers, fragments, and the packets inside ICMP errors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Class;
use super::transport::{Transport, read_transport};
use crate::key::{Direction, Selector, SessionKey, proto};

/// IPv6 extension headers that are walked before giving up.
const MAX_EXTENSION_HEADERS: usize = 8;
/// Bytes of IPv6 extension headers that are walked before giving up.
const MAX_EXTENSION_BYTES: usize = 256;

/// IPv6 extension headers by their number (IANA, IPv6 Extension Header Types).
mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
    pub const MOBILITY: u8 = 135;
    pub const HIP: u8 = 139;
    pub const SHIM6: u8 = 140;
}

/// What an IP packet turned out to be.
pub(super) struct Packet {
    pub key: SessionKey,
    pub direction: Direction,
    pub class: Class,
    pub fragment_id: u32,
    pub protocol: u8,
    pub tcp_flags: u8,
    /// Bytes from the IP header to the transport header.
    pub transport: Option<u16>,
}

/// The network header, read; what follows it is not yet looked at.
struct Network<'a> {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    fragment: Fragment,
    /// Bytes from the IP header to `payload`.
    offset: u16,
    payload: &'a [u8],
    /// A header walk hit its cap, so that `payload` does not begin with the header of `protocol`.
    opaque: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fragment {
    Whole,
    First(u32),
    Later(u32),
}

impl Fragment {
    fn new(offset: u16, more: bool, id: u32) -> Fragment {
        match (offset, more) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First(id),
            _ => Fragment::Later(id),
        }
    }
}

/// Reads an IPv4 packet; `None` if it is cut short or contradicts itself.
pub(super) fn parse_v4(vlans: [u16; 2], bytes: &[u8]) -> Option<Packet> {
    classify(vlans, &network_v4(bytes, false)?)
}

/// Reads an IPv6 packet; `None` if it is cut short or contradicts itself.
pub(super) fn parse_v6(vlans: [u16; 2], bytes: &[u8]) -> Option<Packet> {
    classify(vlans, &network_v6(bytes, false)?)
}

fn classify(vlans: [u16; 2], network: &Network<'_>) -> Option<Packet> {
    let of_packet =
        |selector| SessionKey::of_packet(vlans, network.protocol, network.src, network.dst, selector);
    let (tuple, tuple_direction) = of_packet(Selector::Id(0));
    let mut packet = Packet {
        key: tuple,
        direction: tuple_direction,
        class: Class::NonSession,
        fragment_id: 0,
        protocol: network.protocol,
        tcp_flags: 0,
        transport: None,
    };
    if let Fragment::Later(id) = network.fragment {
        packet.class = Class::LaterFragment;
        packet.fragment_id = id;
        return Some(packet);
    }
    if network.opaque {
        return Some(packet);
    }
    let transport = read_transport(network.protocol, network.src.is_ipv6(), network.payload);
    if let Fragment::First(id) = network.fragment {
        packet.fragment_id = id;
        // A first fragment too small for its transport header names no session (RFC 1858): the datagram stays
        // together, by the same rule that later fragments use.
        packet.class = Class::LaterFragment;
    }
    match transport {
        Transport::Session { selector, tcp_flags } => {
            (packet.key, packet.direction) = of_packet(selector);
            packet.tcp_flags = tcp_flags;
            packet.transport = Some(network.offset);
            packet.class = if network.fragment == Fragment::Whole {
                Class::Session
            } else {
                Class::FirstFragment
            };
        }
        Transport::Error { original } if network.fragment == Fragment::Whole => {
            packet.transport = Some(network.offset);
            if let Some((key, direction)) = original_session(vlans, network.src.is_ipv6(), original) {
                (packet.key, packet.direction) = (key, direction.reversed());
                packet.class = Class::IcmpError;
            }
        }
        Transport::Error { .. } | Transport::Other => {
            packet.transport = Some(network.offset);
        }
        Transport::Short if network.fragment == Fragment::Whole => return None,
        Transport::Short => {}
    }
    Some(packet)
}

/// The session of the packet inside an ICMP error, and the direction in which that packet had travelled.
fn original_session(vlans: [u16; 2], v6: bool, original: &[u8]) -> Option<(SessionKey, Direction)> {
    let network = if v6 {
        network_v6(original, true)?
    } else {
        network_v4(original, true)?
    };
    if network.opaque || matches!(network.fragment, Fragment::Later(_)) {
        return None;
    }
    let selector = super::transport::embedded_selector(network.protocol, v6, network.payload)?;
    Some(SessionKey::of_packet(
        vlans,
        network.protocol,
        network.src,
        network.dst,
        selector,
    ))
}

/// `embedded`: inside an ICMP error only the beginning of the packet is there, so its length says nothing.
fn network_v4(bytes: &[u8], embedded: bool) -> Option<Network<'_>> {
    let (header, _) = bytes.split_first_chunk::<20>()?;
    let [
        version_ihl,
        _,
        len0,
        len1,
        id0,
        id1,
        frag0,
        frag1,
        _,
        protocol,
        _,
        _,
        s0,
        s1,
        s2,
        s3,
        d0,
        d1,
        d2,
        d3,
    ] = *header;
    let header_len = u16::from(version_ihl & 0xf) * 4;
    if version_ihl >> 4 != 4 || header_len < 20 {
        return None;
    }
    let total_len = u16::from_be_bytes([len0, len1]);
    // Bytes behind the packet are Ethernet padding. Length 0 is a super-frame longer than 64 KiB (BIG TCP).
    let bytes = if embedded || total_len == 0 {
        bytes
    } else {
        clip(bytes, usize::from(total_len))
    };
    let payload = bytes.get(usize::from(header_len)..)?;
    let fragment = u16::from_be_bytes([frag0, frag1]);
    Some(Network {
        src: Ipv4Addr::new(s0, s1, s2, s3).into(),
        dst: Ipv4Addr::new(d0, d1, d2, d3).into(),
        protocol,
        fragment: Fragment::new(
            fragment & 0x1fff,
            fragment & 0x2000 != 0,
            u32::from(u16::from_be_bytes([id0, id1])),
        ),
        offset: header_len,
        payload,
        opaque: false,
    })
}

fn network_v6(bytes: &[u8], embedded: bool) -> Option<Network<'_>> {
    let (header, rest) = bytes.split_first_chunk::<40>()?;
    let (&[version, _, _, _, len0, len1, next_header, _], addresses) = header.split_first_chunk::<8>()?;
    if version >> 4 != 6 {
        return None;
    }
    let (src, dst) = addresses.split_at(16);
    let address = |bytes: &[u8]| {
        <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|octets| IpAddr::V6(Ipv6Addr::from(octets)))
    };
    let payload_len = u16::from_be_bytes([len0, len1]);
    // Length 0 is a jumbogram (RFC 2675) or a super-frame (BIG TCP).
    let rest = if embedded || payload_len == 0 {
        rest
    } else {
        clip(rest, usize::from(payload_len))
    };
    let mut network = Network {
        src: address(src)?,
        dst: address(dst)?,
        protocol: next_header,
        fragment: Fragment::Whole,
        offset: 40,
        payload: rest,
        opaque: false,
    };
    walk_extensions(&mut network)?;
    Some(network)
}

/// Skips extension headers, within the caps; `None` if one is cut short.
fn walk_extensions(network: &mut Network<'_>) -> Option<()> {
    let (mut headers, mut walked) = (0, 0);
    loop {
        let len = match network.protocol {
            extension::HOP_BY_HOP
            | extension::ROUTING
            | extension::DESTINATION
            | extension::MOBILITY
            | extension::HIP
            | extension::SHIM6 => (usize::from(*network.payload.get(1)?) + 1) * 8,
            extension::AUTHENTICATION => (usize::from(*network.payload.get(1)?) + 2) * 4,
            proto::IPV6_FRAGMENT => 8,
            _ => return Some(()),
        };
        headers += 1;
        walked += len;
        if headers > MAX_EXTENSION_HEADERS || walked > MAX_EXTENSION_BYTES {
            network.opaque = true;
            return Some(());
        }
        let (header, payload) = network.payload.split_at_checked(len)?;
        let next = *header.first()?;
        if network.protocol == proto::IPV6_FRAGMENT {
            let &[_, _, frag0, frag1, i0, i1, i2, i3] = header.first_chunk::<8>()?;
            let word = u16::from_be_bytes([frag0, frag1]);
            network.fragment = Fragment::new(word >> 3, word & 1 != 0, u32::from_be_bytes([i0, i1, i2, i3]));
        }
        network.protocol = next;
        network.payload = payload;
        // At most MAX_EXTENSION_BYTES are walked, so this is exact.
        network.offset = network.offset.saturating_add(u16::try_from(len).ok()?);
        if matches!(network.fragment, Fragment::Later(_)) {
            return Some(());
        }
    }
}

fn clip(bytes: &[u8], len: usize) -> &[u8] {
    bytes.get(..len).unwrap_or(bytes)
}
