//! A network namespace with a pair of veths, and a packet socket on one end.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use vnic_lb::mac::Mac;

/// The end that is driven by AF_XDP.
pub const NIC: &str = "nic";
/// The other end.
pub const PEER: &str = "peer";
/// The address that the NIC's end has for the host.
pub const HOST: Mac = Mac([0x02, 0, 0, 0, 0, 0x01]);
/// A guest's address.
pub const GUEST: Mac = Mac([0x52, 0x54, 0, 0, 0, 0x07]);
/// The peer's address.
pub const FAR: Mac = Mac([0x02, 0, 0, 0, 0, 0x02]);
/// An ethertype for experiments, which nothing else in a namespace sends (IEEE 802, local experimental 1).
pub const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

/// How long to wait for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test on a thread in a network namespace of its own with both veths up. The namespace has no name and goes with its last
/// thread, process and socket, whatever happens.
pub fn in_namespace(queues: u32, test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
        let (queues, mtu) = (queues.to_string(), "9100");
        ip(&[
            "link",
            "add",
            NIC,
            "address",
            &HOST.to_string(),
            "mtu",
            mtu,
            "numrxqueues",
            &queues,
            "numtxqueues",
            &queues,
            "type",
            "veth",
            "peer",
            "name",
            PEER,
            "address",
            &FAR.to_string(),
            "mtu",
            mtu,
            "numrxqueues",
            &queues,
            "numtxqueues",
            &queues,
        ]);
        for device in [NIC, PEER] {
            ip(&["link", "set", device, "up"]);
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs ip(8) in this thread's namespace.
pub fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("iproute2 is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An interface's index in this thread's namespace.
pub fn index(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

/// Calls until it gives something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A frame of `len` bytes with a recognisable content.
pub fn frame(to: Mac, from: Mac, len: usize) -> Vec<u8> {
    let mut bytes = [&to.0[..], &from.0, &EXPERIMENTAL].concat();
    bytes.extend((0..=250).cycle().take(len - bytes.len()));
    bytes
}

/// A packet socket that sends and receives whole frames on one interface.
pub struct Station {
    fd: OwnedFd,
}

impl Station {
    pub fn on(device: &str) -> Station {
        let all = libc::ETH_P_ALL as u16;
        // SAFETY: no memory involved.
        let raw = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            )
        };
        assert!(raw >= 0, "{}", io::Error::last_os_error());
        // SAFETY: just made, known to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let one: libc::c_int = 1;
        // SAFETY: the kernel reads the four bytes of `one`.
        let done = unsafe {
            libc::setsockopt(
                raw,
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const one).cast(),
                4,
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: all.to_be(),
            sll_ifindex: index(device) as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the kernel reads one sockaddr_ll.
        let done = unsafe {
            libc::bind(
                raw,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        Station { fd }
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.fd, frame).unwrap(), frame.len());
    }

    /// The next frame of the experimental type.
    pub fn receive(&self) -> Vec<u8> {
        until("a frame on the wire", || self.try_receive())
    }

    pub fn try_receive(&self) -> Option<Vec<u8>> {
        let mut ready = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::from(10u8)).unwrap();
        loop {
            let mut buffer = vec![0; 16_384];
            let len = match nix::unistd::read(&self.fd, &mut buffer) {
                Ok(len) => len,
                Err(nix::errno::Errno::EAGAIN) => return None,
                Err(error) => panic!("{error}"),
            };
            buffer.truncate(len);
            if buffer.get(12..14) == Some(&EXPERIMENTAL) {
                return Some(buffer);
            }
        }
    }
}
