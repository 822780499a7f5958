//! AF_XDP sockets, the XDP program and group frames on real veths. Needs root.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::unwrap_used,
    reason = "constants of the C interface; a test fails by panicking"
)]

mod net;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use net::{FAR, GUEST, HOST, NIC, PEER, Station, frame, in_namespace, index, ip, until};
use vnic_dataplane::checksum;
use vnic_dataplane::group::GroupTap;
use vnic_dataplane::memory::frames::{Census, ChunkCache, Frame, FrameMemory};
use vnic_dataplane::nic::{NicRx, NicTx};
use vnic_dataplane::probe::{Asker, write_probe};
use vnic_dataplane::program::{AttachMode, Program, ProgramError};
use vnic_dataplane::xsk::retired::release_retired;
use vnic_dataplane::xsk::{XskConfig, XskError, XskInfo, XskRx, XskTx, ZeroCopy, open_queue};
use vnic_lb::mac::Mac;

const CHUNKS: u32 = 512;
const RING: u32 = 64;

fn config(queue: u32) -> XskConfig {
    XskConfig {
        rx_ring: RING,
        fill_ring: RING,
        tx_ring: RING,
        completion_ring: RING,
        ..XskConfig::new(index(NIC), NIC, queue)
    }
}

struct Rig {
    memory: Arc<FrameMemory>,
    chunks: ChunkCache,
    rx: XskRx,
    tx: XskTx,
    info: XskInfo,
    program: Program,
    peer: Station,
}

impl Rig {
    fn new(mode: AttachMode) -> Rig {
        let memory = FrameMemory::new(CHUNKS).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        let (mut rx, tx, info) = open_queue(&config(0), &memory, 3).unwrap();
        rx.refill(&mut chunks);
        let mut program = Program::attach(index(NIC), NIC, mode).unwrap();
        program.set_socket(0, &rx).unwrap();
        program.allow_mac(GUEST).unwrap();
        Rig {
            memory,
            chunks,
            rx,
            tx,
            info,
            program,
            peer: Station::on(PEER),
        }
    }

    fn frame_of(&mut self, bytes: &[u8]) -> Frame {
        let mut frame = self.chunks.alloc(bytes.len()).unwrap();
        self.memory.write(&mut frame, 0, bytes);
        frame
    }

    fn bytes_of(&mut self, frame: Frame) -> Vec<u8> {
        let bytes = self.memory.segments(&frame).flatten().copied().collect();
        self.chunks.free(frame);
        bytes
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        until("a frame on the RX ring", || {
            (self.rx.receive(&mut self.chunks, &mut out, 1) == 1).then_some(())
        });
        self.rx.refill(&mut self.chunks);
        let frame = out.pop().unwrap();
        self.bytes_of(frame)
    }

    /// Sends all and waits for their completions.
    fn send(&mut self, frames: &mut VecDeque<Frame>) {
        until("completions", || {
            self.tx.send(frames);
            self.tx.flush();
            self.tx.reap(&mut self.chunks);
            (frames.is_empty() && self.tx.in_flight() == 0).then_some(())
        });
    }

    fn finish(mut self) {
        // A nearly full ring is topped up only now and then.
        for _ in 0..64 {
            self.rx.refill(&mut self.chunks);
        }
        let Rig {
            memory,
            chunks,
            rx,
            tx,
            program,
            ..
        } = self;
        assert_eq!(memory.state_errors(), 0);
        assert_eq!(
            memory.census(),
            Census {
                free: CHUNKS - RING,
                fill: RING,
                ..Census::default()
            }
        );
        drop((program, rx, tx, chunks));
        assert_eq!(memory.census().quarantined, RING);
        until("the kernel to let go", || {
            (release_retired(&memory) == 0).then_some(())
        });
        assert_eq!(
            memory.census(),
            Census {
                free: CHUNKS,
                ..Census::default()
            }
        );
    }
}

