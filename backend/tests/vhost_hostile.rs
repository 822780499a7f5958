//! Front-ends that do not behave: only their own connection ends, and no fd stays behind.

mod vhost_support;

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proptest::prelude::*;
use vhost_support::{Port, event, memory, message, reply, send, state, words};
use vnic_backend::vhost::{Fault, QueueNum};

/// Fds are counted for the whole process, so only one test may have any open at a time.
struct FdCount {
    before: usize,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

impl FdCount {
    fn start() -> FdCount {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        FdCount {
            before: open_fds(),
            _alone: alone,
        }
    }

    fn check(&self) {
        assert_eq!(open_fds(), self.before, "file descriptors leak");
    }
}

/// Sends a message with fds and gives the fault that ends the connection.
fn fault(bytes: &[u8], fds: &[&OwnedFd]) -> Fault {
    let (mut port, socket) = Port::new(1, QueueNum::Pairs);
    let open = open_fds();
    send(&socket, bytes, fds);
    let fault = port.turn().expect_err("a fault");
    // Closed when the fault is reported, not only when the connection is dropped.
    assert_eq!(open_fds(), open, "{fault}");
    fault
}

#[test]
fn malformed_messages_end_the_connection_with_a_cause() {
    let count = FdCount::start();
    let files: Vec<OwnedFd> = (0..20).map(|_| memory()).collect();
    let fds: Vec<&OwnedFd> = files.iter().collect();
    let cases: [(Vec<u8>, usize, &str); 10] = [
        (
            message(1, 2, &[]),
            0,
            "request 1 (GET_FEATURES) has protocol version 2",
        ),
        (message(1, 5, &[]), 0, "request 1 (GET_FEATURES) has flags 0x5"),
        (
            message(2, 1, &[0; 7]),
            0,
            "request 2 (SET_FEATURES) has a payload of 7 bytes, expected 8 to 8",
        ),
        (
            message(5, 1, &[0; 8]),
            1,
            "request 5 (SET_MEM_TABLE) has a payload of 8 bytes, expected 40 to 264",
        ),
        (
            [5, 1, u32::MAX].map(u32::to_ne_bytes).concat(),
            0,
            "has a payload of 4294967295 bytes",
        ),
        (
            message(3, 1, &[]),
            1,
            "request 3 (SET_OWNER) brings 1 file descriptors, expected 0 to 0",
        ),
        (
            message(37, 1, &[0; 40]),
            2,
            "request 37 (ADD_MEM_REG) brings 2 file descriptors, expected 1 to 1",
        ),
        (
            message(12, 1, &words(&[0x100])),
            1,
            "request 12 (SET_VRING_KICK) brings 1 file descriptors",
        ),
        (
            message(12, 1, &words(&[0])),
            1,
            "request 12 (SET_VRING_KICK) brings a file descriptor that is not an eventfd",
        ),
        (
            message(5, 1, &[0; 264]),
            20,
            "file descriptors were lost on the way: a message brings more than 8",
        ),
    ];
    for (bytes, n, text) in cases {
        let fault = fault(&bytes, &fds[..n]).to_string();
        assert!(fault.contains(text), "{fault:?} lacks {text:?}");
    }
    // One too many may still fit the room that alignment leaves, and is then counted.
    let ninth = fault(&message(5, 1, &[0; 264]), &fds[..9]);
    assert!(
        matches!(
            ninth,
            Fault::FdsTruncated { .. } | Fault::Fds { fds: 9, max: 8, .. }
        ),
        "{ninth}"
    );
    drop(files);
    count.check();
}

#[test]
fn unknown_requests_end_the_connection_and_their_fds_are_closed() {
    let count = FdCount::start();
    for code in [0, 7, 21, 32, 33, 42, 99, u32::MAX] {
        let fault = fault(&message(code, 1, &[1; 100]), &[&memory(), &event()]);
        assert!(fault.to_string().ends_with("was not negotiated"), "{fault}");
    }
    count.check();
}

#[test]
fn a_refused_request_with_need_reply_keeps_the_connection() {
    let count = FdCount::start();
    {
        let (mut port, socket) = Port::new(1, QueueNum::Pairs);
        send(&socket, &message(16, 1, &words(&[1 << 3])), &[]);
        send(&socket, &message(33, 9, &[]), &[&memory()]);
        send(
            &socket,
            &message(37, 9, &words(&[0, 0, 4096, 0, 0])),
            &[&memory()],
        );
        send(&socket, &message(1, 1, &[]), &[]);
        assert_eq!(port.turn().unwrap(), 4);
        assert_eq!(reply(&socket, 33), 1);
        assert_eq!(reply(&socket, 37), 1, "CONFIGURE_MEM_SLOTS was not negotiated");
        assert_ne!(reply(&socket, 1), 0);
    }
    count.check();
}

#[test]
fn messages_may_come_byte_by_byte_or_many_at_once() {
    let count = FdCount::start();
    let kick = event();
    let script: [(Vec<u8>, Option<&OwnedFd>); 4] = [
        (message(8, 1, &state(0, 256)), None),
        (message(12, 1, &words(&[0])), Some(&kick)),
        (message(13, 1, &words(&[0])), Some(&kick)),
        (message(8, 1, &state(1, 128)), None),
    ];
    for slow in [true, false] {
        let (mut port, socket) = Port::new(1, QueueNum::Pairs);
        let mut handled = 0;
        for (bytes, fd) in &script {
            // Eventfds come with the first byte only.
            let first = if slow { 1 } else { bytes.len() };
            send(&socket, &bytes[..first], fd.as_slice());
            for byte in &bytes[first..] {
                assert_eq!(port.turn().unwrap(), 0, "handled before it was complete");
                (&socket).write_all(&[*byte]).unwrap();
            }
            if slow {
                handled += port.turn().unwrap();
            }
        }
        handled += port.turn().unwrap();
        assert_eq!(handled, script.len());
        let (first, second) = (port.ring(0), port.ring(1));
        assert_eq!((first.size, second.size), (256, 128));
        assert!(first.kick.is_some() && first.call.is_some() && second.kick.is_none());
    }
    drop(script);
    drop(kick);
    count.check();
}

#[test]
fn fds_inside_a_message_are_not_taken_for_its_own() {
    let count = FdCount::start();
    // The header is read on its own, so what comes with the payload is found there.
    for (at, found) in [(1, 1), (12, 12), (19, 12)] {
        let (mut port, socket) = Port::new(1, QueueNum::Pairs);
        let bytes = message(12, 1, &words(&[0]));
        send(&socket, &bytes[..at], &[&event()]);
        send(&socket, &bytes[at..], &[&event()]);
        let fault = port.turn().unwrap_err();
        assert!(
            matches!(fault, Fault::FdsMidMessage { offset } if offset == found),
            "{fault}"
        );
    }
    count.check();
}

#[test]
fn a_front_end_that_goes_away_mid_message_leaves_nothing() {
    let count = FdCount::start();
    let bytes = message(12, 1, &words(&[0]));
    for sent in 0..bytes.len() {
        let (mut port, socket) = Port::new(1, QueueNum::Pairs);
        if sent > 0 {
            send(&socket, &bytes[..sent], &[&event()]);
        }
        assert_eq!(port.turn().unwrap(), 0);
        drop(socket);
        match port.turn().unwrap_err() {
            Fault::Closed => assert_eq!(sent, 0),
            Fault::ClosedMidMessage { received } => assert_eq!(received, sent),
            other => panic!("{other}"),
        }
    }
    count.check();
}

#[test]
fn a_front_end_that_reads_nothing_is_let_go() {
    let _alone = FdCount::start();
    let (mut port, socket) = Port::new(1, QueueNum::Pairs);
    let request = message(1, 1, &[]);
    let mut asked = 0_u64;
    let end = loop {
        (&socket).write_all(&request).unwrap();
        asked += 1;
        assert!(asked < 1_000_000, "replies pile up without bound");
        if let Err(fault) = port.turn() {
            break fault;
        }
    };
    assert!(matches!(end, Fault::NotReading { unsent: 4097..=4116 }), "{end}");
    assert!(port.connection.wants_write());
}

#[test]
fn replies_wait_until_they_are_read_and_come_whole() {
    let _alone = FdCount::start();
    let (mut port, socket) = Port::new(1, QueueNum::Pairs);
    let mut asked = 0;
    while !port.connection.wants_write() {
        send(&socket, &message(1, 1, &[]), &[]);
        assert_eq!(port.turn().unwrap(), 1);
        asked += 1;
    }
    for read in 0..asked {
        assert_ne!(reply(&socket, 1), 0);
        if read % 8 == 0 {
            port.connection.flush().unwrap();
        }
    }
    assert!(!port.connection.wants_write());
}

#[test]
fn replies_to_a_front_end_that_is_gone_close_the_connection() {
    let _alone = FdCount::start();
    let (mut port, socket) = Port::new(1, QueueNum::Pairs);
    send(&socket, &message(1, 1, &[]), &[]);
    socket.shutdown(Shutdown::Both).unwrap();
    drop(socket);
    assert!(port.turn().unwrap_err().is_clean_close());
}

/// One message of a random front-end: mostly right, sometimes not.
#[derive(Debug, Clone)]
struct Random {
    code: u32,
    need_reply: bool,
    ring: u32,
    value: u64,
    /// Bytes added to (or, if negative, cut from) the payload.
    resize: i8,
    fds: usize,
    /// Split the message here.
    split: usize,
}

fn random() -> impl Strategy<Value = Random> {
    let code = prop_oneof![12 => prop::sample::select(vec![1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 36, 37, 38]),
        1 => 0..50_u32];
    let ring = prop_oneof![20 => 0..4_u32, 1 => any::<u32>()];
    let value = prop_oneof![10 => 0..8_u64, 5 => Just(256), 5 => Just(1 << 30), 1 => any::<u64>()];
    let resize = prop_oneof![60 => Just(0_i8), 1 => -3..4_i8];
    // Mostly what the request wants: 9 stands for that.
    let fds = prop_oneof![40 => Just(9_usize), 1 => 0..9_usize];
    (
        code,
        prop::bool::weighted(0.95),
        ring,
        value,
        resize,
        fds,
        0..60_usize,
    )
        .prop_map(|(code, need_reply, ring, value, resize, fds, split)| Random {
            code,
            need_reply,
            ring,
            value,
            resize,
            fds,
            split,
        })
}

impl Random {
    fn send(&self, socket: &UnixStream) {
        let low = u32::try_from(self.value & 0xffff_ffff).expect("32 bits");
        let guest = self.value << 12;
        let region = [guest, 4096 * (1 + u64::from(self.ring & 1)), guest, 0];
        let (mut payload, wanted) = match self.code {
            2 | 16 => (words(&[self.value]), 0),
            5 => ([words(&[1]), words(&region)].concat(), 1),
            8 | 10 | 11 | 18 => (state(self.ring, low), 0),
            9 => (
                [state(self.ring, 0), words(&[guest, guest, guest, 0])].concat(),
                0,
            ),
            12..=14 => {
                let polled = u64::from(self.value == 256) << 8;
                (words(&[u64::from(self.ring) | polled]), usize::from(polled == 0))
            }
            37 => ([words(&[0]), words(&region)].concat(), 1),
            38 => ([words(&[0]), words(&region)].concat(), 0),
            _ => (Vec::new(), 0),
        };
        let size = payload.len().saturating_add_signed(self.resize.into());
        payload.resize(size, 0xa5);
        let count = if self.fds == 9 { wanted } else { self.fds };
        let fds: Vec<OwnedFd> = (0..count).map(|_| event()).collect();
        let bytes = message(self.code, if self.need_reply { 9 } else { 1 }, &payload);
        let split = self.split.clamp(1, bytes.len());
        send(socket, &bytes[..split], &fds.iter().collect::<Vec<_>>());
        send(socket, &bytes[split..], &[]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in 0..600_usize) {
        let count = FdCount::start();
        {
            let (mut port, socket) = Port::new(1, QueueNum::Pairs);
            let at = at.min(bytes.len());
            for (part, fds) in [(&bytes[..at], 2), (&bytes[at..], 1)] {
                let fds: Vec<OwnedFd> = (0..fds).map(|_| memory()).collect();
                if !part.is_empty() {
                    send(&socket, part, &fds.iter().collect::<Vec<_>>());
                }
                if port.turn().is_err() {
                    break;
                }
            }
        }
        count.check();
    }

    #[test]
    fn random_messages_never_panic_or_leak(script in prop::collection::vec(random(), 1..60)) {
        let count = FdCount::start();
        {
            let (mut port, socket) = Port::new(2, QueueNum::Rings);
            // Ring 1 runs, so that much of what follows asks for a quiesce.
            send(&socket, &message(16, 1, &words(&[1 | 1 << 3 | 1 << 15])), &[]);
            send(&socket, &message(37, 1, &words(&[0, 1 << 40, 4096, 1 << 40, 0])), &[&memory()]);
            send(&socket, &message(8, 1, &state(1, 64)), &[]);
            send(&socket, &message(9, 1, &[state(1, 0), words(&[0; 4])].concat()), &[]);
            send(&socket, &message(12, 1, &words(&[1])), &[&event()]);
            prop_assert_eq!(port.turn().unwrap(), 5);
            prop_assert!(port.ring(1).runnable);
            for one in &script {
                one.send(&socket);
                if port.turn().is_err() {
                    break;
                }
            }
            // What is held is what the device says it holds.
            port.device.reset();
            let held = port.device.rings().filter(|ring| ring.kick.is_some()).count();
            prop_assert_eq!(held, 0);
        }
        count.check();
    }
}
