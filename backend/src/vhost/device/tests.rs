//! The state machine alone: messages in, steps out, no socket.

use std::fs::File;
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq as R;
use vmm_sys_util::eventfd::EventFd;

use super::super::vring::RingAddrs;
use super::*;

const NO_MEMORY_AT: u64 = 0xbad000;

/// Maps nothing; refuses one address.
struct FakeMap;

impl MapMemory for FakeMap {
    type Memory = usize;

    fn map(&self, regions: &[RegionSpec]) -> Result<Arc<usize>, GuestMemoryError> {
        assert!(!regions.is_empty());
        match regions.iter().find(|region| region.guest_addr == NO_MEMORY_AT) {
            Some(region) => Err(GuestMemoryError::PastEndOfFile {
                guest_addr: region.guest_addr,
                needed: region.size,
                actual: 0,
            }),
            None => Ok(Arc::new(regions.len())),
        }
    }
}

fn device(pairs: u16) -> Device<FakeMap> {
    Device::with_mapper(
        DeviceConfig {
            max_queue_pairs: pairs,
            queue_num_as: QueueNum::Pairs,
        },
        FakeMap,
    )
}

fn event() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

fn region(guest_addr: u64, size: u64) -> RegionSpec {
    let fd: OwnedFd = File::open("/dev/null").unwrap().into();
    RegionSpec {
        guest_addr,
        user_addr: guest_addr + 0x7f00_0000_0000,
        size,
        mmap_offset: 0,
        fd: Arc::new(fd),
    }
}

fn code(request: &Request) -> Code {
    Code(
        match request {
            Request::GetFeatures => R::GET_FEATURES,
            Request::SetFeatures(_) => R::SET_FEATURES,
            Request::GetProtocolFeatures => R::GET_PROTOCOL_FEATURES,
            Request::SetProtocolFeatures(_) => R::SET_PROTOCOL_FEATURES,
            Request::SetOwner => R::SET_OWNER,
            Request::ResetOwner => R::RESET_OWNER,
            Request::GetQueueNum => R::GET_QUEUE_NUM,
            Request::GetMaxMemSlots => R::GET_MAX_MEM_SLOTS,
            Request::SetMemTable(_) => R::SET_MEM_TABLE,
            Request::AddMemReg(_) => R::ADD_MEM_REG,
            Request::RemMemReg { .. } => R::REM_MEM_REG,
            Request::SetVringNum { .. } => R::SET_VRING_NUM,
            Request::SetVringAddr { .. } => R::SET_VRING_ADDR,
            Request::SetVringBase { .. } => R::SET_VRING_BASE,
            Request::GetVringBase { .. } => R::GET_VRING_BASE,
            Request::SetVringKick { .. } => R::SET_VRING_KICK,
            Request::SetVringCall { .. } => R::SET_VRING_CALL,
            Request::SetVringErr { .. } => R::SET_VRING_ERR,
            Request::SetVringEnable { .. } => R::SET_VRING_ENABLE,
            Request::SendRarp(_) => R::SEND_RARP,
            Request::Unsupported => R::SET_LOG_FD,
        }
        .into(),
    )
}

fn plain(request: Request) -> Message {
    Message {
        code: code(&request),
        need_reply: false,
        request,
    }
}

fn asking(request: Request) -> Message {
    Message {
        need_reply: true,
        ..plain(request)
    }
}

/// Handles a request that must go through at once; gives its reply and whether something changed.
fn now<M: MapMemory>(device: &mut Device<M>, request: Request) -> (Option<Reply>, bool) {
    match device.handle(plain(request)).unwrap() {
        Step::Done { reply, changed } => (reply, changed),
        other => panic!("{other:?}"),
    }
}

/// Handles a request that must ask for a quiesce first.
fn quiesced<M: MapMemory>(device: &mut Device<M>, request: Request, positions: &[u32]) -> Option<Reply> {
    let Step::Quiesce(pending) = device.handle(plain(request)).unwrap() else {
        panic!("no quiesce asked for");
    };
    for (ring, base) in positions.iter().enumerate() {
        device.set_base(ring, *base);
    }
    match device.complete(pending).unwrap() {
        Step::Done { reply, changed } => {
            assert!(changed, "stopped rings must be started again");
            reply
        }
        other => panic!("{other:?}"),
    }
}

