//! Frames whose every byte follows from a number: UDP over IPv4, 60 to 1514 bytes, in [`FLOWS`] flows.

/// Flows that the frames belong to: enough to reach every NIC and every queue.
pub const FLOWS: u32 = 64;
/// The least and the most bytes of a frame.
pub const SIZES: std::ops::RangeInclusive<usize> = 60..=1514;

const HEADERS: usize = 14 + 20 + 8;
const GUEST_PORT: u16 = 20_000;
const PEER_PORT: u16 = 7777;

/// Who speaks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The guest's MAC address.
    pub guest: [u8; 6],
    /// The echo's MAC address.
    pub peer: [u8; 6],
}

/// The flow of a frame.
#[must_use]
pub fn flow(number: u32) -> u16 {
    u16::try_from(number % FLOWS).expect("below 64")
}

/// The size of a frame; every one of [`SIZES`] comes among 1455 frames in a row.
#[must_use]
pub fn size(number: u32) -> usize {
    let span = SIZES.end() - SIZES.start() + 1;
    // A step that shares no factor with the span visits all sizes, small and large in turn.
    SIZES.start() + (number as usize).wrapping_mul(541) % span
}

/// The frame of this number from the guest.
#[must_use]
pub fn request(addresses: Addresses, number: u32) -> Vec<u8> {
    let (guest, peer) = ([10, 77, 0, 2], [10, 77, 0, 1]);
    let ports = [GUEST_PORT + flow(number), PEER_PORT];
    build(number, [addresses.peer, addresses.guest], [guest, peer], ports)
}

/// The answer to the frame of this number.
#[must_use]
pub fn reply(addresses: Addresses, number: u32) -> Vec<u8> {
    let (guest, peer) = ([10, 77, 0, 2], [10, 77, 0, 1]);
    let ports = [PEER_PORT, GUEST_PORT + flow(number)];
    build(number, [addresses.guest, addresses.peer], [peer, guest], ports)
}

/// The number of a frame of this kind, by its own word; `None` for anything else.
#[must_use]
pub fn number(frame: &[u8]) -> Option<u32> {
    let ports = [frame.get(34..36)?, frame.get(36..38)?];
    let ours = ports.contains(&PEER_PORT.to_be_bytes().as_slice());
    if frame.get(12..14)? != [8, 0] || frame.get(23) != Some(&17) || !ours {
        return None;
    }
    Some(u32::from_be_bytes(
        frame.get(HEADERS..HEADERS + 4)?.try_into().ok()?,
    ))
}

/// `macs` are destination and source, `hosts` and `ports` source and destination.
fn build(number: u32, macs: [[u8; 6]; 2], hosts: [[u8; 4]; 2], ports: [u16; 2]) -> Vec<u8> {
    let size = size(number);
    let length = |from: usize| {
        u16::try_from(size - from)
            .expect("a frame is short")
            .to_be_bytes()
    };
    let mut frame = Vec::with_capacity(size);
    frame.extend(macs.concat());
    frame.extend([8, 0]);
    frame.extend([0x45, 0]);
    frame.extend(length(14));
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(hosts.concat());
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded).expect("ten words fold at once");
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(ports[0].to_be_bytes());
    frame.extend(ports[1].to_be_bytes());
    frame.extend(length(34));
    // No UDP checksum: the contents are compared byte by byte.
    frame.extend([0, 0]);
    frame.extend(number.to_be_bytes());
    let mut state = number;
    while frame.len() < size {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        frame.push(state.to_be_bytes()[0]);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESSES: Addresses = Addresses {
        guest: [2, 0, 0, 0, 0, 1],
        peer: [2, 0, 0, 0, 0, 2],
    };

    #[test]
    fn all_sizes_come_and_each_frame_knows_its_number() {
        let mut sizes = std::collections::HashSet::new();
        for count in 0..1455 {
            for frame in [request(ADDRESSES, count), reply(ADDRESSES, count)] {
                assert_eq!((frame.len(), number(&frame)), (size(count), Some(count)));
            }
            sizes.insert(size(count));
        }
        assert_eq!(sizes.len(), 1455);
        assert!(sizes.contains(&60) && sizes.contains(&1514));
    }

    #[test]
    fn other_frames_have_no_number() {
        assert_eq!(number(&[0; 20]), None);
        let mut frame = request(ADDRESSES, 7);
        frame[12] = 0x86;
        assert_eq!(number(&frame), None);
    }
}
