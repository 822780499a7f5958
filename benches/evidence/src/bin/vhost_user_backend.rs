//! ADR 0002: what `vhost-user-backend` 0.24 does with an established connection, a packed ring's base, an inflight
//! region, a replaced kick descriptor.

use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::*;
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::EventFd;
use vnic_evidence::{Claims, message, send, vring_state};

const FEATURES: u64 = 1 << 32 | 1 << 30;

/// A device that counts the kicks it is told of.
struct Device {
    kicks: Arc<AtomicU32>,
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }
    fn max_queue_size(&self) -> usize {
        256
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }
    // Without one, dropping the daemon object waits for its ring thread for ever.
    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }
    fn set_event_idx(&mut self, _: bool) {}
    fn update_memory(&mut self, _: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        Ok(())
    }
    fn handle_event(&mut self, _: u16, _: EventSet, _: &[VringRwLock], _: usize) -> std::io::Result<()> {
        self.kicks.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

struct Rig {
    daemon: VhostUserDaemon<Arc<RwLock<Device>>>,
    listener: Listener,
    path: std::path::PathBuf,
    kicks: Arc<AtomicU32>,
}

impl Rig {
    fn new(name: &str) -> Rig {
        let path = std::env::temp_dir().join(format!("vnic-evidence-{}-{name}.sock", std::process::id()));
        let kicks = Arc::new(AtomicU32::new(0));
        let device = Arc::new(RwLock::new(Device { kicks: kicks.clone() }));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        Rig {
            daemon: VhostUserDaemon::new(name.to_owned(), device, memory).expect("a daemon object"),
            listener: Listener::new(&path, true).expect("a socket in the temporary folder"),
            path,
            kicks,
        }
    }

    /// Connects a raw peer and starts the daemon on the connection.
    fn connect(&mut self) -> UnixStream {
        let peer = UnixStream::connect(&self.path).expect("the listener is there");
        self.daemon.start(&mut self.listener).expect("a daemon thread");
        peer
    }

    /// Whether the kick count passes `before` within a second.
    fn kicked_since(&self, before: u32) -> bool {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if self.kicks.load(Ordering::Acquire) > before {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

/// The opening that every case shares.
fn open(front: &mut Frontend) -> vhost::Result<()> {
    front.set_owner()?;
    front.get_features()?;
    let offered = front.get_protocol_features()?;
    front.set_protocol_features(offered)?;
    front.set_features(FEATURES)
}

/// Two front-ends, one after the other: did each get the features, and how did the daemon's thread end.
fn one_connection() -> [(bool, String); 2] {
    let mut rig = Rig::new("connections");
    let mut visit = || {
        let front = Frontend::from_stream(rig.connect(), 2);
        let served = front.set_owner().is_ok() && front.get_features().is_ok();
        drop(front);
        (served, format!("{:?}", rig.daemon.wait()))
    };
    [visit(), visit()]
}

fn packed_base() -> vhost::Result<u32> {
    let mut rig = Rig::new("base");
    let mut raw = rig.connect();
    let mut front = Frontend::from_stream(raw.try_clone().expect("dup"), 2);
    open(&mut front)?;
    // Frontend::set_vring_base takes a u16; the protocol's field has 32 bits.
    send(
        &mut raw,
        &message(FrontendReq::SET_VRING_BASE, 0, &vring_state(0, 0x8123_8045)),
    );
    front.get_vring_base(0)
}

fn inflight() -> Result<(), String> {
    let mut rig = Rig::new("inflight");
    let mut front = Frontend::from_stream(rig.connect(), 2);
    open(&mut front).map_err(|error| format!("the opening failed: {error:?}"))?;
    let asked = VhostUserInflight {
        mmap_size: 0,
        mmap_offset: 0,
        num_queues: 2,
        queue_size: 256,
    };
    let answer = front.get_inflight_fd(&asked).map(drop);
    drop(front);
    let daemon = rig.daemon.wait();
    answer.map_err(|error| format!("front-end: {error:?}; daemon: {daemon:?}"))
}

/// Whether a kick is seen by the first descriptor, and by the one that replaced it.
fn replaced_kick() -> vhost::Result<(bool, bool)> {
    let mut rig = Rig::new("kick");
    let mut front = Frontend::from_stream(rig.connect(), 2);
    open(&mut front)?;
    let file = vmm_sys_util::tempfile::TempFile::new()
        .expect("a temporary file")
        .into_file();
    file.set_len(0x10000).expect("room for a temporary file");
    let range = (GuestAddress(0), 0x10000, Some(FileOffset::new(file, 0)));
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files([range]).expect("a 64 KiB mapping");
    let region = memory.iter().next().expect("one region was asked for");
    let base = VhostUserMemoryRegionInfo::from_guest_region(region)?;
    assert_eq!(region.len(), base.memory_size);
    front.set_mem_table(&[base])?;
    front.set_vring_num(0, 256)?;
    let at = |offset| base.userspace_addr + offset;
    let rings = VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: at(0),
        avail_ring_addr: at(0x1000),
        used_ring_addr: at(0x2000),
        log_addr: None,
    };
    front.set_vring_addr(0, &rings)?;
    front.set_vring_base(0, 0)?;
    let (call, first, second) = (EventFd::new(0), EventFd::new(0), EventFd::new(0));
    let (call, first, second) = (call.expect("fd"), first.expect("fd"), second.expect("fd"));
    front.set_vring_call(0, &call)?;
    front.set_vring_kick(0, &first)?;
    front.set_vring_enable(0, true)?;
    // GET_FEATURES has an answer: when it is there, what was sent before has been handled.
    front.get_features()?;
    let before = rig.kicks.load(Ordering::Acquire);
    first.write(1).expect("an eventfd takes a 1");
    let seen_first = rig.kicked_since(before);
    front.set_vring_kick(0, &second)?;
    front.get_features()?;
    let before = rig.kicks.load(Ordering::Acquire);
    second.write(1).expect("an eventfd takes a 1");
    let seen_second = rig.kicked_since(before);
    Ok((seen_first, seen_second))
}

fn main() -> ExitCode {
    let mut claims = Claims::default();

    let [first, second] = one_connection();
    let holds = first.0 && !second.0;
    let seen = format!("(served, how its thread ended): first {first:?}, second {second:?}");
    claims.check("a daemon object serves one connection", holds, seen);

    let base = packed_base();
    claims.check(
        "SET_VRING_BASE keeps 16 of 32 bits (a packed ring has 32)",
        matches!(base, Ok(0x8045)),
        format!("set 0x81238045, got {:#x}", base.unwrap_or(0)),
    );

    let inflight = inflight();
    claims.check(
        "GET_INFLIGHT_FD is refused and ends the connection, though the device offers INFLIGHT_SHMFD",
        inflight.is_err(),
        format!("{inflight:?}"),
    );

    let kicks = replaced_kick();
    claims.check(
        "a kick descriptor that replaces another on a running ring is not listened to",
        matches!(kicks, Ok((true, false))),
        format!("(first seen, second seen) = {kicks:?}"),
    );

    claims.exit()
}
