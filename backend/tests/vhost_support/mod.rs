//! Both ends of a vhost-user socket for the tests: a port as the daemon's event loop drives it, and a front-end that sends
//! whatever it is told to.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vnic_backend::vhost::{
    Connection, Device, DeviceConfig, Fault, MapMemory, QueueNum, Reply, RingView, Step,
};
use vnic_dataplane::memory::guest::{GuestMemoryError, RegionSpec};

/// Maps nothing, and counts how many regions it was asked to.
pub struct FakeMap;

impl MapMemory for FakeMap {
    type Memory = usize;

    fn map(&self, regions: &[RegionSpec]) -> Result<Arc<usize>, GuestMemoryError> {
        Ok(Arc::new(regions.len()))
    }

    fn add(&self, memory: &usize, _: &RegionSpec) -> Result<Arc<usize>, GuestMemoryError> {
        Ok(Arc::new(memory + 1))
    }

    fn remove(&self, memory: &usize, _: u64, _: u64, _: u64) -> Arc<usize> {
        Arc::new(memory - 1)
    }
}

/// One port and its connection.
pub struct Port {
    pub connection: Connection,
    pub device: Device<FakeMap>,
    /// Quiesces so far; also the position that rings are said to have reached.
    pub quiesces: u32,
}

impl Port {
    /// A port of `pairs` queue pairs and the other end of its socket.
    pub fn new(pairs: u16, queue_num_as: QueueNum) -> (Port, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let config = DeviceConfig {
            max_queue_pairs: pairs,
            queue_num_as,
        };
        let device = Device::with_mapper(config, FakeMap);
        (
            Port {
                connection: Connection::new(ours).expect("a connection"),
                device,
                quiesces: 0,
            },
            theirs,
        )
    }

    /// Handles all that has arrived, as the daemon does; gives how many messages that were.
    pub fn turn(&mut self) -> Result<usize, Fault> {
        self.connection.flush()?;
        let mut handled = 0;
        while let Some(message) = self.connection.poll_message()? {
            handled += 1;
            let step = match self.device.handle(message)? {
                Step::Quiesce(pending) => {
                    self.quiesces += 1;
                    let running = self
                        .device
                        .rings()
                        .filter(|ring| ring.runnable)
                        .map(|ring| ring.index);
                    for ring in running.collect::<Vec<_>>() {
                        self.device.set_base(ring, self.quiesces);
                    }
                    self.device.complete(pending)?
                }
                step => step,
            };
            match step {
                Step::Done {
                    reply: Some(reply), ..
                } => self.connection.send(reply)?,
                Step::Done { reply: None, .. }
                | Step::Announce {
                    acknowledge: None, ..
                } => {}
                Step::Announce {
                    acknowledge: Some(code),
                    ..
                } => self.connection.send(Reply::number(code, 0))?,
                Step::Quiesce(_) => panic!("complete() asks for another quiesce"),
            }
        }
        Ok(handled)
    }

    pub fn ring(&self, index: usize) -> RingView<'_> {
        self.device.rings().nth(index).expect("a ring of that index")
    }
}

/// A message's bytes.
pub fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("a small payload");
    [code, flags, size]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .chain(payload.iter().copied())
        .collect()
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// An eventfd as a front-end makes it.
pub fn event() -> OwnedFd {
    nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_CLOEXEC)
        .expect("an eventfd")
        .into()
}

/// A file of guest memory, empty: nothing maps it here.
pub fn memory() -> OwnedFd {
    nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd")
}

/// Sends bytes, with fds on the first of them.
pub fn send(front_end: &UnixStream, bytes: &[u8], fds: &[&OwnedFd]) {
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let sent = front_end
        .send_with_fds(&[bytes], &raw)
        .expect("room in the socket");
    (&*front_end)
        .write_all(&bytes[sent..])
        .expect("room in the socket");
}

/// Reads the reply to a request that has one, which must be there already.
pub fn reply(front_end: &UnixStream, code: u32) -> u64 {
    front_end.set_nonblocking(true).expect("a socket");
    let mut bytes = [0; 20];
    (&*front_end).read_exact(&mut bytes).expect("a reply");
    assert_eq!(
        bytes[..12],
        message(code, 5, &[0; 8])[..12],
        "not the reply to {code}"
    );
    u64::from_ne_bytes(bytes[12..].try_into().expect("8 bytes"))
}
