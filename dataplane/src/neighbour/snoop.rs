//! IP addresses of guests, read from what they say to their neighbours and from what a DHCP server grants them.
//!
//! A probe (ARP with the sender 0.0.0.0, a neighbour solicitation from ::) asks whether an address is free, so it is no proof that
//! the guest has it: to announce an address that turned out to be another host's would do harm.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vnic_lb::key::proto;
use vnic_lb::mac::Mac;
use vnic_lb::parse::ethertype;
use vnic_lb::pinned::Station;

use super::{
    ARP_OF_IPV4, ND_HOP_LIMIT, NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION, TARGET_ADDRESS, sender,
};
use crate::fabric::vlan::{TAG_LEN, TAG_OFFSET};

/// UDP ports of a DHCP server and a client (RFC 2131, 4.1), in the order of an answer's header.
const SERVER_TO_CLIENT: [u8; 4] = [0, 67, 0, 68];
/// Where options begin in a DHCP message, behind their cookie.
const OPTIONS: usize = 240;
const COOKIE: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
/// Options that are looked at to find the type of a message, which servers write first.
const MAX_OPTIONS: usize = 32;
/// Message type 5 (RFC 2132, 9.6).
const ACK: u8 = 5;

/// An address that a station was seen to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snooped {
    /// Whose.
    pub station: Station,
    /// The address.
    pub address: IpAddr,
    /// IPv6: it says that it is a router.
    pub router: bool,
}

/// What a frame from a guest tells: ARP, and neighbour discovery.
#[must_use]
#[inline]
pub fn from_guest(head: &[u8]) -> Option<Snooped> {
    let (kind, packet) = packet(head)?;
    match kind {
        ethertype::ARP => from_arp(head, packet),
        ethertype::IPV6 if packet.get(6) == Some(&proto::ICMPV6) => from_discovery(head, packet),
        _ => None,
    }
}

/// What a frame to a guest tells: that a DHCP server has granted it an address.
#[must_use]
#[inline]
pub fn to_guest(head: &[u8]) -> Option<Snooped> {
    let (kind, packet) = packet(head)?;
    if kind != ethertype::IPV4 || packet.get(9) != Some(&proto::UDP) {
        return None;
    }
    from_dhcp(head, packet)
}

/// The EtherType behind at most one customer tag, and what is behind it.
#[inline]
fn packet(head: &[u8]) -> Option<(u16, &[u8])> {
    let kind = |at: usize| {
        let bytes = head.get(at..)?.first_chunk()?;
        Some((u16::from_be_bytes(*bytes), head.get(at + 2..)?))
    };
    match kind(TAG_OFFSET)? {
        (ethertype::VLAN, _) => kind(TAG_OFFSET + TAG_LEN),
        found => Some(found),
    }
}

fn from_arp(head: &[u8], packet: &[u8]) -> Option<Snooped> {
    let packet = packet.first_chunk::<28>()?;
    let ([fixed @ .., o0, o1], rest) = packet.split_first_chunk::<8>()?;
    let (mac, rest) = rest.split_first_chunk::<6>()?;
    let address = Ipv4Addr::from(*rest.first_chunk::<4>()?);
    let station = sender(head)?;
    let is_sane = *fixed == ARP_OF_IPV4 && matches!([*o0, *o1], [0, 1 | 2]);
    (is_sane && station.mac.0 == *mac && is_hosts_v4(address)).then_some(Snooped {
        station,
        address: address.into(),
        router: false,
    })
}

fn from_discovery(head: &[u8], packet: &[u8]) -> Option<Snooped> {
    let (header, message) = packet.split_first_chunk::<40>()?;
    let source = Ipv6Addr::from(*header.get(8..)?.first_chunk::<16>()?);
    let (&[kind, code, _, _, flags, _, _, _], body) = message.split_first_chunk::<8>()?;
    if header[0] >> 4 != 6 || header[7] != ND_HOP_LIMIT || code != 0 {
        return None;
    }
    let station = sender(head)?;
    let (address, router) = match kind {
        ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION => (source, false),
        ROUTER_ADVERTISEMENT => (source, true),
        NEIGHBOUR_ADVERTISEMENT => {
            let (target, options) = body.split_first_chunk::<16>()?;
            // On behalf of somebody else's interface.
            if let Some((kind, mac)) = options.split_first_chunk::<2>()
                && *kind == TARGET_ADDRESS
                && mac.first_chunk() != Some(&station.mac.0)
            {
                return None;
            }
            (Ipv6Addr::from(*target), flags & 0x80 != 0)
        }
        _ => return None,
    };
    is_hosts_v6(address).then_some(Snooped {
        station,
        address: address.into(),
        router,
    })
}

#[inline(never)]
fn from_dhcp(head: &[u8], packet: &[u8]) -> Option<Snooped> {
    let &[version, _, _, _, _, _, fragment0, fragment1, ..] = packet.first_chunk::<20>()?;
    let udp = packet.get(usize::from(version & 0xf) * 4..)?;
    let whole = u16::from_be_bytes([fragment0, fragment1]) & 0x3fff == 0;
    if version >> 4 != 4 || version & 0xf < 5 || !whole || udp.first_chunk() != Some(&SERVER_TO_CLIENT) {
        return None;
    }
    let message = udp.get(8..)?;
    // A reply (2) over Ethernet (1) with addresses of 6 bytes.
    let is_reply = message.first_chunk() == Some(&[2, 1, 6]);
    let granted = Ipv4Addr::from(*message.get(16..)?.first_chunk::<4>()?);
    let mac = Mac(*message.get(28..)?.first_chunk::<6>()?);
    let cookie = message.get(OPTIONS - COOKIE.len()..)?.first_chunk();
    if !is_reply || cookie != Some(&COOKIE) || !is_ack(message.get(OPTIONS..)?) {
        return None;
    }
    let vlan = sender(head)?.vlan;
    (!mac.is_group() && is_hosts_v4(granted)).then_some(Snooped {
        station: Station { mac, vlan },
        address: granted.into(),
        router: false,
    })
}

