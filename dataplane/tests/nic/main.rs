//! AF_XDP sockets, the XDP program and group frames on real veths. Needs root.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::unwrap_used,
    reason = "constants of the C interface; a test fails by panicking"
)]

mod host;
mod net;
mod program;

use std::sync::Arc;
use std::time::Duration;
use std::vec::Drain;

use net::{FAR, GUEST, HOST, NIC, PEER, Station, frame, in_namespace, index, ip, until};
use vnic_dataplane::group::GroupTap;
use vnic_dataplane::memory::frames::{Census, ChunkCache, Frame, FrameMemory};
use vnic_dataplane::nic::{NicRx, NicTx};
use vnic_dataplane::program::{AttachMode, Program};
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
    fn send(&mut self, mut frames: Drain<'_, Frame>) {
        until("completions", || {
            self.tx.send(&mut frames);
            self.tx.flush();
            self.tx.reap(&mut self.chunks);
            (frames.len() == 0 && self.tx.in_flight() == 0).then_some(())
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
        let mut frames: Vec<_> = sent.iter().map(|bytes| rig.frame_of(bytes)).collect();
        rig.send(frames.drain(..));
        for bytes in &sent {
            assert!(
                rig.peer.receive() == *bytes,
                "{} bytes from the guest",
                bytes.len()
            );
        }
    }
    let total = 30 * lengths.len() as u64;
    let received = rig.rx.reader().counters();
    assert_eq!((received.frames, received.kernel_dropped), (total, 0));
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
        let mut frames: Vec<_> = sent.iter().map(|bytes| rig.frame_of(bytes)).collect();
        let mut frames = frames.drain(..);
        rig.tx.send(&mut frames);
        assert_eq!(frames.len(), sent.len() - RING as usize);
        rig.send(frames);
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
            let mut frames: Vec<_> = (0..round % 5).map(|_| rig.frame_of(&bytes(200))).collect();
            rig.send(frames.drain(..));
            ip(&["link", "set", PEER, "down"]);
            let count = 1 + round % 7;
            let mut frames: Vec<Frame> = (0..count).map(|n| rig.frame_of(&bytes(next + n))).collect();
            let mut frames = frames.drain(..);
            rig.tx.send(&mut frames);
            assert_eq!(frames.len(), 0);
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
        assert_eq!(rig.rx.reader().counters().too_long, 20);
        rig.finish();
    });
}
