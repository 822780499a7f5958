//! Checksums that a sender on this host left to a device which is not there.
//!
//! The other end of a veth belongs to a kernel here, which by default puts only the sum of the pseudo-header into a TCP or UDP
//! checksum and notes in the skb that the rest is to be done. AF_XDP hands over the bytes without that note. A guest that did not
//! negotiate VIRTIO_NET_F_GUEST_CSUM would take such a frame for a damaged one.

use vnic_lb::key::proto;
use vnic_lb::parse::{Class, Parsed, ethertype};

use super::{fold, sum};

/// Where the checksum of a frame is, and what belongs there, if it holds no more than the sum of the pseudo-header; `None` for
/// every other frame, and if the checksum happens to be right as it is.
///
/// `segments` are all of the frame's, the headers in the first. Only TCP and UDP in unfragmented IPv4 and IPv6 are looked at. What
/// is right or damaged costs the sum of a dozen words; only what is partial costs a sum over its payload.
#[must_use]
pub fn missing<'a>(
    parsed: &Parsed,
    mut segments: impl Iterator<Item = &'a [u8]>,
) -> Option<(usize, [u8; 2])> {
    if parsed.class() != Class::Session {
        return None;
    }
    let protocol = parsed.protocol()?;
    let (l3, l4) = (parsed.l3_offset()?, parsed.l4_offset()?);
    let field = match protocol {
        proto::TCP => l4 + 16,
        proto::UDP => l4 + 6,
        _ => return None,
    };
    let head = segments.next()?;
    let half = |at: usize| {
        let bytes = head.get(at..)?.first_chunk::<2>()?;
        Some(u16::from_be_bytes(*bytes))
    };
    let (addresses, end) = match parsed.ethertype() {
        ethertype::IPV4 => (head.get(l3 + 12..l3 + 20)?, l3 + usize::from(half(l3 + 2)?)),
        ethertype::IPV6 => (head.get(l3 + 8..l3 + 40)?, l3 + 40 + usize::from(half(l3 + 4)?)),
        _ => return None,
    };
    let len = end.checked_sub(l4)?;
    let pseudo = sum(addresses) + u64::from(protocol) + len as u64;
    if half(field)? != fold(pseudo) {
        return None;
    }
    let total = sum_of_stream(head.get(l4..)?, segments, len)?;
    if fold(total + pseudo) == 0xffff {
        return None;
    }
    // The field holds the pseudo-header's sum, so it is in the total once already.
    let checksum = !fold(total);
    // In UDP, 0 says that there is no checksum; for TCP both forms of zero are equal.
    Some((
        field,
        if checksum == 0 {
            [0xff; 2]
        } else {
            checksum.to_be_bytes()
        },
    ))
}