fn is_ack(mut options: &[u8]) -> bool {
    for _ in 0..MAX_OPTIONS {
        match *options {
            [53, 1, kind, ..] => return kind == ACK,
            [0, ref rest @ ..] => options = rest,
            [255, ..] => return false,
            [_, len, ref rest @ ..] if rest.len() >= usize::from(len) => {
                options = &rest[usize::from(len)..];
            }
            _ => return false,
        }
    }
    false
}

/// Whether a host of a network may have it: not unspecified, loopback, multicast, reserved or broadcast.
fn is_hosts_v4(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    !matches!(first, 0 | 127 | 224..)
}

fn is_hosts_v6(address: Ipv6Addr) -> bool {
    let no_hosts = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    !no_hosts && address.to_ipv4_mapped().is_none()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::neighbour::announce::{Announcement, frame};

    const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

    fn announced(address: &str, router: bool) -> Vec<u8> {
        let address = address.parse().unwrap();
        let station = Station { mac: MAC, vlan: 0 };
        frame(station, Announcement::Address { address, router })
    }

    fn dhcp(kind: u8, granted: [u8; 4], tag: &[u8]) -> Vec<u8> {
        let mut message = vec![2, 1, 6, 0];
        message.extend([0; 12]);
        message.extend(granted);
        message.extend([0; 8]);
        message.extend(MAC.0);
        message.resize(OPTIONS - 4, 0);
        message.extend(COOKIE);
        message.extend([0, 54, 4, 10, 0, 0, 1, 53, 1, kind, 255]);
        let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], tag, &[8, 0, 0x45, 0, 0, 0]].concat();
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 255, 255, 255, 255]);
        frame.extend(SERVER_TO_CLIENT);
        frame.extend([0; 4]);
        frame.extend(message);
        frame
    }

    #[test]
    fn addresses_that_no_host_has_are_not_taken() {
        let taken = |address: &str| from_guest(&announced(address, false)).is_some();
        for address in ["10.0.0.1", "192.0.2.255", "169.254.1.1", "fe80::1", "2001:db8::1"] {
            assert!(taken(address), "{address}");
        }
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!taken(address), "{address}");
        }
    }

    #[test]
    fn a_probe_is_no_proof() {
        let mut probe = announced("10.0.0.1", false);
        probe[28..32].fill(0);
        assert_eq!(from_guest(&probe), None);
        let mut solicitation = announced("fd00::1", false);
        solicitation[54] = NEIGHBOUR_SOLICITATION;
        assert!(from_guest(&solicitation).is_some(), "from an address that it has");
        solicitation[22..38].fill(0);
        assert_eq!(from_guest(&solicitation), None);
    }

    #[test]
    fn what_is_said_for_others_or_came_from_afar_is_not_taken() {
        let mut arp = announced("10.0.0.1", false);
        arp[22] ^= 2;
        assert_eq!(from_guest(&arp), None, "another sender");
        let mut proxied = announced("fd00::1", false);
        proxied[54 + 26] ^= 2;
        assert_eq!(from_guest(&proxied), None, "another target address");
        let mut routed = announced("fd00::1", false);
        routed[21] = 64;
        assert_eq!(from_guest(&routed), None, "a hop limit below 255");
        let mut advertised = announced("fe80::1", false);
        advertised[54] = ROUTER_ADVERTISEMENT;
        assert!(from_guest(&advertised).is_some_and(|seen| seen.router));
    }

    #[test]
    fn a_granted_address_is_the_clients() {
        let granted = |vlan| Snooped {
            station: Station { mac: MAC, vlan },
            address: IpAddr::from([10, 0, 0, 7]),
            router: false,
        };
        assert_eq!(to_guest(&dhcp(ACK, [10, 0, 0, 7], &[])), Some(granted(0)));
        let tag = [0x81, 0, 0x20, 9];
        assert_eq!(to_guest(&dhcp(ACK, [10, 0, 0, 7], &tag)), Some(granted(9)));
        for kind in [2, 4, 6] {
            assert_eq!(to_guest(&dhcp(kind, [10, 0, 0, 7], &[])), None, "type {kind}");
        }
        assert_eq!(to_guest(&dhcp(ACK, [0; 4], &[])), None, "an answer to INFORM");
        let whole = dhcp(ACK, [10, 0, 0, 7], &[]);
        assert_eq!(from_guest(&whole), None);
        for len in 0..whole.len() - 1 {
            assert_eq!(to_guest(&whole[..len]), None, "cut to {len}");
        }
        let mut fragment = whole.clone();
        fragment[20] = 0x20;
        assert_eq!(to_guest(&fragment), None);
    }

    proptest! {
        /// Frames that are nearly right: some bytes differ, and the end is missing.
        #[test]
        fn nothing_that_can_be_sent_is_too_much(
            which in 0..3usize,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            len in any::<prop::sample::Index>(),
        ) {
            let frames = [announced("10.0.0.1", false), announced("fd00::1", true), dhcp(ACK, [10, 0, 0, 7], &[])];
            let mut frame = frames[which].clone();
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            frame.truncate(len.index(frame.len() + 1));
            let found = [from_guest(&frame), to_guest(&frame)].into_iter().flatten();
            for snooped in found {
                prop_assert!(frame.len() >= 42, "{snooped:?}");
            }
        }
    }
}
