//! What neighbours on the network know of a guest: which IP addresses are behind its MAC address, and by which port of a
//! switch it is reached. For topology `pinned`, where a guest moves from one switch port to another.
//!
//! [`snoop`] reads addresses from frames that pass anyway; [`announce`] makes the frames that tell the network where a station is
//! now. Both are pure.

pub mod announce;
pub mod snoop;

use vnic_lb::mac::Mac;
use vnic_lb::pinned::Station;

use crate::fabric::vlan::Tag;
use crate::switch::addresses;

/// EtherType of RARP (RFC 903).
const RARP: u16 = 0x8035;
/// Ethernet, IPv4, and the lengths of their addresses: how an ARP packet begins (RFC 826).
const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// The hop limit of neighbour discovery: no router has passed the packet on (RFC 4861, 7.1).
const ND_HOP_LIMIT: u8 = 255;
/// ICMPv6 types (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Target link-layer address, an option of 8 bytes (RFC 4861, 4.6.1).
const TARGET_ADDRESS: [u8; 2] = [2, 1];

/// The station that sent a frame.
#[must_use]
pub fn sender(head: &[u8]) -> Option<Station> {
    let (_, mac) = addresses(head)?;
    Some(of(mac, head))
}

/// The station, or group, that a frame is for.
#[must_use]
pub fn receiver(head: &[u8]) -> Option<Station> {
    let (mac, _) = addresses(head)?;
    Some(of(mac, head))
}

fn of(mac: Mac, head: &[u8]) -> Station {
    let vlan = Tag::of(head).vlan();
    Station { mac, vlan }
}
