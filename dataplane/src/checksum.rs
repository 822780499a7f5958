//! The internet checksum (RFC 1071).

pub mod partial;

/// Ones' complement sum of the bytes as 16-bit big-endian words, not yet folded; an odd last byte is padded with a zero.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    // Words of 32 bits add up to the same after folding, since 2^16 is 1 modulo 2^16 - 1. No overflow below 16 GiB.
    let mut total: u64 = words
        .map(|word| u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]])))
        .sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(last));
    total
}

/// Folds a sum to 16 bits, ones' complement.
#[must_use]
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = sum.to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// Finishes a checksum that an offload left to the device (virtio 1.2, 5.1.6.2, NEEDS_CSUM): the field at `start + offset` holds
/// the sum of the pseudo-header. Returns where the field is and what belongs there, or `None` when they are not inside the frame.
///
/// 0 becomes 0xffff: in UDP, 0 would say that there is no checksum, and elsewhere the two mean the same.
#[must_use]
pub fn complete(frame: &[u8], start: u16, offset: u16) -> Option<(usize, [u8; 2])> {
    let start = usize::from(start);
    let field = start + usize::from(offset);
    if field + 2 > frame.len() {
        return None;
    }
    let checksum = !fold(sum(frame.get(start..)?));
    Some((
        field,
        if checksum == 0 {
            [0xff; 2]
        } else {
            checksum.to_be_bytes()
        },
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, as it says it: one 16-bit word after the other.
    fn oracle(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            total += u32::from(word);
            total = (total & 0xffff) + (total >> 16);
        }
        u16::try_from(total).unwrap()
    }

    #[test]
    fn the_example_of_the_rfc() {
        assert_eq!(
            fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])),
            0xddf2
        );
    }

    #[test]
    fn a_field_outside_the_frame_is_refused() {
        assert!(complete(&[0; 40], 34, 4).is_some());
        assert!(complete(&[0; 40], 34, 5).is_none());
        assert!(complete(&[0; 40], 41, 0).is_none());
        assert!(complete(&[], u16::MAX, u16::MAX).is_none());
    }

    #[test]
    fn zero_is_sent_as_ones() {
        assert_eq!(complete(&[0xff, 0xff, 0, 0], 0, 2), Some((2, [0xff, 0xff])));
    }

    proptest! {
        #[test]
        fn sums_as_the_rfc_says(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(fold(sum(&bytes)), oracle(&bytes));
        }

        /// A receiver adds everything up, the pseudo-header and the checksum included, and gets all ones.
        #[test]
        fn what_is_completed_verifies(
            mut payload in proptest::collection::vec(any::<u8>(), 8..1500),
            pseudo in any::<u16>(),
            start in 0..40u16,
        ) {
            let mut frame = vec![0xa5; usize::from(start)];
            payload[6..8].copy_from_slice(&pseudo.to_be_bytes());
            frame.extend(&payload);
            let (field, bytes) = complete(&frame, start, 6).unwrap();
            frame[field..field + 2].copy_from_slice(&bytes);
            let total = sum(&frame[usize::from(start)..]) + u64::from(pseudo);
            prop_assert_eq!(fold(total), 0xffff);
        }
    }
}
