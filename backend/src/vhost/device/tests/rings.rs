//! Rings start, run and stop, and what they use is changed only while they stand still.

use super::*;

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
        let memory = device.memory.clone();
        let Step::Quiesce(pending) = device.handle(plain(request())).unwrap() else {
            panic!("{:?}: no quiesce", request());
        };
        assert_eq!(
            format!("{:?}", device.rings().collect::<Vec<_>>()),
            before,
            "changed too early"
        );
        assert!(same_memory(&device, &memory));
        device.set_base(0, 77);
        assert!(matches!(
            device.complete(pending).unwrap(),
            Step::Done { changed: true, .. }
        ));
        let after = format!("{:?}", device.rings().collect::<Vec<_>>());
        assert!(
            after != before || !same_memory(&device, &memory),
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