/// The sum of the first `len` bytes of `first` and what follows it; `None` when there are not so many.
fn sum_of_stream<'a>(first: &[u8], rest: impl Iterator<Item = &'a [u8]>, len: usize) -> Option<u64> {
    let mut left = len;
    let mut total = 0;
    let mut add = |bytes: &[u8]| {
        let odd = (len - left) % 2 == 1;
        let bytes = &bytes[..left.min(bytes.len())];
        left -= bytes.len();
        // Behind an odd number of bytes, each byte has the other's place in its word.
        total += if odd {
            u64::from(fold(sum(bytes)).swap_bytes())
        } else {
            sum(bytes)
        };
        left
    };
    if add(first) > 0 {
        for segment in rest {
            if add(segment) == 0 {
                break;
            }
        }
    }
    (left == 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vnic_lb::parse::parse;

    use super::*;

    /// RFC 1071 as it says it, over words.
    fn oracle(parts: &[&[u8]]) -> u16 {
        let bytes: Vec<u8> = parts.concat();
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            total = (total & 0xffff) + (total >> 16);
        }
        u16::try_from(total).unwrap()
    }

    struct Packet {
        bytes: Vec<u8>,
        /// What is summed besides the transport header and payload.
        pseudo: Vec<u8>,
        l4: usize,
        end: usize,
        field: usize,
    }

    impl Packet {
        fn new(v6: bool, udp: bool, tags: usize, options: usize, payload: &[u8], padding: usize) -> Packet {
            let mut bytes = vec![0x52; 12];
            for tag in 0..tags {
                bytes.extend([0x81, 0, 0, 10 + u8::try_from(tag).unwrap()]);
            }
            let transport = if udp { 8 } else { 20 };
            let len = u16::try_from(transport + payload.len()).unwrap();
            let protocol = if udp { 17 } else { 6 };
            let addresses: Vec<u8> = (1..=if v6 { 32 } else { 8 })
                .map(|n: u8| n.wrapping_mul(37))
                .collect();
            if v6 {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                let extra = u16::try_from(options * 8).unwrap();
                bytes.extend((len + extra).to_be_bytes());
                // Destination options of 8 bytes each, a PadN option in them (RFC 8200, 4.2 and 4.6).
                bytes.extend([if options > 0 { 60 } else { protocol }, 64]);
                bytes.extend(&addresses);
                for option in 0..options {
                    let next = if option + 1 < options { 60 } else { protocol };
                    bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]);
                }
            } else {
                let words = u8::try_from(5 + options).unwrap();
                bytes.extend([0x08, 0, 0x40 | words, 0]);
                bytes.extend((len + u16::from(words) * 4).to_be_bytes());
                bytes.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
                bytes.extend(&addresses);
                bytes.extend(vec![1; options * 4]);
            }
            let l4 = bytes.len();
            bytes.extend([0x12, 0x34, 0x56, 0x78]);
            if udp {
                bytes.extend(len.to_be_bytes());
                bytes.extend([0, 0]);
            } else {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
            }
            let field = l4 + if udp { 6 } else { 16 };
            bytes.extend(payload);
            let end = bytes.len();
            bytes.extend(vec![0xee; padding]);
            let pseudo = [&addresses[..], &[0, protocol], &len.to_be_bytes()].concat();
            Packet {
                bytes,
                pseudo,
                l4,
                end,
                field,
            }
        }

        fn set(&mut self, value: [u8; 2]) {
            self.bytes[self.field..self.field + 2].copy_from_slice(&value);
        }

        /// As a sender with checksum offload leaves it.
        fn partial(mut self) -> Packet {
            let pseudo = oracle(&[&self.pseudo]);
            self.set(pseudo.to_be_bytes());
            self
        }

        fn verifies(&self) -> bool {
            oracle(&[&self.pseudo, &self.bytes[self.l4..self.end]]) == 0xffff
        }

        fn missing_in(&self, cuts: &[usize]) -> Option<(usize, [u8; 2])> {
            let (mut segments, mut rest) = (Vec::new(), &self.bytes[..]);
            for cut in cuts {
                let (segment, behind) = rest.split_at((*cut).min(rest.len()));
                segments.push(segment);
                rest = behind;
            }
            segments.push(rest);
            missing(&parse(segments[0]), segments.iter().copied())
        }
    }

    proptest! {
        #[test]
        fn what_is_partial_is_completed_and_nothing_else(
            v6: bool,
            udp: bool,
            tags in 0..3usize,
            options in 0..3usize,
            payload in proptest::collection::vec(any::<u8>(), 0..3000),
            padding in 0..20usize,
            cuts in proptest::collection::vec(150..900usize, 0..3),
            damage in 1..0xffffu16,
        ) {
            let mut packet = Packet::new(v6, udp, tags, options, &payload, padding).partial();
            if packet.verifies() {
                // One in 65,536: right as it is.
                prop_assert_eq!(packet.missing_in(&cuts), None);
                return Ok(());
            }
            let (field, value) = packet.missing_in(&cuts).unwrap();
            prop_assert_eq!(field, packet.field);
            let partial = [packet.bytes[field], packet.bytes[field + 1]];
            packet.set(value);
            prop_assert!(packet.verifies());
            prop_assert_ne!(value, [0, 0]);
            prop_assert_eq!(packet.missing_in(&cuts), None, "completed once");
            let damaged = u16::from_be_bytes(value) ^ damage;
            if damaged.to_be_bytes() != partial {
                packet.set(damaged.to_be_bytes());
                prop_assert_eq!(packet.missing_in(&cuts), None, "damaged frames stay damaged");
            }
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200), type0 in 0..3usize) {
            let mut bytes = bytes;
            if bytes.len() > 14 {
                let kind = [[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00]][type0];
                bytes[12..14].copy_from_slice(&kind);
            }
            if let Some((field, _)) = missing(&parse(&bytes), std::iter::once(&bytes[..])) {
                prop_assert!(field + 2 <= bytes.len());
            }
        }
    }

    #[test]
    fn udp_without_a_checksum_stays_without() {
        let packet = Packet::new(false, true, 0, 0, b"none", 20);
        assert_eq!(packet.missing_in(&[]), None);
    }

    #[test]
    fn fragments_and_lies_about_the_length_are_left_alone() {
        let packet = || Packet::new(false, true, 0, 0, &[7; 100], 0).partial();
        assert!(packet().missing_in(&[]).is_some());
        let mut fragment = packet();
        fragment.bytes[20] = 0x20; // more fragments
        assert_eq!(fragment.missing_in(&[]), None);
        let mut cut = packet();
        cut.bytes.truncate(100);
        assert_eq!(cut.missing_in(&[]), None);
    }
}