fn number(reply: Option<Reply>) -> u64 {
    let bytes = reply.expect("a reply").encode();
    u64::from_ne_bytes(bytes[12..].try_into().unwrap())
}

fn addrs(ring: u32) -> RingAddrs {
    let at = 0x7f00_0000_0000 + u64::from(ring) * 0x1_0000;
    RingAddrs {
        desc: at,
        avail: at + 0x2000,
        used: at + 0x4000,
    }
}

/// Starts a ring; memory must be there or come later.
fn start<M: MapMemory>(device: &mut Device<M>, ring: u32) {
    now(device, Request::SetVringNum { ring, size: 256 });
    now(device, Request::SetVringBase { ring, base: 5 });
    now(
        device,
        Request::SetVringAddr {
            ring,
            flags: 0,
            addrs: addrs(ring),
        },
    );
    now(
        device,
        Request::SetVringCall {
            ring,
            fd: Some(event()),
        },
    );
    now(
        device,
        Request::SetVringKick {
            ring,
            fd: Some(event()),
        },
    );
}

/// One queue pair with ring 0 running.
fn running() -> Device<FakeMap> {
    let mut device = device(1);
    let all = features::OFFERED_PROTOCOL.bits();
    now(&mut device, Request::SetProtocolFeatures(all));
    now(&mut device, Request::SetFeatures(features::OFFERED));
    now(&mut device, Request::SetMemTable(vec![region(0, 0x10_0000)]));
    start(&mut device, 0);
    assert!(view(&device, 0).runnable);
    device
}

fn view<M: MapMemory>(device: &Device<M>, ring: usize) -> RingView<'_> {
    device.rings().nth(ring).unwrap()
}

#[test]
fn features_are_offered_and_kept_whatever_the_queues() {
    let want = (1 << 32) | (1 << 34) | (1 << 35) | (1 << 15) | (1 << 22) | (1 << 28) | (1 << 29) | (1 << 30);
    for pairs in [1, 8] {
        let mut device = device(pairs);
        assert_eq!(number(now(&mut device, Request::GetFeatures).0), want);
        let protocol = number(now(&mut device, Request::GetProtocolFeatures).0);
        assert_eq!(protocol, 1 | (1 << 2) | (1 << 3) | (1 << 15));
        assert_eq!(number(now(&mut device, Request::GetQueueNum).0), u64::from(pairs));
    }
}

#[test]
fn queue_num_counts_as_configured_and_within_the_index_width() {
    for (pairs, count, answer) in [
        (3, QueueNum::Pairs, 3),
        (3, QueueNum::Rings, 6),
        (0, QueueNum::Rings, 2),
    ] {
        let mut device = Device::new(DeviceConfig {
            max_queue_pairs: pairs,
            queue_num_as: count,
        });
        assert_eq!(number(now(&mut device, Request::GetQueueNum).0), answer);
    }
    assert_eq!(device(9999).rings().count(), 256);
}

#[test]
fn max_mem_slots_needs_negotiation() {
    let mut device = device(1);
    let fault = device.handle(plain(Request::GetMaxMemSlots)).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "request 36 (GET_MAX_MEM_SLOTS) was not negotiated"
    );
    now(&mut device, Request::SetProtocolFeatures(1 << 15));
    assert_eq!(number(now(&mut device, Request::GetMaxMemSlots).0), 509);
}

#[test]
fn rings_start_disabled_with_protocol_features_and_enabled_without() {
    let mut device = device(2);
    now(&mut device, Request::SetVringEnable { ring: 1, value: 1 });
    now(&mut device, Request::SetFeatures(features::OFFERED));
    let enabled = |device: &Device<FakeMap>| device.rings().map(|ring| ring.enabled).collect::<Vec<_>>();
    // Enabled before SET_FEATURES (QEMU does that), and SET_FEATURES does not disable.
    assert_eq!(enabled(&device), [false, true, false, false]);
    now(&mut device, Request::SetFeatures(features::VERSION_1));
    assert_eq!(enabled(&device), [true; 4]);
    now(&mut device, Request::SetFeatures(features::OFFERED));
    assert_eq!(enabled(&device), [true; 4]);
    now(&mut device, Request::SetVringEnable { ring: 3, value: 0 });
    assert_eq!(enabled(&device), [true, true, true, false]);
    assert!(
        device.rings().all(|ring| !ring.started),
        "enabling starts nothing"
    );
}

