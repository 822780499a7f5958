//! A device over guest memory that is really mapped.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vnic_backend::vhost::features::{EVENT_IDX, OFFERED};
use vnic_backend::vhost::message::{Code, Request};
use vnic_backend::vhost::{Device, DeviceConfig, Message, QueueNum, RingAddrs, Step};
use vnic_dataplane::memory::guest::RegionSpec;

const USER: u64 = 0x7f00_0000_0000;
const SIZE: u64 = 1 << 20;

/// A region of a file that is `file_size` bytes long.
fn region(guest_addr: u64, file_size: u64) -> RegionSpec {
    let fd: OwnedFd = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(file_size).expect("room");
    RegionSpec {
        guest_addr,
        user_addr: USER + guest_addr,
        size: SIZE,
        mmap_offset: 0,
        fd: Arc::new(file.into()),
    }
}

/// Sends a request with need_reply, quiescing if that is asked for; gives the error it is answered with, 0 for none.
fn request(device: &mut Device, code: u32, request: Request) -> u64 {
    let message = Message {
        code: Code(code),
        need_reply: true,
        request,
    };
    let step = match device.handle(message).expect("no fault") {
        Step::Quiesce(pending) => device.complete(pending).expect("no fault"),
        step => step,
    };
    let Step::Done {
        reply: Some(reply), ..
    } = step
    else {
        panic!("no reply: {step:?}")
    };
    u64::from_ne_bytes(reply.encode()[12..].try_into().expect("8 bytes"))
}

#[test]
fn a_ring_of_mapped_memory_can_be_run() {
    let mut device = Device::new(DeviceConfig {
        max_queue_pairs: 1,
        queue_num_as: QueueNum::Pairs,
    });
    let addrs = RingAddrs {
        desc: USER,
        avail: USER + 0x1000,
        used: USER + 0x2000,
    };
    let setup = [
        (16, Request::SetProtocolFeatures(1 << 3 | 1 << 15)),
        (2, Request::SetFeatures(OFFERED & !EVENT_IDX)),
        (8, Request::SetVringNum { ring: 1, size: 256 }),
        (10, Request::SetVringBase { ring: 1, base: 7 }),
        (
            9,
            Request::SetVringAddr {
                ring: 1,
                flags: 0,
                addrs,
            },
        ),
        (12, Request::SetVringKick { ring: 1, fd: None }),
    ];
    for (code, setup) in setup {
        assert_eq!(request(&mut device, code, setup), 0);
    }
    assert!(device.ring_spec(1).is_none(), "no memory");
    assert_eq!(
        request(&mut device, 37, Request::AddMemReg(region(0, SIZE - 1))),
        1,
        "past the end of its file"
    );
    assert!(device.ring_spec(1).is_none());
    assert_eq!(
        request(&mut device, 5, Request::SetMemTable(vec![region(0, SIZE)])),
        0
    );
    let more = region(SIZE, SIZE);
    let file = Arc::downgrade(&more.fd);
    assert_eq!(request(&mut device, 37, Request::AddMemReg(more)), 0);
    assert!(file.upgrade().is_none(), "closed once it is mapped");
    let last = Request::RemMemReg {
        guest_addr: SIZE,
        user_addr: USER + SIZE,
        size: SIZE,
    };
    assert_eq!(request(&mut device, 38, last), 0);
    assert_eq!(device.memory().len(), 1);

    assert!(device.ring_spec(0).is_none() && device.ring_spec(2).is_none());
    let spec = device.ring_spec(1).expect("a runnable ring");
    assert_eq!((spec.size, spec.base, spec.packed), (256, 7, true));
    assert_eq!(
        [spec.desc_addr, spec.avail_addr, spec.used_addr],
        [addrs.desc, addrs.avail, addrs.used]
    );
    assert_eq!(
        [spec.event_idx, spec.indirect, spec.mergeable, spec.version_1],
        [false, true, true, true]
    );
    assert!(spec.call.is_none());
    // What runs the ring keeps the memory mapped that the front-end, gone by now, had shared.
    device.reset();
    assert!(device.ring_spec(1).is_none() && device.memory().is_empty());
    assert_eq!(Arc::strong_count(&spec.memory), 1);
}
