//! The frames: ARP (RFC 826; without an address RFC 5227), neighbour solicitation (RFC 4861, 4.3), ICMP echo (RFC 792).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vnic_lb::mac::Mac;

use super::ProbeTarget;
use crate::checksum::{fold, sum};

const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const ICMP: u8 = 1;
const ICMP_FOR_IPV6: u8 = 58;
const ECHO_REQUEST: u8 = 8;
const NEIGHBOUR_SOLICITATION: u8 = 135;
/// `ECHO_ID` in `bpf/vnic.bpf.c`.
const ECHO_ID: [u8; 2] = [0x76, 0x6e];
/// Shortest frame on the wire, without its checksum.
const SHORTEST: usize = 60;

/// In whose name a probe is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker {
    /// The NIC's own address.
    pub mac: Mac,
    /// Its IP address in the target's network, if it has one.
    pub address: Option<IpAddr>,
}

/// Writes a probe into `out`, in the place of what is there: to `known`, the target's link-layer address, or to everybody.
pub fn write_probe(out: &mut Vec<u8>, asker: &Asker, target: ProbeTarget, known: Option<Mac>) {
    out.clear();
    match (target, asker.address, known) {
        (ProbeTarget::Echo(to), Some(IpAddr::V4(from)), Some(mac)) => echo(out, asker.mac, from, mac, to),
        (ProbeTarget::Echo(to) | ProbeTarget::Neighbour(IpAddr::V4(to)), from, known) => {
            let from = match from {
                Some(IpAddr::V4(from)) => from,
                _ => Ipv4Addr::UNSPECIFIED,
            };
            arp(out, asker.mac, from, known, to);
        }
        (ProbeTarget::Neighbour(IpAddr::V6(to)), from, known) => {
            let from = match from {
                Some(IpAddr::V6(from)) => from,
                // The answer to a solicitation without an address would go to everybody (RFC 4861, 7.2.4).
                _ => link_local(asker.mac),
            };
            solicitation(out, asker.mac, from, known, to);
        }
    }
    if out.len() < SHORTEST {
        out.resize(SHORTEST, 0);
    }
}

fn ethernet(out: &mut Vec<u8>, to: Mac, from: Mac, kind: [u8; 2]) {
    out.extend(to.0);
    out.extend(from.0);
    out.extend(kind);
}

fn arp(out: &mut Vec<u8>, mac: Mac, from: Ipv4Addr, known: Option<Mac>, to: Ipv4Addr) {
    ethernet(out, known.unwrap_or(Mac::BROADCAST), mac, ARP);
    // Ethernet, IPv4, lengths of their addresses, request.
    out.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    out.extend(mac.0);
    out.extend(from.octets());
    out.extend([0; 6]);
    out.extend(to.octets());
}

fn echo(out: &mut Vec<u8>, mac: Mac, from: Ipv4Addr, known: Mac, to: Ipv4Addr) {
    ethernet(out, known, mac, IPV4);
    let header = out.len();
    // 20 bytes of header and 8 of ICMP; one hop: the target is a neighbour.
    out.extend([0x45, 0, 0, 28, 0, 0, 0x40, 0, 1, ICMP, 0, 0]);
    out.extend(from.octets());
    out.extend(to.octets());
    fill_checksum(out, header, header + 10, 0);
    let message = out.len();
    out.extend([ECHO_REQUEST, 0, 0, 0, ECHO_ID[0], ECHO_ID[1], 0, 0]);
    fill_checksum(out, message, message + 2, 0);
}