fn both_ways(mode: AttachMode, lengths: &[usize]) {
    let mut rig = Rig::new(mode);
    assert_eq!(rig.program.mode(), mode);
    // More rounds than the rings have entries.
    for round in 0..30 {
        for len in lengths {
            let sent = frame(GUEST, FAR, len + round % 4);
            rig.peer.send(&sent);
            assert!(rig.receive() == sent, "{len} bytes to the guest");
        }
        let sent: Vec<_> = lengths
            .iter()
            .map(|len| frame(FAR, GUEST, len + round % 4))
            .collect();
        let mut frames = sent.iter().map(|bytes| rig.frame_of(bytes)).collect();
        rig.send(&mut frames);
        for bytes in &sent {
            assert!(
                rig.peer.receive() == *bytes,
                "{} bytes from the guest",
                bytes.len()
            );
        }
    }
    let total = 30 * lengths.len() as u64;
    assert_eq!(rig.rx.counters().frames, total);
    assert_eq!(rig.rx.counters().kernel_dropped, 0);
    assert_eq!(rig.tx.counters().frames, total);
    assert_eq!(
        (rig.tx.counters().kernel_invalid, rig.tx.counters().kick_errors),
        (0, 0)
    );
    assert_eq!(rig.program.counters().unwrap().redirected, total);
    rig.finish();
}

#[test]
fn frames_of_all_sizes_pass_both_ways_native() {
    in_namespace(1, || {
        both_ways(AttachMode::Native, &[60, 61, 590, 1514, 3400, 3900, 9000])
    });
}

#[test]
fn frames_pass_both_ways_generic() {
    in_namespace(1, || both_ways(AttachMode::Skb, &[60, 1514]));
}

#[test]
fn a_burst_longer_than_the_ring_is_sent_in_order() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        assert!(!rig.info.zerocopy, "veth has none");
        assert!(rig.info.multi_buffer);
        let sent: Vec<_> = (0..200).map(|number| frame(FAR, GUEST, 60 + number)).collect();
        let mut frames: VecDeque<_> = sent.iter().map(|bytes| rig.frame_of(bytes)).collect();
        assert_eq!(rig.tx.send(&mut frames), RING as usize);
        rig.send(&mut frames);
        for bytes in &sent {
            assert_eq!(rig.peer.receive(), *bytes);
        }
        rig.finish();
    });
}

#[test]
fn what_a_nic_without_carrier_refuses_and_holds_can_be_sent_again() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Native);
        let bytes = |number: u8| {
            // One in three has several segments.
            let mut bytes = frame(FAR, GUEST, if number.is_multiple_of(3) { 5000 } else { 100 });
            bytes[20] = number;
            bytes
        };
        for device in [NIC, PEER] {
            ip(&["link", "set", device, "mtu", "9000"]);
        }
        let mut copies = Vec::new();
        let mut next = 0;
        // Positions differ each time: the rings wrap, and in the end a loss comes while others are in flight.
        for round in 0..30 {
            let mut frames = (0..round % 5).map(|_| rig.frame_of(&bytes(200))).collect();
            rig.send(&mut frames);
            ip(&["link", "set", PEER, "down"]);
            let count = 1 + round % 7;
            let mut frames: VecDeque<Frame> = (0..count).map(|n| rig.frame_of(&bytes(next + n))).collect();
            assert_eq!(rig.tx.send(&mut frames), usize::from(count));
            // Each kick has the kernel drop a frame; the rest is on the ring when the loss is found out.
            for _ in 0..round % 3 {
                rig.tx.flush();
                rig.tx.copy_refused(&mut rig.chunks, &mut copies);
                rig.tx.reap(&mut rig.chunks);
            }
            rig.tx.flush();
            rig.tx.copy_refused(&mut rig.chunks, &mut copies);
            rig.tx.copy_in_flight(&mut rig.chunks, &mut copies);
            rig.tx.copy_in_flight(&mut rig.chunks, &mut copies);
            // Emptied, so that nothing of it is sent once the carrier is back.
            until("an empty ring", || {
                rig.tx.flush();
                rig.tx.copy_refused(&mut rig.chunks, &mut copies);
                rig.tx.reap(&mut rig.chunks);
                (rig.tx.in_flight() == 0).then_some(())
            });
            assert_eq!(copies.len(), usize::from(count), "round {round}");
            for copy in copies.drain(..) {
                assert!(rig.bytes_of(copy) == bytes(next), "round {round}, frame {next}");
                next += 1;
            }
            ip(&["link", "set", PEER, "up"]);
            until("the carrier", || {
                let link = ip(&["link", "show", NIC]);
                (link.contains("LOWER_UP") && link.contains("state UP")).then_some(())
            });
        }
        assert!(rig.tx.counters().kick_errors > 30);
        rig.finish();
    });
}

