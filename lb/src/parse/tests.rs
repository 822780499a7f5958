use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::key::{Selector, proto};

const DST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const SRC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

fn link(tags: &[(u16, u16)], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [DST, SRC].concat();
    for (tpid, tci) in tags {
        frame.extend_from_slice(&tpid.to_be_bytes());
        frame.extend_from_slice(&tci.to_be_bytes());
    }
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(packet);
    frame
}

fn v4(src: [u8; 4], dst: [u8; 4], protocol: u8, options: usize, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let header = 20 + options * 4;
    let mut packet = vec![0u8; header];
    packet[0] = 0x40 | u8::try_from(header / 4).unwrap();
    packet[2..4].copy_from_slice(&u16::try_from(header + payload.len()).unwrap().to_be_bytes());
    packet[4..6].copy_from_slice(&0x1234u16.to_be_bytes());
    packet[6..8].copy_from_slice(&fragment.to_be_bytes());
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&src);
    packet[16..20].copy_from_slice(&dst);
    packet.extend_from_slice(payload);
    packet
}

fn v6(src: u8, dst: u8, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0u8; 40];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet[6] = next_header;
    (packet[8], packet[23]) = (0xfd, src);
    (packet[24], packet[39]) = (0xfd, dst);
    packet.extend_from_slice(payload);
    packet
}

fn ports(src: u16, dst: u16, header: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; header];
    bytes[..2].copy_from_slice(&src.to_be_bytes());
    bytes[2..4].copy_from_slice(&dst.to_be_bytes());
    bytes
}

fn expected(
    vlans: [u16; 2],
    protocol: u8,
    src: &str,
    dst: &str,
    selector: Selector,
) -> (SessionKey, Direction) {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    SessionKey::of_packet(vlans, protocol, address(src), address(dst), selector)
}

const A: [u8; 4] = [10, 0, 0, 2];
const B: [u8; 4] = [10, 0, 0, 1];

#[test]
fn tcp_over_ipv4_with_options_and_two_tags() {
    let mut tcp = ports(40000, 80, 20);
    tcp[13] = tcp_flag::SYN | tcp_flag::ACK;
    let packet = v4(A, B, proto::TCP, 3, 0x4000, &tcp);
    let parsed = parse(&link(
        &[(ethertype::SERVICE_VLAN, 0x6064), (ethertype::VLAN, 7)],
        ethertype::IPV4,
        &packet,
    ));
    let (key, direction) = expected(
        [100, 7],
        proto::TCP,
        "10.0.0.2",
        "10.0.0.1",
        Selector::Ports(40000, 80),
    );
    assert_eq!(
        (parsed.class(), *parsed.key(), parsed.direction()),
        (Class::Session, key, direction)
    );
    assert_eq!(parsed.tcp_flags(), tcp_flag::SYN | tcp_flag::ACK);
    assert_eq!((parsed.l3_offset(), parsed.l4_offset()), (Some(22), Some(54)));
    assert_eq!(
        (parsed.vlans(), parsed.vlan_tags(), parsed.ethertype()),
        ([100, 7], 2, ethertype::IPV4)
    );
}

#[test]
fn a_priority_tag_is_no_vlan() {
    let packet = v4(A, B, proto::UDP, 0, 0, &ports(1, 2, 8));
    let tagged = parse(&link(&[(ethertype::VLAN, 0xe000)], ethertype::IPV4, &packet));
    let plain = parse(&link(&[], ethertype::IPV4, &packet));
    assert_eq!(tagged.key(), plain.key());
    assert_eq!((tagged.vlan_tags(), tagged.vlans()), (1, [0, 0]));
}

#[test]
fn protocols_without_ports_use_their_own_number() {
    let mut echo = vec![8u8, 0, 0, 0, 0x12, 0x34, 0, 1];
    let cases = [
        (proto::ICMP, echo.clone(), 0x1234),
        (proto::ESP, vec![0, 0, 1, 2, 0, 0, 0, 9], 0x102),
        (
            proto::GRE,
            vec![0xa0, 0, 8, 0, 0, 0, 0, 0, 1, 2, 3, 4],
            0x0102_0304,
        ),
        (proto::GRE, vec![0x20, 1, 0x88, 0x0b, 0, 99, 0, 7], 7),
        (proto::GRE, vec![0, 0, 8, 0], 0),
    ];
    for (protocol, payload, id) in cases {
        let parsed = parse(&link(&[], ethertype::IPV4, &v4(A, B, protocol, 0, 0, &payload)));
        assert_eq!(parsed.class(), Class::Session, "protocol {protocol}");
        assert_eq!(
            *parsed.key(),
            expected([0, 0], protocol, "10.0.0.2", "10.0.0.1", Selector::Id(id)).0
        );
    }
    echo[0] = 13;
    let timestamp = parse(&link(&[], ethertype::IPV4, &v4(A, B, proto::ICMP, 0, 0, &echo)));
    assert_eq!(timestamp.class(), Class::NonSession);
}

