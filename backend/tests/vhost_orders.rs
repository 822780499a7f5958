//! Front-ends that behave: QEMU's order of messages, and Cloud Hypervisor's by way of `vhost`'s own front-end.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, its helpers included"
)]

mod vhost_support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_support::{Port, event, memory, message, reply, send, state, words};
use vmm_sys_util::eventfd::EventFd;
use vnic_backend::vhost::QueueNum;
use vnic_backend::vhost::features::{MQ, OFFERED, PROTOCOL_FEATURES};

const USER: u64 = 0x7f12_3400_0000;

/// A scripted QEMU: sends a request, lets the port work, and reads the reply if there is one.
struct Qemu {
    port: Port,
    socket: UnixStream,
}

impl Qemu {
    fn new(pairs: u16) -> Qemu {
        let (port, socket) = Port::new(pairs, QueueNum::Pairs);
        Qemu { port, socket }
    }

    fn tell(&mut self, code: u32, payload: &[u8], fds: &[&OwnedFd]) {
        send(&self.socket, &message(code, 1, payload), fds);
        assert_eq!(self.port.turn().unwrap(), 1);
    }

    fn ask(&mut self, code: u32, payload: &[u8]) -> u64 {
        self.tell(code, payload, &[]);
        reply(&self.socket, code)
    }

    /// A request with need_reply.
    fn acked(&mut self, code: u32, payload: &[u8], fds: &[&OwnedFd]) -> u64 {
        send(&self.socket, &message(code, 9, payload), fds);
        assert_eq!(self.port.turn().unwrap(), 1);
        reply(&self.socket, code)
    }

    /// vhost_user_backend_init and vhost_dev_init of one queue pair's vhost_dev.
    fn init(&mut self, pair: u32) {
        assert_eq!(self.ask(1, &[]), OFFERED);
        let protocol = self.ask(15, &[]);
        self.tell(16, &words(&[protocol]), &[]);
        if pair == 0 {
            assert_eq!(self.ask(17, &[]), 2, "queue pairs");
        }
        assert_eq!(self.ask(36, &[]), 509);
        if pair == 0 {
            self.tell(3, &[], &[]);
        }
        assert_eq!(self.ask(1, &[]), OFFERED);
        for ring in [2 * pair, 2 * pair + 1] {
            self.tell(13, &words(&[ring.into()]), &[&event()]);
        }
    }

    /// vhost_dev_start of one queue pair.
    fn start(&mut self, pair: u32, base: u32) {
        self.tell(2, &words(&[OFFERED]), &[]);
        if pair == 0 && self.port.device.memory().is_empty() {
            for guest in [0, 0x1_0000_0000] {
                let region = words(&[0, guest, 0x8000_0000, USER + guest, guest]);
                assert_eq!(self.acked(37, &region, &[&memory()]), 0);
            }
        }
        for ring in [2 * pair, 2 * pair + 1] {
            self.tell(8, &state(ring, 256), &[]);
            self.tell(10, &state(ring, base), &[]);
            let at = USER + u64::from(ring) * 0x1_0000;
            let addr = [state(ring, 0), words(&[at, at + 0x2000, at + 0x1000, 0])].concat();
            self.tell(9, &addr, &[]);
            self.tell(12, &words(&[ring.into()]), &[&event()]);
            self.tell(13, &words(&[ring.into()]), &[&event()]);
        }
    }
}

#[test]
fn qemu_starts_stops_and_restarts_two_queue_pairs() {
    let mut qemu = Qemu::new(2);
    qemu.init(0);
    qemu.init(1);
    assert!(
        qemu.port
            .device
            .rings()
            .all(|ring| !ring.runnable && ring.call.is_some())
    );

    // Enabled before SET_FEATURES; newer QEMUs wait for the answer.
    for ring in [0, 1] {
        assert_eq!(qemu.acked(18, &state(ring, 1), &[]), 0);
    }
    qemu.start(0, 0);
    qemu.start(1, 0);
    let rings: Vec<_> = qemu
        .port
        .device
        .rings()
        .map(|ring| (ring.runnable, ring.enabled, ring.kick.is_some()))
        .collect();
    assert_eq!(
        rings,
        [
            (true, true, true),
            (true, true, true),
            (true, false, true),
            (true, false, true)
        ]
    );
    assert_eq!(qemu.port.ring(3).addrs.unwrap().avail, USER + 0x3_1000);
    assert_eq!(qemu.port.ring(3).size, 256);
    // Only the call fds that came after a ring's kick found it running.
    assert_eq!(qemu.port.quiesces, 4);

    // The guest turns on its second pair, then masks an interrupt.
    for ring in [2, 3] {
        assert_eq!(qemu.acked(18, &state(ring, 1), &[]), 0);
    }
    qemu.tell(13, &words(&[2]), &[&event()]);
    assert_eq!(qemu.port.quiesces, 7);
    assert!(qemu.port.device.rings().all(|ring| ring.runnable && ring.enabled));

    // Memory is hot-plugged and unplugged under running rings.
    let plugged = words(&[0, 0x10_0000_0000, 0x1000_0000, USER + 0x10_0000_0000, 0]);
    assert_eq!(qemu.acked(37, &plugged, &[&memory()]), 0);
    assert_eq!(qemu.port.device.memory().len(), 3);
    assert_eq!(qemu.acked(38, &plugged, &[]), 0);
    assert_eq!(
        qemu.acked(38, &plugged, &[]),
        1,
        "gone already, and the connection lives"
    );
    assert_eq!(qemu.port.device.memory().len(), 2);

    // The guest reboots: rings stop one by one, and start again from 0.
    for pair in [0, 1] {
        for ring in [2 * pair, 2 * pair + 1] {
            qemu.tell(18, &state(ring, 0), &[]);
            let answer = qemu.ask(11, &state(ring, 0));
            let [index, base] = [answer & 0xffff_ffff, answer >> 32];
            assert_eq!((index, base), (u64::from(ring), u64::from(qemu.port.quiesces)));
        }
    }
    assert!(
        qemu.port
            .device
            .rings()
            .all(|ring| !ring.started && !ring.enabled && ring.size == 256)
    );
    qemu.start(0, 0);
    assert!(qemu.port.ring(1).runnable && !qemu.port.ring(1).enabled && !qemu.port.ring(2).runnable);

    drop(qemu.socket);
    assert!(qemu.port.turn().unwrap_err().is_clean_close());
    qemu.port.device.reset();
    assert!(
        qemu.port
            .device
            .rings()
            .all(|ring| ring.kick.is_none() && ring.call.is_none())
    );
}

