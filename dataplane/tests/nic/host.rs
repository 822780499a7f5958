//! The host that has a NIC beside the guests: both get group frames, and what its kernel sends may want a checksum.

use std::net::UdpSocket;

use vnic_dataplane::checksum;

use super::*;

#[test]
fn group_frames_reach_host_and_guests_as_they_were() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let host = Station::on(NIC);
        let mut tap = GroupTap::open(index(NIC), NIC).unwrap();
        tap.admit(GUEST).unwrap();
        tap.withdraw(GUEST).unwrap();
        let mut next = |rig: &mut Rig| {
            let mut out = Vec::new();
            until("a group frame", || {
                (tap.receive(&mut rig.chunks, &mut out, 1) == 1).then_some(())
            });
            rig.bytes_of(out.pop().unwrap())
        };
        let multicast = Mac([0x33, 0x33, 0xff, 0, 0, 1]);
        // To a group and not to a group: only the first is copied.
        rig.peer.send(&frame(HOST, FAR, 99));
        host.receive();
        // What the NIC itself sends is not a frame from the wire.
        Station::on(NIC).send(&frame(Mac::BROADCAST, HOST, 98));
        for to in [Mac::BROADCAST, multicast] {
            for len in [60, 1514, 9000] {
                let mut sent = frame(to, FAR, len);
                rig.peer.send(&sent);
                // The host has the tagged ones too, without the tag.
                let _ = until("the host's frame", || {
                    Some(host.receive()).filter(|got| *got == sent)
                });
                let mut got = next(&mut rig);
                while got.get(12..14) != Some(&net::EXPERIMENTAL) {
                    got = next(&mut rig); // the kernel's own neighbour discovery
                }
                assert!(got == sent, "{len}");
                for tag in [[0x81, 0x00, 0x6f, 0x05], [0x88, 0xa8, 0x00, 0x64]] {
                    sent.splice(12..12, tag);
                    rig.peer.send(&sent);
                    assert!(
                        until("the tagged frame", || Some(next(&mut rig))
                            .filter(|got| got[12..14] == tag[..2]))
                            == sent
                    );
                    sent.drain(12..16);
                }
            }
        }
        // More than the ring's slots, in turns: the ring goes round.
        for number in 0..300 {
            let sent = frame(multicast, FAR, 60 + number);
            rig.peer.send(&sent);
            let _ = until("the frame", || Some(next(&mut rig)).filter(|got| *got == sent));
        }
        let counters = tap.counters();
        assert!(counters.frames >= 318);
        assert_eq!(
            (counters.no_chunk, counters.malformed, counters.kernel_dropped),
            (0, 0, 0)
        );
        rig.finish();
    });
}

#[test]
fn a_partial_checksum_of_a_local_sender_is_completed() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let mut tap = GroupTap::open(index(NIC), NIC).unwrap();
        ip(&[
            "address",
            "add",
            "10.9.0.1/24",
            "broadcast",
            "10.9.0.255",
            "dev",
            PEER,
        ]);
        let socket = UdpSocket::bind("10.9.0.1:4000").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(b"to all, odd!!", "10.9.0.255:4001").unwrap();
        let mut out = Vec::new();
        let frame = until("the datagram", || {
            tap.receive(&mut rig.chunks, &mut out, 1);
            let frame = out.pop()?;
            Some(rig.bytes_of(frame)).filter(|bytes| bytes[12..14] == [0x08, 0x00] && bytes[23] == 17)
        });
        let udp = &frame[34..34 + 8 + 13];
        assert_ne!(udp[6..8], [0, 0]);
        let pseudo = checksum::sum(&frame[26..34]) + 17 * 65_536 + udp.len() as u64 * 65_536;
        assert_eq!(checksum::fold(checksum::sum(udp) + pseudo), 0xffff);
        drop(tap);
        rig.finish();
    });
}

/// The datagram of a kernel that left its checksum to a device: AF_XDP shows it as it is, and it can be completed.
#[test]
fn a_local_senders_checksum_is_partial_and_can_be_completed() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let guest = GUEST.to_string();
        for (address, to, bind) in [
            ("10.9.0.1/24", "10.9.0.7", "10.9.0.1:4000"),
            ("fd09::1/64", "fd09::7", "[fd09::1]:4000"),
        ] {
            if address.contains(':') {
                ip(&["address", "add", address, "dev", PEER, "nodad"]);
            } else {
                ip(&["address", "add", address, "dev", PEER]);
            }
            ip(&["neighbour", "add", to, "lladdr", &guest, "dev", PEER]);
            let socket = UdpSocket::bind(bind).unwrap();
            socket
                .send_to(
                    b"to the guest, odd",
                    (to.parse::<std::net::IpAddr>().unwrap(), 4001),
                )
                .unwrap();
            let mut bytes = until("the datagram", || {
                Some(rig.receive()).filter(|bytes| bytes.len() < 100)
            });
            let missing = |bytes: &[u8]| {
                checksum::partial::missing(&vnic_lb::parse::parse(bytes), std::iter::once(bytes))
            };
            let (field, value) = missing(&bytes).expect("the kernel sends it partial");
            bytes[field..field + 2].copy_from_slice(&value);
            assert_eq!(missing(&bytes), None);
            let udp = &bytes[field - 6..];
            let addresses = if address.contains(':') { 32 } else { 8 };
            let pseudo = checksum::sum(&bytes[field - 6 - addresses..field - 6]) + 17 + udp.len() as u64;
            assert_eq!(checksum::fold(checksum::sum(udp) + pseudo), 0xffff);
        }
        rig.finish();
    });
}

/// What docs/host-and-guest.md says.
#[test]
fn host_and_guest_on_one_nic_meet_only_beyond_the_wire() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let host = Station::on(NIC);
        let to_guest = frame(GUEST, HOST, 100);
        let to_host = frame(HOST, GUEST, 101);
        // Either frame goes out to the wire, and nowhere else.
        host.send(&to_guest);
        assert_eq!(rig.peer.receive(), to_guest);
        let mut out = Vec::new();
        assert_eq!(rig.rx.receive(&mut rig.chunks, &mut out, 1), 0);
        let mut frames = vec![rig.frame_of(&to_host)];
        rig.send(frames.drain(..));
        assert_eq!(rig.peer.receive(), to_host);
        assert_eq!(host.try_receive(), None);
        // A switch that sends it back brings it to the other one.
        rig.peer.send(&to_guest);
        assert_eq!(rig.receive(), to_guest);
        rig.peer.send(&to_host);
        assert_eq!(host.receive(), to_host);
        rig.finish();
    });
}