#[test]
fn ipv6_extension_headers_are_walked_within_caps() {
    let extension = |next: u8, len_units: u8| {
        let mut header = vec![0u8; (usize::from(len_units) + 1) * 8];
        (header[0], header[1]) = (next, len_units);
        header
    };
    let udp = ports(5, 6, 8);
    let walked = [
        extension(43, 1),
        extension(60, 0),
        extension(proto::UDP, 3),
        udp.clone(),
    ]
    .concat();
    let parsed = parse(&link(&[], ethertype::IPV6, &v6(1, 2, 0, &walked)));
    assert_eq!(parsed.class(), Class::Session);
    assert_eq!(parsed.l4_offset(), Some(14 + 40 + 16 + 8 + 32));
    let key = expected([0, 0], proto::UDP, "fd00::1", "fd00::2", Selector::Ports(5, 6));
    assert_eq!((*parsed.key(), parsed.direction()), key);

    let nine = [
        (0..8).flat_map(|_| extension(60, 0)).collect(),
        extension(proto::UDP, 0),
        udp.clone(),
    ]
    .concat();
    let too_many = parse(&link(&[], ethertype::IPV6, &v6(1, 2, 60, &nine)));
    assert_eq!(
        (too_many.class(), too_many.l4_offset()),
        (Class::NonSession, None)
    );

    let long = [
        extension(60, 15),
        extension(60, 15),
        extension(proto::UDP, 0),
        udp,
    ]
    .concat();
    let too_long = parse(&link(&[], ethertype::IPV6, &v6(1, 2, 60, &long)));
    assert_eq!(too_long.class(), Class::NonSession);
}

#[test]
fn fragments_of_a_datagram_share_a_key() {
    let first = parse(&link(
        &[],
        ethertype::IPV4,
        &v4(A, B, proto::UDP, 0, 0x2000, &ports(9, 1, 64)),
    ));
    let later = parse(&link(
        &[],
        ethertype::IPV4,
        &v4(A, B, proto::UDP, 0, 8, &[0xff; 64]),
    ));
    assert_eq!(
        (first.class(), later.class()),
        (Class::FirstFragment, Class::LaterFragment)
    );
    assert_eq!(first.fragment_key(), later.fragment_key());
    assert_eq!(
        *first.key(),
        expected([0, 0], proto::UDP, "10.0.0.2", "10.0.0.1", Selector::Ports(9, 1)).0
    );
    assert_eq!(later.l4_offset(), None);

    let fragment = |next: u8, word: u16, rest: &[u8]| {
        let mut header = vec![next, 0, 0, 0, 0, 0, 0, 42];
        header[2..4].copy_from_slice(&word.to_be_bytes());
        header.extend_from_slice(rest);
        link(&[], ethertype::IPV6, &v6(1, 2, proto::IPV6_FRAGMENT, &header))
    };
    // The first fragment carries one more extension header, so the two see different upper protocols.
    let destination = [vec![proto::UDP, 0, 0, 0, 0, 0, 0, 0], ports(9, 1, 8)].concat();
    let (first, later) = (
        parse(&fragment(60, 1, &destination)),
        parse(&fragment(60, 8 << 3, &[0xff; 64])),
    );
    assert_eq!(
        (first.class(), later.class()),
        (Class::FirstFragment, Class::LaterFragment)
    );
    assert_eq!(first.fragment_key(), later.fragment_key());
    let atomic = parse(&fragment(proto::UDP, 0, &ports(9, 1, 8)));
    assert_eq!(
        atomic.class(),
        Class::Session,
        "offset 0 and no more fragments (RFC 6946)"
    );
}

#[test]
fn a_tiny_first_fragment_stays_with_its_datagram() {
    let tiny = parse(&link(
        &[],
        ethertype::IPV4,
        &v4(A, B, proto::TCP, 0, 0x2000, &ports(9, 1, 8)),
    ));
    let later = parse(&link(&[], ethertype::IPV4, &v4(A, B, proto::TCP, 0, 1, &[0; 40])));
    assert_eq!((tiny.class(), tiny.key()), (Class::LaterFragment, later.key()));
}

#[test]
fn an_icmp_error_names_the_session_it_reports_on() {
    let sent = v4(A, B, proto::UDP, 0, 0, &ports(40000, 53, 8));
    let original = parse(&link(&[], ethertype::IPV4, &sent));
    let error = [vec![3u8, 3, 0, 0, 0, 0, 0, 0], sent].concat();
    let parsed = parse(&link(
        &[],
        ethertype::IPV4,
        &v4([192, 0, 2, 9], A, proto::ICMP, 0, 0, &error),
    ));
    assert_eq!((parsed.class(), parsed.key()), (Class::IcmpError, original.key()));
    assert_eq!(parsed.direction(), original.direction().reversed());

    let sent = v6(1, 2, proto::TCP, &ports(40000, 80, 20));
    let original = parse(&link(&[], ethertype::IPV6, &sent));
    // Eight bytes of the transport header are all that some routers return.
    let error = [vec![2u8, 0, 0, 0, 0, 0, 5, 0], sent[..48].to_vec()].concat();
    let parsed = parse(&link(&[], ethertype::IPV6, &v6(9, 1, proto::ICMPV6, &error)));
    assert_eq!((parsed.class(), parsed.key()), (Class::IcmpError, original.key()));
}

