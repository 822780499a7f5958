//! The memory table.

use super::*;

#[test]
fn memory_is_replaced_added_and_removed() {
    let mut device = device(1);
    now(&mut device, Request::SetProtocolFeatures(1 << 15));
    let mut offset = region(0x1000, 0x1000);
    offset.mmap_offset = 0x3000;
    let file = Arc::downgrade(&offset.fd);
    now(&mut device, Request::AddMemReg(region(0, 0x1000)));
    now(&mut device, Request::AddMemReg(offset));
    assert_eq!(**device.memory.as_ref().unwrap(), [0, 0x1000]);
    assert!(file.upgrade().is_none(), "its fd is closed once it is mapped");
    // For another queue pair.
    now(&mut device, Request::AddMemReg(region(0, 0x1000)));
    assert_eq!(device.mapper.mapped.get(), 2, "each was mapped once");
    let before = device.memory.clone();
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
    assert!(same_memory(&device, &before));
    now(
        &mut device,
        Request::RemMemReg {
            guest_addr: 0x1000,
            user_addr: user(0x1000),
            size: 0x1000,
        },
    );
    assert!(!same_memory(&device, &before));
    for holders in [1, 0] {
        assert_eq!(**device.memory.as_ref().unwrap(), [0], "{holders}");
        now(
            &mut device,
            Request::RemMemReg {
                guest_addr: 0,
                user_addr: user(0),
                size: 0x1000,
            },
        );
    }
    assert_eq!(device.mapper.mapped.get(), 2, "what stays is not mapped anew");
    assert!(device.memory.is_none() && device.memory().is_empty());
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
    let bad: [fn() -> Request; 5] = [
        || Request::AddMemReg(region(0xf_f000, 0x2000)),
        || Request::AddMemReg(region(0x100_0000, 0)),
        || Request::SetMemTable(vec![region(0x3000, 0x1000), region(0x2000, 0x1001)]),
        || {
            Request::AddMemReg(RegionSpec {
                user_addr: 0x7f00_0000_0000,
                ..region(0x100_0000, 0x1000)
            })
        },
        || Request::RemMemReg {
            guest_addr: 0,
            user_addr: 0,
            size: 0x10_0000,
        },
    ];
    let mut device = running();
    let before = device.memory.clone();
    let wraps = [
        wrapping(|region| region.guest_addr = u64::MAX),
        wrapping(|region| region.user_addr = u64::MAX),
        wrapping(|region| region.mmap_offset = u64::MAX),
    ];
    for request in bad.iter().map(|bad| bad()).chain(wraps.map(Request::AddMemReg)) {
        let name = format!("{request:?}");
        // Before any ring is stopped.
        let Step::Done { reply, changed, .. } = device.handle(asking(request)).unwrap() else {
            panic!("{name}")
        };
        assert_eq!((number(reply), changed), (1, false), "{name}");
        assert!(same_memory(&device, &before));
        assert_eq!((device.memory().len(), device.memory()[0].size), (1, 0x10_0000));
        assert!(view(&device, 0).runnable);
    }
    let past_end = || Request::AddMemReg(region(NO_MEMORY_AT, 0x1000));
    let Step::Quiesce(pending) = device.handle(asking(past_end())).unwrap() else {
        panic!()
    };
    let Step::Done { reply, changed, .. } = device.complete(pending).unwrap() else {
        panic!()
    };
    assert_eq!((number(reply), changed), (1, true));
    assert!(same_memory(&device, &before));
    assert_eq!((device.memory().len(), device.memory()[0].size), (1, 0x10_0000));
    assert!(view(&device, 0).runnable);
    let Step::Quiesce(pending) = device.handle(plain(past_end())).unwrap() else {
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
