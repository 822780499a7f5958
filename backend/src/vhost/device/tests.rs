//! The state machine alone: messages in, steps out, no socket.

mod memory;
mod refusals;
mod rings;

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq as R;
use vmm_sys_util::eventfd::EventFd;

use super::super::vring::RingAddrs;
use super::*;

const NO_MEMORY_AT: u64 = 0xbad000;

/// Maps nothing; refuses one address.
#[derive(Default)]
struct FakeMap {
    /// Regions that it was asked to map so far.
    mapped: Cell<usize>,
}

impl MapMemory for FakeMap {
    /// The guest addresses.
    type Memory = Vec<u64>;

    fn map(&self, regions: &[RegionSpec]) -> Result<Arc<Vec<u64>>, GuestMemoryError> {
        assert!(!regions.is_empty());
        self.mapped.set(self.mapped.get() + regions.len());
        match regions.iter().find(|region| region.guest_addr == NO_MEMORY_AT) {
            Some(region) => Err(GuestMemoryError::PastEndOfFile {
                guest_addr: region.guest_addr,
                needed: region.size,
                actual: 0,
            }),
            None => Ok(Arc::new(regions.iter().map(|region| region.guest_addr).collect())),
        }
    }

    fn add(&self, memory: &Vec<u64>, region: &RegionSpec) -> Result<Arc<Vec<u64>>, GuestMemoryError> {
        let added = self.map(std::slice::from_ref(region))?;
        Ok(Arc::new([memory.as_slice(), &added].concat()))
    }

    fn remove(&self, memory: &Vec<u64>, guest_addr: u64, _: u64, _: u64) -> Arc<Vec<u64>> {
        let stays = |addr: &u64| *addr != guest_addr;
        Arc::new(memory.iter().copied().filter(stays).collect())
    }
}

fn device(pairs: u16) -> Device<FakeMap> {
    Device::with_mapper(
        DeviceConfig {
            max_queue_pairs: pairs,
            queue_num_as: QueueNum::Pairs,
        },
        FakeMap::default(),
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
        Step::Done { reply, changed, .. } => (reply, changed),
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
        Step::Done { reply, changed, .. } => {
            assert!(changed, "stopped rings must be started again");
            reply
        }
        other => panic!("{other:?}"),
    }
}

fn now_or_quiesce<M: MapMemory>(device: &mut Device<M>, request: Request) {
    if let Step::Quiesce(pending) = device.handle(plain(request)).unwrap() {
        let _ = device.complete(pending).unwrap();
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

/// Whether the same mappings are in use as before.
fn same_memory(device: &Device<FakeMap>, before: &Option<Arc<Vec<u64>>>) -> bool {
    device.memory.as_ref().map(Arc::as_ptr) == before.as_ref().map(Arc::as_ptr)
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
fn queue_num_counts_as_configured_and_within_the_limit() {
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
    assert_eq!(device(9999).rings().count(), 2 * usize::from(MAX_QUEUE_PAIRS));
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
fn reset_forgets_everything() {
    let mut device = running();
    let ring = view(&device, 0);
    let fds = [
        Arc::downgrade(&ring.kick.unwrap()),
        Arc::downgrade(&ring.call.unwrap()),
    ];
    let memory = Arc::downgrade(device.memory.as_ref().unwrap());
    device.reset();
    assert!(fds.iter().all(|fd| fd.upgrade().is_none()) && memory.upgrade().is_none());
    assert!(device.memory().is_empty() && device.memory.is_none() && device.features() == 0);
    assert_eq!(device.rings().count(), 2);
    for ring in device.rings() {
        assert!(!ring.started && !ring.enabled && ring.size == 0 && ring.base == 0 && ring.addrs.is_none());
    }
    assert!(
        device.handle(plain(Request::GetMaxMemSlots)).is_err(),
        "protocol features are forgotten"
    );
}