#[test]
fn frames_without_a_session_hash_by_what_they_have() {
    let arp = parse(&link(&[(ethertype::VLAN, 5)], ethertype::ARP, &[0; 28]));
    assert_eq!(arp.class(), Class::NonSession);
    assert_eq!(
        *arp.key(),
        SessionKey::of_link(Mac(DST).to_u64(), Mac(SRC).to_u64(), [5, 0], ethertype::ARP)
    );
    let ospf = parse(&link(&[], ethertype::IPV4, &v4(A, B, 89, 0, 0, &[0; 8])));
    assert_eq!((ospf.class(), ospf.protocol()), (Class::NonSession, Some(89)));
    assert_eq!(
        *ospf.key(),
        expected([0, 0], 89, "10.0.0.2", "10.0.0.1", Selector::Id(0)).0
    );
    let three_tags = [(ethertype::VLAN, 1), (ethertype::VLAN, 2), (ethertype::VLAN, 3)];
    assert_eq!(
        parse(&link(&three_tags, ethertype::IPV4, &[0; 40])).class(),
        Class::NonSession
    );
}

#[test]
fn padding_is_not_a_transport_header() {
    let mut packet = v4(A, B, proto::UDP, 0, 0, &[]);
    packet.extend_from_slice(&[0u8; 26]);
    let parsed = parse(&link(&[], ethertype::IPV4, &packet));
    assert_eq!((parsed.class(), parsed.l3_offset()), (Class::Malformed, None));
}

#[test]
fn contradicting_ip_headers_are_malformed() {
    let good = v4(A, B, proto::UDP, 0, 0, &ports(1, 2, 8));
    for (offset, byte) in [(0, 0x65), (0, 0x44), (0, 0x4f)] {
        let mut packet = good.clone();
        packet[offset] = byte;
        assert_eq!(
            parse(&link(&[], ethertype::IPV4, &packet)).class(),
            Class::Malformed
        );
    }
}

/// Frames that reach every branch, for mutation and truncation.
fn seeds() -> Vec<Vec<u8>> {
    let udp = ports(1, 2, 8);
    let inner = v6(
        1,
        2,
        60,
        &[vec![proto::UDP, 0, 0, 0, 0, 0, 0, 0], udp.clone()].concat(),
    );
    vec![
        link(
            &[(ethertype::VLAN, 9)],
            ethertype::IPV4,
            &v4(A, B, proto::TCP, 2, 0, &ports(1, 2, 20)),
        ),
        link(&[], ethertype::IPV4, &v4(A, B, proto::GRE, 0, 0, &[0xa0; 16])),
        link(
            &[],
            ethertype::IPV4,
            &v4(A, B, proto::SCTP, 0, 0x2000, &ports(1, 2, 12)),
        ),
        link(
            &[],
            ethertype::IPV6,
            &v6(
                1,
                2,
                proto::IPV6_FRAGMENT,
                &[vec![17, 0, 0, 1, 0, 0, 0, 1], udp].concat(),
            ),
        ),
        link(
            &[],
            ethertype::IPV6,
            &v6(
                2,
                9,
                proto::ICMPV6,
                &[vec![1, 0, 0, 0, 0, 0, 0, 0], inner].concat(),
            ),
        ),
        link(&[], ethertype::ARP, &[0; 28]),
    ]
}

fn offsets_lie_inside(bytes: &[u8]) -> Result<(), TestCaseError> {
    let parsed = parse(bytes);
    for offset in [parsed.l3_offset(), parsed.l4_offset()].into_iter().flatten() {
        prop_assert!((14..=bytes.len()).contains(&offset));
    }
    if parsed.session_key().is_some() {
        prop_assert!(parsed.l4_offset().is_some_and(|l4| l4 < bytes.len()));
    }
    Ok(())
}

#[test]
fn every_prefix_is_parsed_without_reading_past_it() {
    for frame in seeds() {
        let whole = parse(&frame);
        assert_ne!(whole.class(), Class::Malformed);
        for len in 0..frame.len() {
            offsets_lie_inside(&frame[..len]).unwrap();
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        offsets_lie_inside(&bytes)?;
    }

    #[test]
    fn mutated_frames_are_parsed(
        seed in 0..6usize,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        let mut frame = seeds().swap_remove(seed);
        for (index, byte) in changes {
            let at = index.index(frame.len());
            frame[at] = byte;
        }
        offsets_lie_inside(&frame)?;
    }

    #[test]
    fn replies_find_the_session(src: [u8; 4], dst: [u8; 4], from: u16, to: u16, tcp: bool) {
        let protocol = if tcp { proto::TCP } else { proto::UDP };
        let there = parse(&link(&[], ethertype::IPV4, &v4(src, dst, protocol, 0, 0, &ports(from, to, 20))));
        let back = parse(&link(&[], ethertype::IPV4, &v4(dst, src, protocol, 1, 0, &ports(to, from, 20))));
        prop_assert_eq!(there.key(), back.key());
        if (src, from) != (dst, to) {
            prop_assert_eq!(there.direction(), back.direction().reversed());
        }
    }
}
