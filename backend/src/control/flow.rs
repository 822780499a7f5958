//! A flow that an operator writes down, as the first bytes of a frame that belongs to it.
//!
//! It is written as `vnic sessions` shows keys, arrows may be left out:
//! `tcp 10.0.0.1:80 10.0.0.2:40000`, `udp [fe80::1]:53 <-> [fe80::2]:999 vlan 100.4`, `icmp 10.0.0.1 10.0.0.2 id 7`,
//! `esp 10.0.0.1 10.0.0.2 spi 0xab`, `gre 10.0.0.1 10.0.0.2 key 0x5`, `ip 10.0.0.1 10.0.0.2 protocol 89`.

use std::net::{IpAddr, SocketAddr};

use vnic_lb::key::proto;

/// A text is no flow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text:.80}` is no flow ({why}): write for example `tcp 10.0.0.1:80 10.0.0.2:40000`, with ` vlan 100` behind it if \
     it is tagged, or copy one from `vnic sessions`"
)]
pub struct FlowError {
    text: String,
    why: String,
}

/// The two ends, what the transport header begins with, and the IP protocol.
struct Parts {
    ends: (IpAddr, IpAddr),
    protocol: u8,
    transport: Vec<u8>,
}

/// Ethernet and up to 40 bytes of IPv6 and as many of tags and transport.
type Frame = Vec<u8>;

/// The head of a frame of this flow, for [`vnic_lb::parse::parse`].
///
/// # Errors
///
/// [`FlowError`], which says what is wrong and how it is written.
pub fn frame(text: &str) -> Result<Frame, FlowError> {
    let fail = |why: String| FlowError {
        text: text.to_owned(),
        why,
    };
    let words = text.split_whitespace();
    let mut words = words.filter(|word| !matches!(*word, "<->" | "->" | "<-"));
    let (kind, a, b) = match (words.next(), words.next(), words.next()) {
        (Some(kind), Some(a), Some(b)) => (kind, a, b),
        _ => return Err(fail("it has less than a protocol and two ends".into())),
    };
    let (mut selector, mut vlans) = (None, Vec::new());
    while let Some(word) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| fail(format!("`{word}` lacks its value")))?;
        match word {
            "vlan" => vlans = tags(value).map_err(&fail)?,
            "id" | "spi" | "key" | "protocol" if selector.is_none() => selector = Some((word, value)),
            _ => return Err(fail(format!("`{word}` means nothing here"))),
        }
    }
    let parts = parts(kind, a, b, selector).map_err(&fail)?;
    Ok(assemble(&parts, &vlans))
}

fn parts(kind: &str, a: &str, b: &str, selector: Option<(&str, &str)>) -> Result<Parts, String> {
    let with_ports = [("tcp", proto::TCP), ("udp", proto::UDP), ("sctp", proto::SCTP)];
    if let Some((_, protocol)) = with_ports.into_iter().find(|(name, _)| *name == kind) {
        if let Some((word, _)) = selector {
            return Err(format!("{kind} has no `{word}`"));
        }
        let end = |text: &str| {
            let end: Result<SocketAddr, _> = text.parse();
            end.map_err(|_| format!("`{text}` is not ADDRESS:PORT, or [ADDRESS]:PORT for IPv6"))
        };
        let (from, to) = (end(a)?, end(b)?);
        let mut transport = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        // A TCP header of 20 bytes with ACK, the rest of a UDP header, the rest of an SCTP header: whatever comes first.
        transport.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        return Ok(Parts {
            ends: same_family(from.ip(), to.ip())?,
            protocol,
            transport,
        });
    }
    let address = |text: &str| {
        let address: Result<IpAddr, _> = text.parse();
        address.map_err(|_| format!("`{text}` is no IP address"))
    };
    let ends = same_family(address(a)?, address(b)?)?;
    let v6 = ends.0.is_ipv6();
    let (wanted, default) = match kind {
        "icmp" | "icmp6" => ("id", None),
        "esp" => ("spi", None),
        "gre" => ("key", Some("0")),
        "ip" => ("protocol", None),
        _ => {
            return Err(format!(
                "`{kind}` is none of tcp, udp, sctp, icmp, icmp6, esp, gre, ip"
            ));
        }
    };
    let value = match (selector, default) {
        (Some((word, value)), _) if word == wanted => value,
        (None, Some(default)) => default,
        _ => return Err(format!("{kind} needs `{wanted} NUMBER`")),
    };
    let value = number(value).ok_or_else(|| format!("`{value}` is no number"))?;
    let [high, low] =
        [value >> 16, value & 0xffff].map(|half| u16::try_from(half).unwrap_or(0).to_be_bytes());
    let (protocol, transport) = match kind {
        "icmp" | "icmp6" if value > 0xffff => return Err(format!("an id is at most 65535, not {value}")),
        // Echo requests.
        "icmp" if !v6 => (proto::ICMP, [[8, 0], [0, 0], low, [0, 0]].concat()),
        "icmp6" if v6 => (proto::ICMPV6, [[128, 0], [0, 0], low, [0, 0]].concat()),
        "icmp" | "icmp6" => return Err("icmp goes with IPv4 and icmp6 with IPv6".into()),
        "esp" => (proto::ESP, [high, low, [0, 0], [0, 1]].concat()),
        "gre" if default == selector.map(|(_, value)| value) || selector.is_none() => {
            (proto::GRE, vec![0, 0, 0x08, 0x00])
        }
        // With a key, of IPv4.
        "gre" => (proto::GRE, [[0x20, 0], [0x08, 0], high, low].concat()),
        _ => {
            let protocol =
                u8::try_from(value).map_err(|_| format!("a protocol is at most 255, not {value}"))?;
            (protocol, vec![0; 8])
        }
    };
    Ok(Parts {
        ends,
        protocol,
        transport,
    })
}

