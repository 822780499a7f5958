//! What tells one session from another behind the IP header: ports, SPI, key, identifier.

use crate::key::{Selector, proto};

/// A transport header, read.
pub(super) enum Transport<'a> {
    /// It belongs to a session.
    Session { selector: Selector, tcp_flags: u8 },
    /// An ICMP or ICMPv6 error about the packet that begins at `original`.
    Error { original: &'a [u8] },
    /// A protocol, or an ICMP message, without sessions.
    Other,
    /// It is cut short.
    Short,
}

const GRE_CHECKSUM_PRESENT: u8 = 0x80;
const GRE_KEY_PRESENT: u8 = 0x20;

/// What an ICMP or ICMPv6 type means to the balancer.
enum Icmp {
    Echo,
    Error,
    Other,
}

fn icmp_kind(v6: bool, icmp_type: u8) -> Icmp {
    match (v6, icmp_type) {
        // Echo reply and request: RFC 792; RFC 4443, section 4.
        (false, 0 | 8) | (true, 128 | 129) => Icmp::Echo,
        // Unreachable, source quench, redirect, time exceeded, parameter problem; RFC 4443, section 3.
        (false, 3 | 4 | 5 | 11 | 12) | (true, 1..=4) => Icmp::Error,
        _ => Icmp::Other,
    }
}

/// ICMP belongs to IPv4 and ICMPv6 to IPv6 only: elsewhere the number means nothing.
const fn is_icmp(v6: bool, protocol: u8) -> bool {
    matches!((v6, protocol), (false, proto::ICMP) | (true, proto::ICMPV6))
}

/// Reads the header that `payload` begins with.
pub(super) fn read_transport(protocol: u8, v6: bool, payload: &[u8]) -> Transport<'_> {
    let minimum = match protocol {
        proto::TCP => 20,
        proto::UDP | proto::ESP => 8,
        proto::SCTP => 12,
        proto::GRE => 4,
        _ if is_icmp(v6, protocol) => 8,
        _ => return Transport::Other,
    };
    if payload.len() < minimum {
        return Transport::Short;
    }
    if is_icmp(v6, protocol) {
        let (Some(&icmp_type), Some(original)) = (payload.first(), payload.get(8..)) else {
            return Transport::Short;
        };
        match icmp_kind(v6, icmp_type) {
            Icmp::Echo => {}
            Icmp::Error => return Transport::Error { original },
            Icmp::Other => return Transport::Other,
        }
    }
    let tcp_flags = if protocol == proto::TCP {
        payload.get(13).copied().unwrap_or(0)
    } else {
        0
    };
    match embedded_selector(protocol, v6, payload) {
        Some(selector) => Transport::Session { selector, tcp_flags },
        None => Transport::Short,
    }
}

/// Value and echo of the timestamp option of the TCP header at `offset`, if it comes first behind two one-byte paddings
/// (RFC 7323, appendix A), as all common stacks send it; otherwise zeros.
pub(super) fn timestamps(bytes: &[u8], offset: usize) -> [u32; 2] {
    const PADDING_AND_TIMESTAMP: [u8; 4] = [1, 1, 8, 10];
    let Some(&[kind0, kind1, kind, len, v0, v1, v2, v3, e0, e1, e2, e3]) =
        bytes.get(offset + 20..).and_then(|options| options.first_chunk())
    else {
        return [0; 2];
    };
    // The header says how much of this is options: eight words or more with these.
    let words = bytes.get(offset + 12).map_or(0, |byte| byte >> 4);
    if [kind0, kind1, kind, len] != PADDING_AND_TIMESTAMP || words < 8 {
        return [0; 2];
    }
    [
        u32::from_be_bytes([v0, v1, v2, v3]),
        u32::from_be_bytes([e0, e1, e2, e3]),
    ]
}

/// The selector from the first bytes of a transport header, which may be all that an ICMP error carries
/// (RFC 792: 8 bytes). `None` if the protocol has no sessions or the bytes do not suffice.
pub(super) fn embedded_selector(protocol: u8, v6: bool, payload: &[u8]) -> Option<Selector> {
    let word = |offset: usize| -> Option<[u8; 4]> { payload.get(offset..)?.first_chunk::<4>().copied() };
    match protocol {
        proto::TCP | proto::UDP | proto::SCTP => {
            let [s0, s1, d0, d1] = word(0)?;
            Some(Selector::Ports(
                u16::from_be_bytes([s0, s1]),
                u16::from_be_bytes([d0, d1]),
            ))
        }
        proto::ESP => Some(Selector::Id(u32::from_be_bytes(word(0)?))),
        proto::GRE => {
            let [flags, version, _, _] = word(0)?;
            if flags & GRE_KEY_PRESENT == 0 {
                return Some(Selector::Id(0));
            }
            let [k0, k1, k2, k3] = word(if flags & GRE_CHECKSUM_PRESENT != 0 { 8 } else { 4 })?;
            // Version 1 (PPTP, RFC 2637, 4.1) keeps the payload's length in the upper half.
            let key = if version & 7 == 1 {
                [0, 0, k2, k3]
            } else {
                [k0, k1, k2, k3]
            };
            Some(Selector::Id(u32::from_be_bytes(key)))
        }
        _ if is_icmp(v6, protocol) => {
            let [icmp_type, _, _, _] = word(0)?;
            let [id0, id1, _, _] = word(4)?;
            matches!(icmp_kind(v6, icmp_type), Icmp::Echo)
                .then(|| Selector::Id(u32::from(u16::from_be_bytes([id0, id1]))))
        }
        _ => None,
    }
}