#[test]
fn a_ring_runs_when_started_with_everything_in_any_order() {
    let mut device = device(1);
    start(&mut device, 0);
    assert!(
        view(&device, 0).started && !view(&device, 0).runnable,
        "no memory yet"
    );
    let (_, changed) = now(&mut device, Request::SetMemTable(vec![region(0, 4096)]));
    assert!(changed && view(&device, 0).runnable);
    assert!(!view(&device, 0).enabled, "started and disabled");
    assert_eq!(view(&device, 0).base, 5);
    assert!(!view(&device, 1).runnable);
    // No fd: started all the same, to be polled.
    now(&mut device, Request::SetVringNum { ring: 1, size: 64 });
    now(
        &mut device,
        Request::SetVringAddr {
            ring: 1,
            flags: 0,
            addrs: addrs(1),
        },
    );
    let (_, changed) = now(&mut device, Request::SetVringKick { ring: 1, fd: None });
    assert!(changed && view(&device, 1).runnable && view(&device, 1).kick.is_none());
}

#[test]
fn get_vring_base_stops_without_resetting() {
    let mut device = running();
    now_or_quiesce(&mut device, Request::SetVringEnable { ring: 0, value: 1 });
    let reply = quiesced(&mut device, Request::GetVringBase { ring: 0 }, &[65535]);
    assert_eq!(reply, Some(Reply::vring_state(Code(11), 0, 65535)));
    let ring = view(&device, 0);
    assert!(!ring.started && !ring.runnable && ring.enabled && ring.kick.is_none());
    assert_eq!((ring.size, ring.addrs, ring.base), (256, Some(&addrs(0)), 65535));
    assert!(ring.call.is_some());
    // Asked again, and for a ring that never ran: no quiesce, same answer.
    let (reply, _) = now(&mut device, Request::GetVringBase { ring: 0 });
    assert_eq!(reply, Some(Reply::vring_state(Code(11), 0, 65535)));
    let (reply, _) = now(&mut device, Request::GetVringBase { ring: 1 });
    assert_eq!(reply, Some(Reply::vring_state(Code(11), 1, 0x8000_8000)));
    // A kick fd is all it takes to go on.
    let (_, changed) = now(
        &mut device,
        Request::SetVringKick {
            ring: 0,
            fd: Some(event()),
        },
    );
    assert!(changed && view(&device, 0).runnable);
    assert_eq!(view(&device, 0).base, 65535);
}

#[test]
fn what_the_front_end_knows_of_a_position_is_what_it_set_or_was_answered() {
    let mut device = running();
    // `running` sets this base.
    assert_eq!((view(&device, 0).told, view(&device, 0).stopped), (5, false));
    now_or_quiesce(&mut device, Request::SetVringBase { ring: 0, base: 6 });
    // The ring moves on and is started again for reasons of its own.
    let _ = quiesced(&mut device, Request::SetVringCall { ring: 0, fd: None }, &[77]);
    assert_eq!((view(&device, 0).base, view(&device, 0).told), (77, 6));
    let _ = quiesced(&mut device, Request::GetVringBase { ring: 0 }, &[80]);
    assert_eq!((view(&device, 0).told, view(&device, 0).stopped), (80, true));
    now(&mut device, Request::SetVringKick { ring: 0, fd: None });
    assert!(!view(&device, 0).stopped);
    device.reset();
    assert_eq!((view(&device, 0).told, view(&device, 0).stopped), (0, false));
}

fn now_or_quiesce<M: MapMemory>(device: &mut Device<M>, request: Request) {
    if let Step::Quiesce(pending) = device.handle(plain(request)).unwrap() {
        let _ = device.complete(pending).unwrap();
    }
}