/// `vhost`'s front-end in Cloud Hypervisor's order; returns when it has closed its socket.
fn cloud_hypervisor(socket: UnixStream) {
    let mut vmm = Frontend::from_stream(socket, 2);
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap();
    assert_eq!(features, OFFERED);
    let protocol = vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol & !VhostUserProtocolFeatures::CONFIG)
        .unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(vmm.get_queue_num().unwrap(), 4, "rings");
    vmm.set_features(features & !MQ).unwrap();

    let file = memory();
    let region = |guest_phys_addr, memory_size| VhostUserMemoryRegionInfo {
        guest_phys_addr,
        memory_size,
        userspace_addr: USER + guest_phys_addr,
        mmap_offset: guest_phys_addr,
        mmap_handle: file.as_raw_fd(),
    };
    vmm.set_mem_table(&[region(0, 0x1000_0000), region(0x1_0000_0000, 0x1000_0000)])
        .unwrap();
    let [kick, call] = [
        EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        EventFd::new(libc::EFD_NONBLOCK).unwrap(),
    ];
    let at = |ring| USER + ring as u64 * 0x1_0000;
    for ring in 0..4 {
        vmm.set_vring_num(ring, 1024).unwrap();
        let config = VringConfigData {
            queue_max_size: 1024,
            queue_size: 1024,
            flags: 0,
            desc_table_addr: at(ring),
            used_ring_addr: at(ring) + 0x8000,
            avail_ring_addr: at(ring) + 0x4000,
            log_addr: None,
        };
        vmm.set_vring_addr(ring, &config).unwrap();
        vmm.set_vring_base(ring, 17).unwrap();
        vmm.set_vring_call(ring, &call).unwrap();
        vmm.set_vring_kick(ring, &kick).unwrap();
        vmm.set_vring_enable(ring, true).unwrap();
    }
    // Hotplug.
    assert_eq!(vmm.get_max_mem_slots().unwrap(), 509);
    vmm.add_mem_region(&region(0x2_0000_0000, 0x1000_0000)).unwrap();
    // Inside the one before, and not the same.
    vmm.add_mem_region(&region(0x2_0000_0000, 0x800_0000))
        .unwrap_err();
}

#[test]
fn cloud_hypervisor_starts_two_queue_pairs_and_survives_a_refusal() {
    let (mut port, socket) = Port::new(2, QueueNum::default());
    let front_end = thread::spawn(move || cloud_hypervisor(socket));
    let end = loop {
        // No timeout: what a front-end waits for is a reply, and what it leaves behind is a closed socket.
        poll(
            &mut [PollFd::new(port.connection.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )
        .unwrap();
        if let Err(fault) = port.turn() {
            break fault;
        }
    };
    front_end.join().unwrap();
    assert!(end.is_clean_close(), "{end}");
    assert_eq!(port.device.features(), OFFERED & !MQ);
    assert_ne!(port.device.features() & PROTOCOL_FEATURES, 0);
    assert_eq!(port.device.memory().len(), 3);
    for ring in port.device.rings() {
        assert!(ring.runnable && ring.enabled && ring.size == 1024);
        assert_eq!(
            ring.addrs.unwrap().used,
            USER + ring.index as u64 * 0x1_0000 + 0x8000
        );
    }
    // Each ring's enabling, and the addition of memory that was not refused, found rings running.
    assert_eq!(port.quiesces, 4 + 1);
}