#[test]
fn only_frames_to_guests_are_taken() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let host = Station::on(NIC);
        let to_host = frame(HOST, FAR, 100);
        rig.peer.send(&to_host);
        assert_eq!(host.receive(), to_host);
        let to_guest = frame(GUEST, FAR, 100);
        rig.peer.send(&to_guest);
        assert_eq!(rig.receive(), to_guest);
        rig.program.forget_mac(GUEST).unwrap();
        rig.program.forget_mac(GUEST).unwrap();
        rig.peer.send(&to_guest);
        assert_eq!(host.receive(), to_guest);
        // Tagged frames go by their address, too; a packet socket shows them without the tag, so count.
        rig.program.allow_mac(GUEST).unwrap();
        let mut tagged = frame(GUEST, FAR, 100);
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        rig.peer.send(&tagged);
        assert_eq!(rig.receive(), tagged);
        let counters = rig.program.counters().unwrap();
        assert_eq!(counters.redirected, 2);
        assert!(counters.passed >= 2);
        rig.finish();
    });
}

/// What a target sends back to the probes of `HOST`.
fn answer_to(asked: &[u8]) -> Vec<u8> {
    let mut answer = [&HOST.0[..], &FAR.0, &asked[12..]].concat();
    match asked[12..14] {
        [8, 6] => {
            answer[21] = 2;
            answer[22..28].copy_from_slice(&FAR.0);
            answer[28..32].copy_from_slice(&asked[38..42]);
        }
        [8, 0] => {
            answer[26..30].copy_from_slice(&asked[30..34]);
            answer[34] = 0;
        }
        _ => answer[54] = 136,
    }
    answer
}

#[test]
fn answers_to_probes_are_counted_and_reach_the_host() {
    in_namespace(1, || {
        let mut program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        let (answers, peer) = (program.answers(), Station::on(PEER));
        let asker = |address: &str| Asker {
            mac: HOST,
            address: Some(address.parse().unwrap()),
        };
        let (nic, mut count) = (5, 0);
        for (target, other, address) in [
            ("192.0.2.1", "192.0.2.2", "192.0.2.9"),
            ("icmp:192.0.2.1", "icmp:192.0.2.2", "192.0.2.9"),
            ("2001:db8::1", "2001:db8::2", "2001:db8::9"),
        ] {
            let target = target.parse().unwrap();
            program.expect_answers(HOST, nic, target).unwrap();
            let mut asked = Vec::new();
            write_probe(&mut asked, &asker(address), target, Some(FAR));
            let answer = answer_to(&asked);
            let passed = program.counters().unwrap().passed;
            // Neither the question itself, nor somebody else's answer, nor one to another address, nor half of one.
            let mut question = asked.clone();
            question[..6].copy_from_slice(&HOST.0);
            let mut to_another = answer.clone();
            to_another[5] ^= 0x40;
            let mut of_another = Vec::new();
            write_probe(
                &mut of_another,
                &asker(address),
                other.parse().unwrap(),
                Some(FAR),
            );
            for frame in [
                &question,
                &to_another,
                &answer_to(&of_another),
                &answer[..40].to_vec(),
                &answer,
            ] {
                peer.send(frame);
            }
            until("the frames at the host", || {
                (program.counters().unwrap().passed >= passed + 5).then_some(())
            });
            count += 1;
            let all = answers.read();
            assert_eq!((all[5].count, all[5].from), (count, FAR), "{target}");
            assert!(all[5].at_ns > 0 && all.iter().map(|answer| answer.count).sum::<u64>() == count);
        }
        // An echo that somebody else on the host asked for.
        let target = "icmp:192.0.2.1".parse().unwrap();
        program.expect_answers(HOST, nic, target).unwrap();
        let mut asked = Vec::new();
        write_probe(&mut asked, &asker("192.0.2.9"), target, Some(FAR));
        let mut foreign = answer_to(&asked);
        foreign[38] ^= 1;
        program.expect_no_answers(GUEST).unwrap();
        peer.send(&foreign);
        peer.send(&answer_to(&asked));
        until("the answer", || (answers.read()[5].count > count).then_some(()));
        assert_eq!(answers.read()[5].count, count + 1);
        program.expect_no_answers(HOST).unwrap();
        let passed = program.counters().unwrap().passed;
        peer.send(&answer_to(&asked));
        until("the frame at the host", || {
            (program.counters().unwrap().passed > passed).then_some(())
        });
        assert_eq!(answers.read()[5].count, count + 1);
    });
}

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
        let mut frames = VecDeque::from([rig.frame_of(&to_host)]);
        rig.send(&mut frames);
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

fn attached() -> bool {
    ip(&["-d", "link", "show", NIC]).contains("xdp")
}