#[test]
fn what_running_rings_use_is_changed_only_after_a_quiesce() {
    let requests: [fn() -> Request; 10] = [
        || Request::SetMemTable(vec![region(0, 0x20_0000)]),
        || Request::AddMemReg(region(0x100_0000, 4096)),
        || Request::RemMemReg {
            guest_addr: 0,
            user_addr: 0x7f00_0000_0000,
            size: 0x10_0000,
        },
        || Request::SetFeatures(features::OFFERED & !features::EVENT_IDX),
        || Request::SetVringNum { ring: 0, size: 128 },
        || Request::SetVringAddr {
            ring: 0,
            flags: 0,
            addrs: addrs(3),
        },
        || Request::SetVringBase { ring: 0, base: 9 },
        || Request::GetVringBase { ring: 0 },
        || Request::SetVringCall {
            ring: 0,
            fd: Some(event()),
        },
        || Request::SetVringEnable { ring: 0, value: 1 },
    ];
    for request in requests {
        let mut device = running();
        let before = format!("{:?}", device.rings().collect::<Vec<_>>());
        let generation = device.memory_generation();
        let Step::Quiesce(pending) = device.handle(plain(request())).unwrap() else {
            panic!("{:?}: no quiesce", request());
        };
        assert_eq!(
            format!("{:?}", device.rings().collect::<Vec<_>>()),
            before,
            "changed too early"
        );
        assert_eq!(device.memory_generation(), generation);
        device.set_base(0, 77);
        assert!(matches!(
            device.complete(pending).unwrap(),
            Step::Done { changed: true, .. }
        ));
        let after = format!("{:?}", device.rings().collect::<Vec<_>>());
        assert!(
            after != before || device.memory_generation() != generation,
            "{:?}",
            request()
        );
        // The position that the ring reached, unless the front-end set another.
        let base = if matches!(request(), Request::SetVringBase { .. }) {
            9
        } else {
            77
        };
        assert_eq!(view(&device, 0).base, base);
    }
}

#[test]
fn what_changes_nothing_disturbs_nothing() {
    let mut device = running();
    now(&mut device, Request::SetFeatures(features::OFFERED));
    now(&mut device, Request::SetVringNum { ring: 0, size: 256 });
    now(
        &mut device,
        Request::SetVringAddr {
            ring: 0,
            flags: 0,
            addrs: addrs(0),
        },
    );
    now(&mut device, Request::SetVringEnable { ring: 0, value: 0 });
    now(&mut device, Request::SetOwner);
    now(&mut device, Request::ResetOwner);
    // The other ring does not run.
    start(&mut device, 1);
}

#[test]
fn features_without_bit_30_enable_a_running_ring_after_a_quiesce() {
    let mut device = running();
    assert!(!view(&device, 0).enabled);
    quiesced(&mut device, Request::SetFeatures(features::VERSION_1), &[7]);
    assert!(view(&device, 0).enabled);
    now(&mut device, Request::SetFeatures(features::VERSION_1));
}

#[test]
fn kick_call_and_err_fds_are_replaced_and_the_old_ones_closed() {
    let mut device = running();
    let old = Arc::downgrade(&view(&device, 0).kick.unwrap());
    let kick = event();
    let (_, changed) = now(
        &mut device,
        Request::SetVringKick {
            ring: 0,
            fd: Some(Arc::clone(&kick)),
        },
    );
    assert!(changed && old.upgrade().is_none());
    assert!(Arc::ptr_eq(&view(&device, 0).kick.unwrap(), &kick));
    let old = Arc::downgrade(&view(&device, 0).call.unwrap());
    quiesced(&mut device, Request::SetVringCall { ring: 0, fd: None }, &[1]);
    assert!(old.upgrade().is_none() && view(&device, 0).call.is_none());
    let (_, changed) = now(
        &mut device,
        Request::SetVringErr {
            ring: 0,
            fd: Some(event()),
        },
    );
    assert!(changed && view(&device, 0).err.is_some());
}

