//! What is refused, and how the front-end hears of it.

use super::*;

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
        refused: Some(refused),
    } = device.handle(asking(bad())).unwrap()
    else {
        panic!()
    };
    assert_eq!(number(reply), 1);
    let text = refused.to_string();
    assert!(text.contains("sets a queue size of 40000"), "{text}");
    assert_eq!(view(&device, 0).size, 0);
    let good = asking(Request::SetVringNum { ring: 0, size: 32768 });
    let Step::Done { reply, refused, .. } = device.handle(good).unwrap() else {
        panic!()
    };
    assert_eq!(number(reply), 0);
    assert!(refused.is_none());
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
            refused: Some(_),
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
