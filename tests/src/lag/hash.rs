//! Which link a frame takes: a symmetric hash over its session.

use std::hash::{DefaultHasher, Hash, Hasher};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]))
}

/// Whether the destination is broadcast or multicast.
#[must_use]
pub fn is_group_addressed(frame: &[u8]) -> bool {
    frame.first().is_some_and(|byte| byte & 1 == 1)
}

/// A hash that both directions of a session share: addresses, protocol and ports for TCP and UDP; addresses and protocol
/// for other IP traffic and fragments; MAC addresses for the rest.
#[must_use]
pub fn session_hash(frame: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    if ip_session(frame, &mut hasher).is_none() {
        hash_pair(
            frame.get(0..6).unwrap_or(&[]),
            frame.get(6..12).unwrap_or(&[]),
            &mut hasher,
        );
    }
    hasher.finish()
}

fn hash_pair<T: Ord + Hash>(one: T, other: T, hasher: &mut DefaultHasher) {
    if one <= other {
        (one, other).hash(hasher)
    } else {
        (other, one).hash(hasher)
    }
}

fn ip_session(frame: &[u8], hasher: &mut DefaultHasher) -> Option<()> {
    let mut at = 12;
    let mut ethertype = be16(frame, at)?;
    if ethertype == ETHERTYPE_VLAN {
        (be16(frame, at + 2)? & 0xfff).hash(hasher);
        at += 4;
        ethertype = be16(frame, at)?;
    }
    let ip = at + 2;
    let (addresses, protocol, ports_at, fragment) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header = usize::from(*frame.get(ip)? & 0xf) * 4;
            let fragment = be16(frame, ip + 6)? & 0x3fff != 0;
            let addresses = (frame.get(ip + 12..ip + 16)?, frame.get(ip + 16..ip + 20)?);
            (addresses, *frame.get(ip + 9)?, ip + header, fragment)
        }
        ETHERTYPE_IPV6 => {
            let addresses = (frame.get(ip + 8..ip + 24)?, frame.get(ip + 24..ip + 40)?);
            (addresses, *frame.get(ip + 6)?, ip + 40, false)
        }
        _ => return None,
    };
    protocol.hash(hasher);
    let ports = if fragment || (protocol != TCP && protocol != UDP) {
        (0, 0)
    } else {
        (
            be16(frame, ports_at).unwrap_or(0),
            be16(frame, ports_at + 2).unwrap_or(0),
        )
    };
    hash_pair((addresses.0, ports.0), (addresses.1, ports.1), hasher);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(source: ([u8; 4], u16), destination: ([u8; 4], u16)) -> Vec<u8> {
        let mut frame = vec![2u8; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0]);
        frame.extend(source.0);
        frame.extend(destination.0);
        frame.extend(source.1.to_be_bytes());
        frame.extend(destination.1.to_be_bytes());
        frame
    }

    #[test]
    fn both_directions_of_a_session_hash_alike() {
        let (a, b) = (([10, 0, 0, 1], 40000), ([10, 0, 0, 2], 80));
        assert_eq!(session_hash(&tcp4(a, b)), session_hash(&tcp4(b, a)));
    }

    #[test]
    fn sessions_that_differ_in_a_port_spread() {
        let odd = (0..1000u16)
            .filter(|port| session_hash(&tcp4(([10, 0, 0, 1], 40000 + port), ([10, 0, 0, 2], 80))) % 2 == 1)
            .count();
        assert!(
            (400..600).contains(&odd),
            "{odd} of 1000 sessions on one of two links"
        );
    }

    #[test]
    fn every_prefix_of_a_frame_is_accepted() {
        let frame = tcp4(([10, 0, 0, 1], 1), ([10, 0, 0, 2], 2));
        for length in 0..frame.len() {
            let _ = session_hash(&frame[..length]);
        }
    }
}