#[test]
fn a_refusal_is_a_nack_if_asked_for_and_a_fault_if_not() {
    let bad = || Request::SetVringNum { ring: 0, size: 40000 };
    let mut device = device(1);
    // need_reply means nothing before REPLY_ACK was negotiated.
    for message in [plain(bad()), asking(bad())] {
        let fault = device.handle(message).unwrap_err();
        assert!(
            fault
                .to_string()
                .starts_with("request 8 (SET_VRING_NUM) sets a queue size of 40000"),
            "{fault}"
        );
    }
    now(&mut device, Request::SetProtocolFeatures(1 << 3));
    let Step::Done {
        reply,
        changed: false,
    } = device.handle(asking(bad())).unwrap()
    else {
        panic!()
    };
    assert_eq!(number(reply), 1);
    assert_eq!(view(&device, 0).size, 0);
    let good = asking(Request::SetVringNum { ring: 0, size: 32768 });
    let Step::Done { reply, .. } = device.handle(good).unwrap() else {
        panic!()
    };
    assert_eq!(number(reply), 0);
    assert!(device.handle(plain(bad())).is_err());
    // A NACK would be taken for the ring's position.
    assert!(device.handle(asking(Request::GetVringBase { ring: 2 })).is_err());
    // The request that negotiates REPLY_ACK is itself answered.
    device.reset();
    let first = asking(Request::SetProtocolFeatures(1 << 3));
    let Step::Done { reply, .. } = device.handle(first).unwrap() else {
        panic!()
    };
    assert_eq!(number(reply), 0);
}

#[test]
fn requests_that_were_not_negotiated_are_named() {
    let mut device = device(1);
    for (code, text) in [
        (6, "request 6 (SET_LOG_BASE) was not negotiated"),
        (20, "request 20 (NET_SET_MTU) was not negotiated"),
        (33, "request 33 (GPU_SET_SOCKET) was not negotiated"),
        (4711, "request 4711 (unknown) was not negotiated"),
    ] {
        let message = |need_reply| Message {
            code: Code(code),
            need_reply,
            request: Request::Unsupported,
        };
        device.reset();
        assert_eq!(device.handle(message(true)).unwrap_err().to_string(), text);
        now(&mut device, Request::SetProtocolFeatures(1 << 3));
        let Step::Done { reply, .. } = device.handle(message(true)).unwrap() else {
            panic!()
        };
        assert_eq!(number(reply), 1, "{text}");
        assert!(device.handle(message(false)).is_err());
    }
}

#[test]
fn the_port_is_asked_to_announce_its_guest() {
    let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    let mut device = device(1);
    let ask = |device: &mut Device<_>, message| match device.handle(message) {
        Ok(Step::Announce {
            mac: asked,
            acknowledge,
        }) if asked == mac => acknowledge,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        ask(&mut device, asking(Request::SendRarp(mac))),
        None,
        "REPLY_ACK was not negotiated"
    );
    now(&mut device, Request::SetProtocolFeatures(1 << 2 | 1 << 3));
    assert_eq!(ask(&mut device, plain(Request::SendRarp(mac))), None);
    let message = asking(Request::SendRarp(mac));
    let code = message.code;
    assert_eq!(ask(&mut device, message), Some(code));
    // Running rings are left alone.
    start(&mut device, 0);
    ask(&mut device, plain(Request::SendRarp(mac)));
    assert!(view(&device, 0).started);
}

#[test]
fn packed_rings_have_rules_of_their_own() {
    let num = |size| Request::SetVringNum { ring: 0, size };
    let base = |base| Request::SetVringBase { ring: 0, base };
    let parts = |desc, avail, used| Request::SetVringAddr {
        ring: 0,
        flags: 0,
        addrs: RingAddrs { desc, avail, used },
    };
    let split = features::OFFERED & !features::RING_PACKED;
    let verdicts = |bits: Option<u64>, requests: Vec<Request>| {
        let mut device = device(1);
        if let Some(bits) = bits {
            now(&mut device, Request::SetFeatures(bits));
        }
        requests
            .into_iter()
            .map(|request| device.handle(plain(request)).is_ok())
            .collect::<Vec<_>>()
    };
    let requests = || {
        vec![
            num(255),
            num(0),
            num(32769),
            base(0x8003_8003),
            parts(16, 4, 8),
            parts(16, 2, 8),
            parts(16, 4, 2),
            parts(8, 4, 4),
        ]
    };
    // Before SET_FEATURES nobody knows: what may be right passes, and is checked when the ring starts.
    for (bits, expected) in [
        (
            Some(split),
            [false, false, false, false, true, true, false, false],
        ),
        (
            Some(features::OFFERED),
            [true, false, false, true, true, false, false, false],
        ),
        (None, [true, false, false, true, true, true, false, false]),
    ] {
        assert_eq!(verdicts(bits, requests()), expected, "{bits:x?}");
    }
}

