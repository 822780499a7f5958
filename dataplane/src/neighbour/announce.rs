//! Frames that tell the network where a station is: any switch on their way learns its port from the source address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vnic_lb::key::proto;
use vnic_lb::mac::Mac;
use vnic_lb::parse::ethertype;
use vnic_lb::pinned::Station;

use super::{ARP_OF_IPV4, ND_HOP_LIMIT, NEIGHBOUR_ADVERTISEMENT, RARP, TARGET_ADDRESS};
use crate::checksum::{fold, sum};
use crate::fabric::vlan::{NO_VLAN, TAG_OFFSET, tag_bytes};

/// The shortest frame without a tag and without the frame check sequence (IEEE 802.3, 3.2.8).
const MIN_LEN: usize = 60;
/// All nodes of the link, and the Ethernet group that it maps to (RFC 2464, 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);

/// What is announced of a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announcement {
    /// That it is here; for a guest whose addresses are not known.
    Presence,
    /// That it has an address.
    Address {
        /// Which.
        address: IpAddr,
        /// IPv6: it routes. Its neighbours would take it off their lists of routers if it said otherwise (RFC 4861, 7.2.5).
        router: bool,
    },
}

/// The frame for it, with the tag of the station's VLAN: RARP, gratuitous ARP (RFC 5227, 2.3), or an unsolicited neighbour
/// advertisement (RFC 4861, 7.2.6).
#[must_use]
pub fn frame(station: Station, announcement: Announcement) -> Vec<u8> {
    let (to, kind, packet) = match announcement {
        // Asking for one's own protocol address, as hypervisors do for a guest that has moved.
        Announcement::Presence => (
            Mac::BROADCAST,
            RARP,
            arp(
                3,
                (station.mac, Ipv4Addr::UNSPECIFIED),
                (station.mac, Ipv4Addr::UNSPECIFIED),
            ),
        ),
        Announcement::Address {
            address: IpAddr::V4(address),
            ..
        } => (
            Mac::BROADCAST,
            ethertype::ARP,
            arp(1, (station.mac, address), (Mac::default(), address)),
        ),
        Announcement::Address {
            address: IpAddr::V6(address),
            router,
        } => (
            ALL_NODES_MAC,
            ethertype::IPV6,
            advertisement(station.mac, address, router),
        ),
    };
    let mut frame = [to.0, station.mac.0].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame.resize(frame.len().max(MIN_LEN), 0);
    if station.vlan != NO_VLAN {
        frame.splice(TAG_OFFSET..TAG_OFFSET, tag_bytes(station.vlan));
    }
    frame
}

/// An ARP or RARP packet: operation, sender, target.
fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = ARP_OF_IPV4.to_vec();
    packet.extend(operation.to_be_bytes());
    for (mac, address) in [sender, target] {
        packet.extend(mac.0);
        packet.extend(address.octets());
    }
    packet
}

fn advertisement(mac: Mac, address: Ipv6Addr, router: bool) -> Vec<u8> {
    // Override: neighbours are to take this one. Neither solicited, nor to one of them alone.
    let flags = 0x20 | if router { 0x80 } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    message.extend(TARGET_ADDRESS);
    message.extend(mac.0);
    let [_, _, len0, len1] = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
    let ends = [address.octets(), ALL_NODES.octets()].concat();
    // The pseudo-header (RFC 8200, 8.1).
    let pseudo = [&ends[..], &[0, 0, len0, len1, 0, 0, 0, proto::ICMPV6]].concat();
    let checksum = !fold(sum(&pseudo) + sum(&message));
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, len0, len1, proto::ICMPV6, ND_HOP_LIMIT];
    packet.extend(ends);
    packet.extend(message);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::neighbour::snoop::{Snooped, from_guest};

    const STATION: Station = Station {
        mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
        vlan: NO_VLAN,
    };

    fn of(address: &str, router: bool) -> Announcement {
        let address = address.parse().unwrap();
        Announcement::Address { address, router }
    }

    #[test]
    fn presence_is_a_rarp_request_for_oneself() {
        let frame = frame(STATION, Announcement::Presence);
        let mac = STATION.mac.0;
        let expected = [
            &[0xff; 6][..],
            &mac,
            &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
            &mac,
            &[0; 4],
            &mac,
            &[0; 4],
        ]
        .concat();
        assert_eq!(frame[..42], expected);
        assert_eq!((frame.len(), &frame[42..]), (60, &[0; 18][..]));
    }

    #[test]
    fn an_ipv4_address_is_announced_by_asking_for_it() {
        let station = Station { vlan: 100, ..STATION };
        let frame = frame(station, of("10.77.0.2", false));
        let mac = STATION.mac.0;
        let expected = [
            &[0xff; 6][..],
            &mac,
            &[0x81, 0, 0, 100, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &mac,
            &[10, 77, 0, 2],
            &[0; 6],
            &[10, 77, 0, 2],
        ]
        .concat();
        assert_eq!(frame[..46], expected);
        assert_eq!(frame.len(), 64);
    }

    #[test]
    fn an_ipv6_address_is_advertised_to_all_nodes() {
        let frame = frame(STATION, of("fd77::2", true));
        assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[54 + 4], 0xa0, "router and override");
        let message = &frame[54..];
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        assert_eq!(fold(sum(&pseudo) + sum(message)), 0xffff, "the checksum");
        assert_eq!(message[24..], [&[2, 1][..], &STATION.mac.0].concat());
    }

    #[test]
    fn what_is_announced_is_what_would_be_snooped() {
        for vlan in [NO_VLAN, 7] {
            let station = Station { vlan, ..STATION };
            for (text, router) in [("10.0.0.9", false), ("fe80::9", false), ("fd00::9", true)] {
                let snooped = Snooped {
                    station,
                    address: text.parse().unwrap(),
                    router,
                };
                assert_eq!(from_guest(&frame(station, of(text, router))), Some(snooped));
            }
            assert_eq!(from_guest(&frame(station, Announcement::Presence)), None);
        }
    }
}