fn solicitation(out: &mut Vec<u8>, mac: Mac, from: Ipv6Addr, known: Option<Mac>, to: Ipv6Addr) {
    let [.., x, y, z] = to.octets();
    let (mac_to, address_to) = match known {
        Some(known) => (known, to),
        // The target's solicited-node group (RFC 4291, 2.7.1).
        None => {
            let mut group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
            group[13..].copy_from_slice(&[x, y, z]);
            (Mac([0x33, 0x33, 0xff, x, y, z]), Ipv6Addr::from(group))
        }
    };
    ethernet(out, mac_to, mac, IPV6);
    // 32 bytes follow; hop limit 255, which proves that no router was between.
    out.extend([0x60, 0, 0, 0, 0, 32, ICMP_FOR_IPV6, 255]);
    let addresses = out.len();
    out.extend(from.octets());
    out.extend(address_to.octets());
    let message = out.len();
    let pseudo_header = sum(&out[addresses..message]) + 32 + u64::from(ICMP_FOR_IPV6);
    out.extend([NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(to.octets());
    // Source link-layer address, one unit of 8 bytes.
    out.extend([1, 1]);
    out.extend(mac.0);
    fill_checksum(out, message, message + 2, pseudo_header);
}

/// Checksums all from `from`, and what is given, into `field`.
fn fill_checksum(out: &mut [u8], from: usize, field: usize, given: u64) {
    let value = !fold(given + sum(&out[from..]));
    out[field..field + 2].copy_from_slice(&value.to_be_bytes());
}

/// RFC 4291, appendix A.
fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    const NIC: Mac = Mac([0x02, 0, 0, 0, 0, 0x0a]);
    const FAR: Mac = Mac([0x02, 0, 0, 0, 0, 0x0b]);

    fn probe(address: Option<&str>, target: &str, known: Option<Mac>) -> Vec<u8> {
        let asker = Asker {
            mac: NIC,
            address: address.map(|text| text.parse().unwrap()),
        };
        let mut out = vec![1, 2, 3];
        write_probe(&mut out, &asker, target.parse().unwrap(), known);
        out
    }

    #[test]
    fn arp_to_everybody_and_to_the_target() {
        let frame = probe(Some("192.0.2.9"), "192.0.2.1", None);
        let expected = [
            &[0xff; 6][..],
            &NIC.0,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &NIC.0,
            &[192, 0, 2, 9],
            &[0; 6],
            &[192, 0, 2, 1],
            &[0; 18],
        ];
        assert_eq!(frame, expected.concat());
        let frame = probe(None, "192.0.2.1", Some(FAR));
        assert_eq!((&frame[..6], &frame[28..32]), (&FAR.0[..], &[0; 4][..]));
    }

    #[test]
    fn an_echo_needs_both_addresses_and_is_an_arp_request_else() {
        let frame = probe(Some("192.0.2.9"), "icmp:192.0.2.1", Some(FAR));
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[12..14], IPV4);
        assert_eq!(fold(sum(&frame[14..34])), 0xffff);
        assert_eq!(fold(sum(&frame[34..42])), 0xffff);
        for (address, known) in [
            (None, Some(FAR)),
            (Some("192.0.2.9"), None),
            (Some("fe80::1"), Some(FAR)),
        ] {
            assert_eq!(probe(address, "icmp:192.0.2.1", known)[12..14], ARP);
        }
    }

    #[test]
    fn a_solicitation_has_an_address_to_answer_to() {
        let frame = probe(None, "2001:db8::12:3456", None);
        assert_eq!(frame.len(), 86);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        let address = |at: usize| {
            let bytes: [u8; 16] = frame[at..at + 16].try_into().unwrap();
            Ipv6Addr::from(bytes).to_string()
        };
        assert_eq!(address(22), "fe80::ff:fe00:a");
        assert_eq!(address(38), "ff02::1:ff12:3456");
        assert_eq!(address(62), "2001:db8::12:3456");
        let pseudo_header = sum(&frame[22..54]) + 32 + 58;
        assert_eq!(fold(pseudo_header + sum(&frame[54..])), 0xffff);
        let known = probe(Some("2001:db8::1"), "2001:db8::12:3456", Some(FAR));
        assert_eq!((&known[..6], &known[38..54]), (&FAR.0[..], &frame[62..78]));
    }
}
