//! The canonical, bidirectional session key.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP protocol numbers that the balancer knows by name (IANA, Assigned Internet Protocol Numbers).
pub mod proto {
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// IPv6 fragment header (RFC 8200, 4.5).
    pub const IPV6_FRAGMENT: u8 = 44;
    /// GRE (RFC 2784, 2890).
    pub const GRE: u8 = 47;
    /// ESP (RFC 4303).
    pub const ESP: u8 = 50;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
}

/// Words that a key serialises to.
pub const KEY_WORDS: usize = 6;

/// Which end of a key sent a frame: a key orders its two ends, so a frame needs one bit to say where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// From end a to end b.
    AToB = 1,
    /// From end b to end a.
    BToA = 2,
}

impl Direction {
    /// The bit by which a state remembers the sending end.
    pub(crate) const fn end_bit(self) -> u8 {
        self as u8
    }

    /// The other way.
    #[must_use]
    pub const fn reversed(self) -> Direction {
        match self {
            Direction::AToB => Direction::BToA,
            Direction::BToA => Direction::AToB,
        }
    }
}

/// Both directions of a flow give the same key.
///
/// The words are the key: addresses of end a and end b (two words each, IPv4 as IPv4-mapped), then
/// `outer VLAN:12 inner VLAN:12 protocol:8 port a:16 port b:16`, then the kind. End a is the lower one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionKey {
    words: [u64; KEY_WORDS],
}

/// Bits of the kind word. A table entry keeps other state above [`KIND_MASK`] in the same word.
const KIND_V6: u64 = 1;
const KIND_FRAGMENT: u64 = 2;
const KIND_L2: u64 = 4;
/// The bits of the last key word that belong to the key.
pub(crate) const KIND_MASK: u64 = 0xf;

/// What the sixteen or thirty-two bits after the addresses mean for a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Selector {
    /// A port at each end, swapped with the ends.
    Ports(u16, u16),
    /// One number for the flow (ESP SPI, GRE key, ICMP echo id), not swapped.
    Id(u32),
}

impl SessionKey {
    /// The canonical key of a packet from `src` to `dst`, and the direction in which that packet travels.
    pub(crate) fn of_packet(
        vlans: [u16; 2],
        protocol: u8,
        src: IpAddr,
        dst: IpAddr,
        selector: Selector,
    ) -> (SessionKey, Direction) {
        let kind = if src.is_ipv6() { KIND_V6 } else { 0 };
        let (src, dst) = (address_bits(src), address_bits(dst));
        let (swap, low) = match selector {
            Selector::Ports(from, to) => {
                let swap = (src, from) > (dst, to);
                let (a, b) = if swap { (to, from) } else { (from, to) };
                (swap, u32::from(a) << 16 | u32::from(b))
            }
            Selector::Id(id) => (src > dst, id),
        };
        let ((a, b), direction) = if swap {
            ((dst, src), Direction::BToA)
        } else {
            ((src, dst), Direction::AToB)
        };
        (
            SessionKey {
                words: words(a, b, meta(vlans, protocol, low), kind),
            },
            direction,
        )
    }

    /// [`SessionKey::of_packet`] for IPv4 and a protocol with ports, from the numbers as they are on the wire.
    #[inline]
    pub(crate) fn of_ipv4_ports(
        vlans: [u16; 2],
        protocol: u8,
        [src, dst]: [u32; 2],
        [from, to]: [u16; 2],
    ) -> (SessionKey, Direction) {
        const MAPPED: u64 = 0xffff_0000_0000;
        let (source, destination) = (
            u64::from(src) << 16 | u64::from(from),
            u64::from(dst) << 16 | u64::from(to),
        );
        // Ends as numbers that order as they do; no branch, as which end is lower is a coin toss.
        let (a, b) = (source.min(destination), source.max(destination));
        let direction = if source > destination {
            Direction::BToA
        } else {
            Direction::AToB
        };
        let meta = meta(vlans, protocol, 0) | (a & 0xffff) << 16 | b & 0xffff;
        let words = [0, MAPPED | a >> 16, 0, MAPPED | b >> 16, meta, 0];
        (SessionKey { words }, direction)
    }