#[test]
fn a_packed_base_has_32_bits_all_the_way_round() {
    let mut device = running();
    now_or_quiesce(
        &mut device,
        Request::SetVringBase {
            ring: 0,
            base: 0x8003_0002,
        },
    );
    assert_eq!(view(&device, 0).base, 0x8003_0002);
    let reply = quiesced(&mut device, Request::GetVringBase { ring: 0 }, &[0x0007_0007]);
    assert_eq!(reply, Some(Reply::vring_state(Code(11), 0, 0x0007_0007)));
    assert_eq!(view(&device, 0).told, 0x0007_0007);
    // Never set: the wrap counters of a new packed ring are 1, a split ring begins at 0.
    assert_eq!(view(&device, 1).base, 0x8000_8000);
    now(
        &mut device,
        Request::SetFeatures(features::OFFERED & !features::RING_PACKED),
    );
    assert_eq!(view(&device, 1).base, 0);
}

#[test]
fn bad_values_are_refused_and_change_nothing() {
    let misaligned = |desc, avail, used| Request::SetVringAddr {
        ring: 0,
        flags: 0,
        addrs: RingAddrs { desc, avail, used },
    };
    let bad = [
        Request::SetFeatures(1 << 26),
        Request::SetProtocolFeatures(1 << 9),
        Request::SetVringNum { ring: 0, size: 0 },
        Request::SetVringNum { ring: 0, size: 3 },
        Request::SetVringNum { ring: 0, size: 65536 },
        Request::SetVringNum { ring: 2, size: 256 },
        Request::SetVringNum {
            ring: 0x100,
            size: 256,
        },
        Request::SetVringNum {
            ring: u32::MAX,
            size: 256,
        },
        Request::SetVringBase { ring: 0, base: 65536 },
        Request::SetVringEnable { ring: 0, value: 2 },
        Request::SetVringEnable {
            ring: 0x1_0000,
            value: 1,
        },
        misaligned(8, 0, 0),
        misaligned(0, 1, 0),
        misaligned(0, 0, 2),
        Request::SetVringAddr {
            ring: 0,
            flags: 1,
            addrs: addrs(0),
        },
        Request::SetVringAddr {
            ring: 2,
            flags: 0,
            addrs: addrs(0),
        },
        Request::SetVringKick { ring: 2, fd: None },
        Request::SetVringCall {
            ring: 255,
            fd: Some(event()),
        },
        Request::SetVringErr { ring: 2, fd: None },
    ];
    let mut device = running();
    now_or_quiesce(
        &mut device,
        Request::SetFeatures(features::OFFERED & !features::RING_PACKED),
    );
    let before = format!("{:?}", device.rings().collect::<Vec<_>>());
    for request in bad {
        let name = format!("{request:?}");
        let step = device.handle(asking(request)).unwrap();
        let Step::Done {
            reply,
            changed: false,
        } = step
        else {
            panic!("{name}: {step:?}")
        };
        assert_eq!(number(reply), 1, "{name}");
        assert_eq!(
            format!("{:?}", device.rings().collect::<Vec<_>>()),
            before,
            "{name}"
        );
    }
}

#[test]
fn memory_is_replaced_added_and_removed() {
    let mut device = device(1);
    now(&mut device, Request::SetProtocolFeatures(1 << 15));
    let mut offset = region(0x1000, 0x1000);
    offset.mmap_offset = 0x3000;
    now(&mut device, Request::AddMemReg(region(0, 0x1000)));
    now(&mut device, Request::AddMemReg(offset));
    assert_eq!(device.mapped_memory().map(|memory| **memory), Some(2));
    let generation = device.memory_generation();
    let file = Arc::downgrade(&device.memory()[1].fd);
    let user = |guest: u64| guest + 0x7f00_0000_0000;
    for (guest_addr, user_addr, size) in [
        (0x1000, user(0x1000), 0x2000),
        (0x1000, user(0), 0x1000),
        (0x2000, user(0x1000), 0x1000),
    ] {
        assert!(
            device
                .handle(plain(Request::RemMemReg {
                    guest_addr,
                    user_addr,
                    size
                }))
                .is_err()
        );
    }
    assert_eq!(device.memory_generation(), generation);
    now(
        &mut device,
        Request::RemMemReg {
            guest_addr: 0x1000,
            user_addr: user(0x1000),
            size: 0x1000,
        },
    );
    assert_ne!(device.memory_generation(), generation);
    assert!(file.upgrade().is_none(), "its fd is closed");
    now(
        &mut device,
        Request::RemMemReg {
            guest_addr: 0,
            user_addr: user(0),
            size: 0x1000,
        },
    );
    assert!(device.mapped_memory().is_none() && device.memory().is_empty());
    now(&mut device, Request::SetMemTable(vec![region(0x5000, 0x1000)]));
    assert_eq!(device.memory()[0].guest_addr, 0x5000);
}