#[test]
fn the_program_goes_with_its_handle() {
    in_namespace(1, || {
        let program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        assert_eq!(program.mode(), AttachMode::Native);
        assert!(attached());
        drop(program);
        // A process that another test is just starting may hold the descriptor until it executes its program.
        let end = Instant::now() + net::PATIENCE;
        while attached() {
            assert!(Instant::now() < end, "the program is still attached");
        }
    });
}

/// Set for the process that [`the_program_goes_with_a_killed_process`] starts, which is this test again.
const HOLD: &str = "VNIC_TEST_HOLD_THE_PROGRAM";

#[test]
fn the_program_goes_with_a_killed_process() {
    if std::env::var_os(HOLD).is_some() {
        let _program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        println!("\nholding");
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    in_namespace(1, || {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_program_goes_with_a_killed_process", "--nocapture"])
            .env(HOLD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let held = lines.map_while(Result::ok).any(|line| line == "holding");
        let there = attached();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(held && there);
        until("the kernel to detach", || (!attached()).then_some(()));
    });
}

#[test]
fn a_foreign_program_is_left_alone() {
    in_namespace(1, || {
        for (first, second) in [
            (AttachMode::Native, AttachMode::Auto),
            (AttachMode::Skb, AttachMode::Auto),
        ] {
            let _foreign = Program::attach(index(NIC), NIC, first).unwrap();
            let error = Program::attach(index(NIC), NIC, second).err().unwrap();
            assert!(matches!(error, ProgramError::ForeignProgram { .. }), "{error}");
            assert!(error.to_string().contains("ip link set dev nic xdp off"));
        }
        let error = Program::attach(9999, "gone", AttachMode::Auto).err().unwrap();
        assert!(matches!(error, ProgramError::NoInterface { .. }), "{error}");
    });
}

#[test]
fn a_queue_can_be_opened_again_and_not_twice() {
    in_namespace(2, || {
        let memory = FrameMemory::new(CHUNKS).unwrap();
        let mut chunks = ChunkCache::new(memory.clone());
        for _ in 0..5 {
            let (mut rx, tx, _) = open_queue(&config(0), &memory, 0).unwrap();
            let (mut other_rx, other_tx, _) = open_queue(&config(1), &memory, 0).unwrap();
            assert_eq!(
                memory.census().quarantined,
                0,
                "bound again: the kernel is done with the old one"
            );
            rx.refill(&mut chunks);
            other_rx.refill(&mut chunks);
            let busy = XskConfig {
                bind_timeout: Duration::from_millis(20),
                ..config(0)
            };
            assert!(matches!(
                open_queue(&busy, &memory, 0),
                Err(XskError::Busy { .. })
            ));
            drop(tx);
            assert_eq!(memory.census().quarantined, 0, "the receiving half lives");
            drop(rx);
            assert_eq!(
                memory.census(),
                Census {
                    free: CHUNKS - 2 * RING,
                    fill: RING,
                    quarantined: RING,
                    ..Census::default()
                }
            );
            drop((other_rx, other_tx));
        }
        ip(&["link", "delete", NIC]);
        assert_eq!(release_retired(&memory), 0, "the interface is gone");
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    in_namespace(1, || {
        let memory = FrameMemory::new(16).unwrap();
        let open = |config: XskConfig| open_queue(&config, &memory, 0).err().unwrap();
        let error = open(XskConfig {
            zerocopy: ZeroCopy::Require,
            ..config(0)
        });
        assert!(matches!(error, XskError::NoZeroCopy { .. }), "{error}");
        for bad in [
            config(9),
            XskConfig {
                ifindex: 9999,
                ..config(0)
            },
        ] {
            let error = open(bad);
            assert!(matches!(error, XskError::NoQueue { .. }), "{error}");
        }
        let error = open(XskConfig {
            tx_ring: 100,
            ..config(0)
        });
        assert!(error.to_string().contains("nic queue 0"), "{error}");
        assert!(matches!(
            GroupTap::open(9999, "gone"),
            Err(vnic_dataplane::group::GroupError::NoInterface { .. })
        ));
    });
}

#[test]
fn frames_of_too_many_segments_are_dropped_whole() {
    in_namespace(1, || {
        for device in [NIC, PEER] {
            ip(&["link", "set", device, "mtu", "20000"]);
        }
        let mut rig = Rig::new(AttachMode::Native);
        for _ in 0..20 {
            rig.peer.send(&frame(GUEST, FAR, 16_384));
            let small = frame(GUEST, FAR, 60);
            rig.peer.send(&small);
            assert_eq!(rig.receive(), small);
        }
        assert_eq!(rig.rx.counters().too_long, 20);
        rig.finish();
    });
}