    /// [`SessionKey::of_packet`] for IPv6 and a protocol with ports.
    #[inline]
    pub(crate) fn of_ipv6_ports(
        vlans: [u16; 2],
        protocol: u8,
        [src, dst]: [u128; 2],
        [from, to]: [u16; 2],
    ) -> (SessionKey, Direction) {
        let swap = (src, from) > (dst, to);
        let ((a, b), (low, high)) = if swap {
            ((dst, src), (to, from))
        } else {
            ((src, dst), (from, to))
        };
        let direction = if swap { Direction::BToA } else { Direction::AToB };
        let meta = meta(vlans, protocol, u32::from(low) << 16 | u32::from(high));
        let words = words(a, b, meta, KIND_V6);
        (SessionKey { words }, direction)
    }

    /// What the slot hash reads of a frame that has no session: its addresses, VLANs and EtherType.
    /// Never stored; no packet's session key equals it.
    pub(crate) fn of_link(dst: u64, src: u64, vlans: [u16; 2], ethertype: u16) -> SessionKey {
        let meta = meta(vlans, 0, u32::from(ethertype));
        SessionKey {
            words: [dst, src, 0, 0, meta, KIND_L2],
        }
    }

    /// Key under which the first fragment of a datagram leaves its NIC for the later ones: {source, destination,
    /// protocol, identification}. `self` is any key of the same two addresses. IPv6 reassembles without the
    /// protocol (RFC 8200, 4.5), and the later fragments do not know the upper one, so it is left out there.
    pub(crate) fn fragment(&self, direction: Direction, id: u32) -> SessionKey {
        let [a0, a1, b0, b1, meta, kind] = self.words;
        let [s0, s1, d0, d1] = match direction {
            Direction::AToB => [a0, a1, b0, b1],
            Direction::BToA => [b0, b1, a0, a1],
        };
        let protocol = if self.is_ipv6() {
            proto::IPV6_FRAGMENT
        } else {
            self.protocol()
        };
        let meta = meta & !0xff_ffff_ffff | u64::from(protocol) << 32 | u64::from(id);
        SessionKey {
            words: [s0, s1, d0, d1, meta, kind & KIND_MASK | KIND_FRAGMENT],
        }
    }

    /// The key as words, for hashing and for tables built of words. Only the lowest four bits of the last are used.
    #[must_use]
    #[inline]
    pub const fn words(&self) -> [u64; KEY_WORDS] {
        self.words
    }

    /// The inverse of [`SessionKey::words`]; bits above the lowest four of the last word are ignored.
    #[must_use]
    pub const fn from_words(mut words: [u64; KEY_WORDS]) -> SessionKey {
        words[KEY_WORDS - 1] &= KIND_MASK;
        SessionKey { words }
    }

