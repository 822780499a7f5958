//! The frames that are sent: UDP over IPv4, whose every byte follows from the frame's number.

use anyhow::{Result, ensure};

/// Bytes of the headers before a frame's own words.
const HEADERS: usize = 14 + 20 + 8;
/// Where a frame says its number.
const NUMBER: usize = HEADERS;
/// Where it says how many frames of its flow came before it; written for each that is sent, if anybody looks.
pub const SEQUENCE: usize = HEADERS + 4;
/// The end of these words.
const WORDS_END: usize = SEQUENCE + 4;

/// The least bytes of a frame.
pub const MIN_FRAME: u32 = 60;
/// The most bytes of a frame.
pub const MAX_FRAME: u32 = 9014;

/// Sizes of frames, in turn: "simple IMIX" is 7 : 4 : 1 of 40, 576 and 1500 bytes of IP.
pub const IMIX: [u32; 12] = [60, 590, 60, 60, 590, 60, 1514, 60, 590, 60, 590, 60];

/// Which frames one port sends to another.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// The sender's address.
    pub from: [u8; 6],
    /// The receiver's address.
    pub to: [u8; 6],
    /// Frames in memory.
    pub frames: u32,
    /// Flows that they belong to: frame `n` is of flow `n % flows`.
    pub flows: u32,
    /// Added to a flow's number for its addresses, so that several senders have different ones.
    pub first_flow: u32,
    /// Their sizes in turn, each from [`MIN_FRAME`] to [`MAX_FRAME`].
    pub sizes: Vec<u32>,
}

impl Traffic {
    /// Bytes of a frame.
    #[must_use]
    pub fn size(&self, number: u32) -> u32 {
        self.sizes[number as usize % self.sizes.len()]
    }

    /// Bytes of the longest frame.
    #[must_use]
    pub fn longest(&self) -> u32 {
        self.sizes.iter().copied().max().unwrap_or(MIN_FRAME)
    }

    /// The flow of a frame.
    #[must_use]
    pub fn flow(&self, number: u32) -> u32 {
        number % self.flows
    }

    /// A frame, as the first of its flow.
    #[must_use]
    pub fn frame(&self, number: u32) -> Vec<u8> {
        let size = self.size(number) as usize;
        let length = |from: usize| u16::try_from(size - from).unwrap_or(u16::MAX).to_be_bytes();
        let [high, a, b, low] = (self.first_flow + self.flow(number)).to_be_bytes();
        let mut frame = Vec::with_capacity(size);
        frame.extend(self.to);
        frame.extend(self.from);
        frame.extend([8, 0]);
        frame.extend([0x45, 0]);
        frame.extend(length(14));
        frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend([10, high, a, b, 192, 0, 2, 1]);
        frame.extend((1024 + u16::from(low)).to_be_bytes());
        frame.extend(7777u16.to_be_bytes());
        frame.extend(length(34));
        // No UDP checksum.
        frame.extend([0, 0]);
        frame.extend(number.to_be_bytes());
        frame.extend([0; 4]);
        let sum: u32 = frame[14..34]
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let folded = (folded & 0xffff) + (folded >> 16);
        let checksum = !u16::try_from(folded).unwrap_or(0);
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        let mut state = number;
        while frame.len() < size {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            frame.push(state.to_be_bytes()[0]);
        }
        frame
    }
}

/// Checks what arrives: every byte, and the order within each flow.
pub struct Checker {
    traffic: Traffic,
    /// For each flow, the least sequence number that may come next.
    next: Vec<u32>,
    /// Frames that were missing in their flows when a later one came.
    pub gaps: u64,
}

impl Checker {
    /// A checker of what is sent from now on.
    #[must_use]
    pub fn new(traffic: Traffic) -> Checker {
        Checker {
            next: vec![0; traffic.flows as usize],
            gaps: 0,
            traffic,
        }
    }

    /// Checks a frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&mut self, frame: &[u8]) -> Result<()> {
        ensure!(
            frame.len() >= WORDS_END,
            "a frame of {} bytes arrived; none was sent",
            frame.len()
        );
        let word = |at: usize| {
            let bytes = frame[at..at + 4].try_into().unwrap_or_default();
            u32::from_be_bytes(bytes)
        };
        let (number, sequence) = (word(NUMBER), word(SEQUENCE));
        ensure!(
            number < self.traffic.frames,
            "a frame says that it is number {number}; there are {}",
            self.traffic.frames
        );
        let mut expected = self.traffic.frame(number);
        expected[SEQUENCE..WORDS_END].copy_from_slice(&sequence.to_be_bytes());
        ensure!(
            frame == expected,
            "frame {number} is damaged: {} bytes instead of {}, the first difference at {:?}",
            frame.len(),
            expected.len(),
            frame.iter().zip(&expected).position(|(got, sent)| got != sent)
        );
        let flow = self.traffic.flow(number);
        let next = &mut self.next[flow as usize];
        ensure!(
            sequence >= *next,
            "flow {flow} is out of order: its frame {sequence} came where {next} was next"
        );
        self.gaps += u64::from(sequence - *next);
        *next = sequence + 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vnic_lb::parse::{Class, parse};

    fn traffic(flows: u32, sizes: &[u32]) -> Traffic {
        Traffic {
            from: [2, 0, 0, 0, 0, 1],
            to: [2, 0, 0, 0, 0, 2],
            frames: 2 * flows,
            flows,
            first_flow: 0,
            sizes: sizes.to_vec(),
        }
    }

    #[test]
    fn each_flow_is_a_session_of_its_own() {
        let traffic = traffic(70_000, &[60]);
        let keys: std::collections::HashSet<_> = (0..140_000)
            .map(|number| *parse(&traffic.frame(number)).key())
            .collect();
        assert_eq!(keys.len(), 70_000);
        assert_eq!(parse(&traffic.frame(7)).class(), Class::Session);
    }

    #[test]
    fn sizes_come_in_turn() {
        let traffic = traffic(100, &IMIX);
        for number in 0..24 {
            assert_eq!(traffic.frame(number).len(), IMIX[number as usize % 12] as usize);
        }
        assert_eq!(traffic.longest(), 1514);
    }

    fn sent(traffic: &Traffic, number: u32, sequence: u32) -> Vec<u8> {
        let mut frame = traffic.frame(number);
        frame[SEQUENCE..WORDS_END].copy_from_slice(&sequence.to_be_bytes());
        frame
    }

    #[test]
    fn a_checker_sees_damage_and_disorder() {
        let traffic = traffic(4, &[60, 1514, 9014]);
        let mut checker = Checker::new(traffic.clone());
        checker.check(&sent(&traffic, 1, 0)).unwrap();
        checker.check(&sent(&traffic, 2, 5)).unwrap();
        assert_eq!(checker.gaps, 5);
        // Frames 1 and 5 are of the same flow.
        checker.check(&sent(&traffic, 5, 1)).unwrap();
        assert!(checker.check(&sent(&traffic, 1, 1)).is_err(), "twice");
        let mut damaged = sent(&traffic, 3, 0);
        damaged[59] ^= 1;
        assert!(checker.check(&damaged).is_err(), "damage");
        assert!(checker.check(&sent(&traffic, 1, 9)[..1513]).is_err(), "cut off");
        assert!(checker.check(&[0; 20]).is_err(), "nothing of ours");
        assert!(checker.check(&[255; 60]).is_err(), "no such number");
    }
}