#[test]
fn memory_that_cannot_be_is_refused_and_the_old_table_stays() {
    let wrapping = |change: fn(&mut RegionSpec)| {
        let mut region = region(0x100_0000, 0x1000);
        change(&mut region);
        region
    };
    let bad: [fn() -> Request; 4] = [
        || Request::AddMemReg(region(0xf_f000, 0x2000)),
        || Request::AddMemReg(region(0x100_0000, 0)),
        || Request::SetMemTable(vec![region(0x3000, 0x1000), region(0x2000, 0x1001)]),
        || Request::AddMemReg(region(NO_MEMORY_AT, 0x1000)),
    ];
    let mut device = running();
    let generation = device.memory_generation();
    let wraps = [
        wrapping(|region| region.guest_addr = u64::MAX),
        wrapping(|region| region.user_addr = u64::MAX),
        wrapping(|region| region.mmap_offset = u64::MAX),
    ];
    for request in bad.iter().map(|bad| bad()).chain(wraps.map(Request::AddMemReg)) {
        let name = format!("{request:?}");
        let Step::Quiesce(pending) = device.handle(asking(request)).unwrap() else {
            panic!("{name}")
        };
        let Step::Done { reply, changed } = device.complete(pending).unwrap() else {
            panic!("{name}")
        };
        assert_eq!((number(reply), changed), (1, true), "{name}");
        assert_eq!(device.memory_generation(), generation);
        assert_eq!((device.memory().len(), device.memory()[0].size), (1, 0x10_0000));
        assert!(view(&device, 0).runnable);
    }
    let past_end = Request::AddMemReg(region(NO_MEMORY_AT, 0x1000));
    let Step::Quiesce(pending) = device.handle(plain(past_end)).unwrap() else {
        panic!()
    };
    let fault = device.complete(pending).unwrap_err();
    assert!(
        fault
            .to_string()
            .starts_with("request 37 (ADD_MEM_REG) gives memory that cannot be used: "),
        "{fault}"
    );
}

#[test]
fn memory_slots_run_out() {
    let mut device = device(1);
    now(&mut device, Request::SetProtocolFeatures(1 << 15));
    for slot in 0..509 {
        now(&mut device, Request::AddMemReg(region(slot * 4096, 4096)));
    }
    let fault = device
        .handle(plain(Request::AddMemReg(region(0x1000_0000, 4096))))
        .unwrap_err();
    assert!(fault.to_string().contains("all 509 slots are taken"), "{fault}");
}

#[test]
fn reset_forgets_everything() {
    let mut device = running();
    let ring = view(&device, 0);
    let fds = [
        Arc::downgrade(&ring.kick.unwrap()),
        Arc::downgrade(&ring.call.unwrap()),
    ];
    let file = Arc::downgrade(&device.memory()[0].fd);
    let generation = device.memory_generation();
    device.reset();
    assert!(fds.iter().all(|fd| fd.upgrade().is_none()) && file.upgrade().is_none());
    assert!(device.memory().is_empty() && device.mapped_memory().is_none() && device.features() == 0);
    assert_ne!(device.memory_generation(), generation);
    assert_eq!(device.rings().count(), 2);
    for ring in device.rings() {
        assert!(!ring.started && !ring.enabled && ring.size == 0 && ring.base == 0 && ring.addrs.is_none());
    }
    assert!(
        device.handle(plain(Request::GetMaxMemSlots)).is_err(),
        "protocol features are forgotten"
    );
}