    /// The same number for all sessions of the same two addresses.
    pub(crate) fn place(&self) -> u64 {
        let [a0, a1, b0, b1, ..] = self.words;
        let mixed = [a0, a1, b0, b1].into_iter().fold(0u64, |hash, word| {
            (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    /// The words as bytes, little endian on every host: what the hashes read.
    #[inline]
    pub(crate) fn bytes(&self) -> [u8; KEY_WORDS * 8] {
        let mut bytes = [0u8; KEY_WORDS * 8];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Whether the addresses are IPv6.
    #[must_use]
    pub const fn is_ipv6(&self) -> bool {
        self.words[5] & KIND_V6 != 0
    }

    /// Whether this names a fragmented datagram and not a session.
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        self.words[5] & KIND_FRAGMENT != 0
    }

    /// VLAN ids, outer first; 0 where there is no tag, or a priority tag (IEEE 802.1Q, 9.6).
    #[must_use]
    pub const fn vlans(&self) -> [u16; 2] {
        let [_, _, _, _, meta, _] = self.words;
        [low16(meta >> 52), low16(meta >> 40) & 0xfff]
    }

    /// IP protocol number (the upper-layer one; extension headers are skipped).
    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.words[4].to_be_bytes()[3]
    }

    /// `tcp`, `udp` and so on; `ip` for a protocol without a name here.
    #[must_use]
    pub const fn protocol_name(&self) -> &'static str {
        match self.protocol() {
            proto::ICMP => "icmp",
            proto::TCP => "tcp",
            proto::UDP => "udp",
            proto::GRE => "gre",
            proto::ESP => "esp",
            proto::ICMPV6 => "icmp6",
            proto::SCTP => "sctp",
            _ => "ip",
        }
    }

    /// Address and port of the lower end; the port is 0 for protocols without ports.
    #[must_use]
    pub fn a(&self) -> (IpAddr, u16) {
        let [a0, a1, _, _, meta, _] = self.words;
        (
            self.address(a0, a1),
            if self.has_ports() { low16(meta >> 16) } else { 0 },
        )
    }

    /// Address and port of the higher end; the port is 0 for protocols without ports.
    #[must_use]
    pub fn b(&self) -> (IpAddr, u16) {
        let [_, _, b0, b1, meta, _] = self.words;
        (
            self.address(b0, b1),
            if self.has_ports() { low16(meta) } else { 0 },
        )
    }

    /// ICMP echo identifier, ESP SPI or GRE key; `None` for protocols with ports.
    #[must_use]
    pub const fn flow_id(&self) -> Option<u32> {
        if self.has_ports() {
            return None;
        }
        let [_, _, _, _, b0, b1, b2, b3] = self.words[4].to_be_bytes();
        Some(u32::from_be_bytes([b0, b1, b2, b3]))
    }

    const fn has_ports(&self) -> bool {
        matches!(self.protocol(), proto::TCP | proto::UDP | proto::SCTP) && !self.is_fragment()
    }

    fn address(&self, high: u64, low: u64) -> IpAddr {
        if self.is_ipv6() {
            return IpAddr::V6(Ipv6Addr::from(u128::from(high) << 64 | u128::from(low)));
        }
        let [_, _, _, _, a, b, c, d] = low.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    }
}

const fn low16(value: u64) -> u16 {
    let [.., high, low] = value.to_be_bytes();
    u16::from_be_bytes([high, low])
}

fn address_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn meta([outer, inner]: [u16; 2], protocol: u8, low: u32) -> u64 {
    u64::from(outer & 0xfff) << 52
        | u64::from(inner & 0xfff) << 40
        | u64::from(protocol) << 32
        | u64::from(low)
}

fn words(a: u128, b: u128, meta: u64, kind: u64) -> [u64; KEY_WORDS] {
    let halves = |bits: u128| {
        let [h0, h1, h2, h3, h4, h5, h6, h7, l0, l1, l2, l3, l4, l5, l6, l7] = bits.to_be_bytes();
        let high = u64::from_be_bytes([h0, h1, h2, h3, h4, h5, h6, h7]);
        (high, u64::from_be_bytes([l0, l1, l2, l3, l4, l5, l6, l7]))
    };
    let ((a0, a1), (b0, b1)) = (halves(a), halves(b));
    [a0, a1, b0, b1, meta, kind]
}

impl fmt::Display for SessionKey {
    /// `tcp 10.0.0.1:80 <-> 10.0.0.2:40000`, with ` vlan N` (or `N.M`, outer first) behind it if tagged.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.words[5] & KIND_L2 != 0 {
            let [dst, src, _, _, meta, _] = self.words;
            let (dst, src) = (crate::mac::Mac::from_u64(dst), crate::mac::Mac::from_u64(src));
            write!(out, "ethertype {:#06x} {src} -> {dst}", low16(meta))?;
        } else {
            write!(out, "{} ", self.protocol_name())?;
            let ((a, port_a), (b, port_b)) = (self.a(), self.b());
            match (self.flow_id(), self.protocol()) {
                (None, _) => {
                    let end = |ip, port| std::net::SocketAddr::new(ip, port);
                    write!(out, "{} <-> {}", end(a, port_a), end(b, port_b))?;
                }
                (Some(id), _) if self.is_fragment() => write!(out, "{a} -> {b} fragment {id}")?,
                (Some(id), proto::ICMP | proto::ICMPV6) => write!(out, "{a} <-> {b} id {id}")?,
                (Some(spi), proto::ESP) => write!(out, "{a} <-> {b} spi {spi:#010x}")?,
                (Some(key), proto::GRE) => write!(out, "{a} <-> {b} key {key:#x}")?,
                (Some(_), other) => write!(out, "{a} <-> {b} protocol {other}")?,
            }
        }
        match self.vlans() {
            [0, 0] => Ok(()),
            [vlan, 0] => write!(out, " vlan {vlan}"),
            [outer, inner] => write!(out, " vlan {outer}.{inner}"),
        }
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(protocol: u8, src: &str, dst: &str, selector: Selector) -> (SessionKey, Direction) {
        SessionKey::of_packet(
            [0, 0],
            protocol,
            src.parse().unwrap(),
            dst.parse().unwrap(),
            selector,
        )
    }

    #[test]
    fn both_directions_give_one_key() {
        let (there, way) = key(proto::TCP, "10.0.0.2", "10.0.0.1", Selector::Ports(40000, 80));
        let (back, other_way) = key(proto::TCP, "10.0.0.1", "10.0.0.2", Selector::Ports(80, 40000));
        assert_eq!(there, back);
        assert_eq!(way, other_way.reversed());
        let (other, _) = key(proto::TCP, "10.0.0.1", "10.0.0.2", Selector::Ports(40000, 80));
        assert_ne!(there, other, "ports belong to their addresses");
    }

    #[test]
    fn equal_addresses_are_ordered_by_port() {
        let (there, way) = key(proto::UDP, "10.0.0.1", "10.0.0.1", Selector::Ports(2, 1));
        let (back, other_way) = key(proto::UDP, "10.0.0.1", "10.0.0.1", Selector::Ports(1, 2));
        assert_eq!((there, way), (back, other_way.reversed()));
    }

    #[test]
    fn text_for_operators() {
        let text = |protocol, src, dst, selector| key(protocol, src, dst, selector).0.to_string();
        let ports = Selector::Ports(40000, 80);
        assert_eq!(
            text(proto::TCP, "10.0.0.2", "10.0.0.1", ports),
            "tcp 10.0.0.1:80 <-> 10.0.0.2:40000"
        );
        assert_eq!(
            text(proto::UDP, "fe80::2", "fe80::1", ports),
            "udp [fe80::1]:80 <-> [fe80::2]:40000"
        );
        assert_eq!(
            text(proto::ICMP, "10.0.0.2", "10.0.0.1", Selector::Id(7)),
            "icmp 10.0.0.1 <-> 10.0.0.2 id 7"
        );
        assert_eq!(
            text(proto::ESP, "10.0.0.2", "10.0.0.1", Selector::Id(0xab)),
            "esp 10.0.0.1 <-> 10.0.0.2 spi 0x000000ab"
        );
        let (src, dst) = ("10.0.0.2".parse().unwrap(), "10.0.0.1".parse().unwrap());
        let (tagged, _) = SessionKey::of_packet([100, 4094], proto::TCP, src, dst, ports);
        assert_eq!(
            tagged.to_string(),
            "tcp 10.0.0.1:80 <-> 10.0.0.2:40000 vlan 100.4094"
        );
        assert_eq!(tagged.vlans(), [100, 4094]);
    }

    #[test]
    fn an_ipv6_packet_with_mapped_addresses_is_not_the_ipv4_session() {
        let (v4, _) = key(proto::TCP, "10.0.0.2", "10.0.0.1", Selector::Ports(1, 2));
        let (v6, _) = key(
            proto::TCP,
            "::ffff:10.0.0.2",
            "::ffff:10.0.0.1",
            Selector::Ports(1, 2),
        );
        assert_ne!(v4, v6);
    }

    #[test]
    fn fragments_are_named_by_direction_and_id() {
        let (session, way) = key(proto::UDP, "10.0.0.2", "10.0.0.1", Selector::Ports(9, 1));
        let (tuple, same_way) = key(proto::UDP, "10.0.0.2", "10.0.0.1", Selector::Id(0));
        assert_eq!(session.fragment(way, 77), tuple.fragment(same_way, 77));
        assert_ne!(session.fragment(way, 77), session.fragment(way.reversed(), 77));
        assert_ne!(session.fragment(way, 77), session.fragment(way, 78));
        assert!(session.fragment(way, 77).is_fragment());
    }

    proptest::proptest! {
        #[test]
        fn words_round_trip(src: u128, dst: u128, vlans: [u16; 2], protocol: u8, id: u32, v6: bool) {
            let address = |bits: u128| if v6 {
                IpAddr::V6(Ipv6Addr::from_bits(bits))
            } else {
                IpAddr::V4(Ipv4Addr::from_octets([bits.to_be_bytes()[0], bits.to_be_bytes()[1], 0, 1]))
            };
            let (src, dst) = (address(src), address(dst));
            let (key, way) = SessionKey::of_packet(vlans, protocol, src, dst, Selector::Id(id));
            proptest::prop_assert_eq!(SessionKey::from_words(key.words()), key);
            let ends = if way == Direction::AToB { (key.a().0, key.b().0) } else { (key.b().0, key.a().0) };
            proptest::prop_assert_eq!(ends, (src, dst));
            proptest::prop_assert_eq!(key.protocol(), protocol);
            let _ = key.to_string();
        }
    }
}
