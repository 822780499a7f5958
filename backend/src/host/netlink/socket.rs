//! A netlink socket: requests with their answers, and notifications.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::codec::{Message, Request, attributes, messages, text_of, u16_of, u32_at};

pub(super) const NLM_F_REQUEST: u16 = 0x1;
pub(super) const NLM_F_ACK: u16 = 0x4;
/// `NLM_F_ROOT | NLM_F_MATCH`
pub(super) const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// `GENL_ID_CTRL` and what is asked of it (linux/genetlink.h).
const GENL_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `struct genlmsghdr`
pub(super) const GENL_HEADER: usize = 4;

/// More than the kernel puts into one datagram of what is asked for here.
const BUFFER: usize = 64 * 1024;
/// The kernel answers at once or after it has got its RTNL lock; this long means that it never will.
const ANSWER_S: i64 = 10;
/// Datagrams looked at for one answer: a dump of thousands of interfaces.
const DATAGRAMS: usize = 4096;

pub(super) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// A socket for requests.
    pub(super) fn open(protocol: SockProtocol) -> io::Result<Netlink> {
        let netlink = Netlink::make(protocol, SockFlag::empty(), 0)?;
        setsockopt(&netlink.fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_S))?;
        Ok(netlink)
    }

    /// A non-blocking socket for the notifications of `groups` (a mask).
    pub(super) fn subscribe(protocol: SockProtocol, groups: u32) -> io::Result<Netlink> {
        Netlink::make(protocol, SockFlag::SOCK_NONBLOCK, groups)
    }

    fn make(protocol: SockProtocol, flags: SockFlag, groups: u32) -> io::Result<Netlink> {
        let flags = flags | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Netlink {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// One datagram from the kernel; what other processes send here is passed over.
    pub(super) fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            match recvfrom::<NetlinkAddr>(self.fd.as_raw_fd(), &mut self.buffer) {
                Ok((length, Some(sender))) if sender.pid() == 0 => {
                    return Ok(self.buffer.get(..length).unwrap_or_default());
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a request and gives each message of its answer to `each`.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(super) fn ask(&mut self, request: &Request, mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        send(self.fd.as_raw_fd(), &request.encode(sequence), MsgFlags::empty())?;
        for _ in 0..DATAGRAMS {
            for message in messages(self.receive()?) {
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        // A negative errno; 0 is the acknowledgement.
                        let code = u32_at(message.body, 0).map_or(0, u32::cast_signed);
                        return match code {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                        };
                    }
                    _ => each(message),
                }
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// The number of a generic netlink family.
    ///
    /// # Errors
    /// ENOENT: the kernel does not have it.
    pub(super) fn family(&mut self, name: &str) -> io::Result<u16> {
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        let request = generic(GENL_CTRL, CTRL_CMD_GETFAMILY).put(CTRL_ATTR_FAMILY_NAME, &text);
        let mut found = None;
        self.ask(&request, |message| {
            let all = attributes(message.body.get(GENL_HEADER..).unwrap_or_default());
            let is_this =
                |(kind, value): (u16, &[u8])| kind == CTRL_ATTR_FAMILY_NAME && text_of(value) == name;
            let id = |(kind, value)| (kind == CTRL_ATTR_FAMILY_ID).then(|| u16_of(value)).flatten();
            if attributes(message.body.get(GENL_HEADER..).unwrap_or_default()).any(is_this) {
                found = all.into_iter().find_map(id);
            }
        })?;
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A request to a generic netlink family, acknowledged.
pub(super) fn generic(family: u16, command: u8) -> Request {
    let version = 1;
    Request::new(family, NLM_F_REQUEST | NLM_F_ACK, &[command, version, 0, 0])
}
