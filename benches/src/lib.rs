//! What the benches and the load generator share.
//!
//! The generator is a vhost-user front-end with drivers of its own. A guest that is as fast as it can be costs as much a frame as a
//! fast device, and the two cannot be told apart; this one costs a fraction, and counts how often the device was the one to wait for.

pub mod driver;
pub mod flood;
pub mod frames;
pub mod idle_device;
pub mod joined;
pub mod latency;
pub mod port;
pub mod suite;
pub mod verify;

pub mod failover;

/// The beginning of an Ethernet frame with IPv4 and UDP headers, 60 bytes; `flow` chooses the source address and port.
#[must_use]
pub fn udp_frame(flow: u32) -> [u8; 60] {
    let mut frame = [0u8; 60];
    frame[..12].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    let [a, b, c, d] = flow.to_be_bytes();
    // Version and header length, total length 46, TTL 64, UDP.
    frame[14] = 0x45;
    frame[17] = 46;
    frame[22] = 64;
    frame[23] = 17;
    frame[26..30].copy_from_slice(&[10, a, b, c]);
    frame[30..34].copy_from_slice(&[192, 0, 2, 1]);
    frame[34..36].copy_from_slice(&(1024 + u16::from(d)).to_be_bytes());
    frame[36..38].copy_from_slice(&53u16.to_be_bytes());
    frame[38..40].copy_from_slice(&26u16.to_be_bytes());
    frame
}

/// The same with TCP; `flags` as in byte 13 of its header.
#[must_use]
pub fn tcp_frame(flow: u32, flags: u8) -> [u8; 60] {
    let mut frame = udp_frame(flow);
    frame[23] = 6;
    frame[38..60].fill(0);
    (frame[46], frame[47]) = (0x50, flags);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use vnic_lb::parse::{Class, parse};

    #[test]
    fn each_flow_is_a_session_of_its_own() {
        let keys: std::collections::HashSet<_> =
            (0..1000).map(|flow| *parse(&udp_frame(flow)).key()).collect();
        assert_eq!(keys.len(), 1000);
        assert_eq!(parse(&udp_frame(7)).class(), Class::Session);
        let syn = parse(&tcp_frame(7, 2));
        assert_eq!(
            (syn.class(), syn.protocol(), syn.tcp_flags()),
            (Class::Session, Some(6), 2)
        );
    }
}