fn same_family(from: IpAddr, to: IpAddr) -> Result<(IpAddr, IpAddr), String> {
    if from.is_ipv4() == to.is_ipv4() {
        Ok((from, to))
    } else {
        Err(format!("{from} and {to} are not of one family"))
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `N` or `OUTER.INNER`.
fn tags(text: &str) -> Result<Vec<u16>, String> {
    let ids: Result<Vec<u16>, _> = text.split('.').map(str::parse).collect();
    ids.ok()
        .filter(|ids| ids.len() <= 2 && ids.iter().all(|id| (1..=4094).contains(id)))
        .ok_or_else(|| format!("`{text}` is no VLAN from 1 to 4094, or two as OUTER.INNER"))
}

fn assemble(parts: &Parts, vlans: &[u16]) -> Frame {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let length = u16::try_from(parts.transport.len()).unwrap_or(0);
    for id in vlans {
        frame.extend([0x81, 0x00]);
        frame.extend(id.to_be_bytes());
    }
    match parts.ends {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + length).to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, parts.protocol, 0, 0]);
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        (from, to) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([parts.protocol, 64]);
            frame.extend(octets(from));
            frame.extend(octets(to));
        }
    }
    frame.extend(&parts.transport);
    frame
}

#[cfg(test)]
mod tests {
    use vnic_lb::parse::parse;

    use super::*;

    fn key(text: &str) -> String {
        parse(&frame(text).unwrap()).key().to_string()
    }

    #[test]
    fn what_sessions_shows_can_be_asked_for() {
        for text in [
            "tcp 10.0.0.1:80 <-> 10.0.0.2:40000",
            "udp [fe80::1]:53 <-> [fe80::2]:999 vlan 100.4",
            "sctp 10.0.0.1:1 <-> 10.0.0.2:2 vlan 7",
            "icmp 10.0.0.1 <-> 10.0.0.2 id 7",
            "icmp6 fe80::1 <-> fe80::2 id 65535",
            "esp 10.0.0.1 <-> 10.0.0.2 spi 0x000000ab",
            "gre 10.0.0.1 <-> 10.0.0.2 key 0x5",
            "gre 10.0.0.1 <-> 10.0.0.2 key 0x0",
            "ip 10.0.0.1 <-> 10.0.0.2 protocol 89",
        ] {
            assert_eq!(key(text), text);
            assert_eq!(key(&text.replace("<-> ", "")), text, "arrows may be left out");
        }
        let (there, back) = ("tcp 10.0.0.2:40000 10.0.0.1:80", "tcp 10.0.0.1:80 10.0.0.2:40000");
        assert_eq!(key(there), key(back));
    }

    #[test]
    fn what_is_no_flow_says_why_and_how() {
        for (text, why) in [
            ("", "less than a protocol"),
            ("tcp 10.0.0.1:80", "less than a protocol"),
            ("tcp 10.0.0.1 10.0.0.2", "ADDRESS:PORT"),
            ("tcp 10.0.0.1:80 [::1]:80", "one family"),
            ("tcp 10.0.0.1:80 10.0.0.2:80 id 7", "no `id`"),
            ("icmp 10.0.0.1 10.0.0.2", "needs `id NUMBER`"),
            ("icmp ::1 ::2 id 1", "icmp6 with IPv6"),
            ("icmp 10.0.0.1 10.0.0.2 id 65536", "at most 65535"),
            ("ospf 10.0.0.1 10.0.0.2", "none of tcp"),
            ("esp 10.0.0.1 10.0.0.2 spi zero", "no number"),
            ("ip 10.0.0.1 10.0.0.2 protocol 256", "at most 255"),
            ("udp 10.0.0.1:1 10.0.0.2:2 vlan 5000", "no VLAN"),
            ("udp 10.0.0.1:1 10.0.0.2:2 vlan", "lacks its value"),
            ("udp 10.0.0.1:1 10.0.0.2:2 dscp 3", "means nothing"),
        ] {
            let error = frame(text).unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains("write for example"),
                "{error}"
            );
        }
    }
}
