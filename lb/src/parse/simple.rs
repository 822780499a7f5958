//! The frames that nearly all traffic is made of, parsed without detours: TCP or UDP, in IPv4 without options or IPv6
//! without extension headers, in no fragment, behind at most one VLAN tag.
//!
//! What is not as plain as that is left to the general parser. Where both answer they answer the same, which a test
//! with arbitrary frames compares.

use super::{Class, Parsed, ethertype};
use crate::key::{Direction, SessionKey, proto};

/// Bytes of a TCP header without options, and of a UDP header.
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;

/// What precedes the network header.
#[derive(Clone, Copy)]
struct Link {
    vlan: u16,
    vlan_tags: u8,
    ethertype: u16,
}

/// Parses a plain frame; `None` for every other.
#[inline]
pub(super) fn parse(bytes: &[u8]) -> Option<Parsed> {
    let (&[.., t0, t1], packet) = bytes.split_first_chunk::<14>()?;
    let link = Link {
        vlan: 0,
        vlan_tags: 0,
        ethertype: u16::from_be_bytes([t0, t1]),
    };
    match link.ethertype {
        ethertype::IPV4 => ipv4(link, packet),
        ethertype::IPV6 => ipv6(link, packet),
        ethertype::VLAN => {
            let (&[tci0, tci1, t0, t1], packet) = packet.split_first_chunk::<4>()?;
            let link = Link {
                vlan: u16::from_be_bytes([tci0, tci1]) & 0xfff,
                vlan_tags: 1,
                ethertype: u16::from_be_bytes([t0, t1]),
            };
            match link.ethertype {
                ethertype::IPV4 => ipv4(link, packet),
                ethertype::IPV6 => ipv6(link, packet),
                _ => None,
            }
        }
        _ => None,
    }
}

#[inline]
fn ipv4(link: Link, packet: &[u8]) -> Option<Parsed> {
    // The header and the ports.
    let head = packet.first_chunk::<24>()?;
    let &[
        0x45,
        _,
        len0,
        len1,
        _,
        _,
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
        from0,
        from1,
        to0,
        to1,
    ] = head
    else {
        return None;
    };
    // Neither an offset nor more fragments.
    if u16::from_be_bytes([frag0, frag1]) & 0x3fff != 0 {
        return None;
    }
    // A length of 0 is a super-frame's; the general parser knows about it.
    let len = packet.len().min(usize::from(u16::from_be_bytes([len0, len1])));
    let tcp_flags = flags(protocol, packet, 20, len)?;
    let (key, direction) = SessionKey::of_ipv4_ports(
        [link.vlan, 0],
        protocol,
        [
            u32::from_be_bytes([s0, s1, s2, s3]),
            u32::from_be_bytes([d0, d1, d2, d3]),
        ],
        [u16::from_be_bytes([from0, from1]), u16::from_be_bytes([to0, to1])],
    );
    Some(session(link, key, direction, 20, protocol, tcp_flags))
}

#[inline]
fn ipv6(link: Link, packet: &[u8]) -> Option<Parsed> {
    let (&[version, _, _, _, len0, len1, protocol, _], behind) = packet.split_first_chunk::<8>()?;
    let (src, behind) = behind.split_first_chunk::<16>()?;
    let (dst, behind) = behind.split_first_chunk::<16>()?;
    let &[from0, from1, to0, to1] = behind.first_chunk::<4>()?;
    if version >> 4 != 6 {
        return None;
    }
    // Of a length of 0 the general parser knows more.
    let len = packet
        .len()
        .min(40 + usize::from(u16::from_be_bytes([len0, len1])));
    let tcp_flags = flags(protocol, packet, 40, len)?;
    let (key, direction) = SessionKey::of_ipv6_ports(
        [link.vlan, 0],
        protocol,
        [u128::from_be_bytes(*src), u128::from_be_bytes(*dst)],
        [u16::from_be_bytes([from0, from1]), u16::from_be_bytes([to0, to1])],
    );
    Some(session(link, key, direction, 40, protocol, tcp_flags))
}

/// The TCP flags (0 for UDP), if the packet is of one of the two and has the whole header of it in its `len` bytes.
#[inline]
fn flags(protocol: u8, packet: &[u8], header_len: usize, len: usize) -> Option<u8> {
    match protocol {
        proto::UDP if len >= header_len + UDP_LEN => Some(0),
        proto::TCP if len >= header_len + TCP_LEN => packet.get(header_len + 13).copied(),
        _ => None,
    }
}

#[inline]
fn session(
    link: Link,
    key: SessionKey,
    direction: Direction,
    header_len: u8,
    protocol: u8,
    tcp_flags: u8,
) -> Parsed {
    let l3 = 14 + 4 * link.vlan_tags;
    Parsed {
        key,
        fragment_id: 0,
        ethertype: link.ethertype,
        l4: u16::from(l3 + header_len),
        l3,
        protocol,
        tcp_flags,
        vlan_tags: link.vlan_tags,
        class: Class::Session,
        direction,
    }
}
