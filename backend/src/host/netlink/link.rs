//! Links (interfaces) as rtnetlink(7) shows them: all of them once, and every change.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::SockProtocol;
use vnic_lb::mac::Mac;

use super::codec::{Message, Request, attributes, text_of, u16_of, u32_at, u32_of};
use super::socket::{NLM_F_DUMP, NLM_F_REQUEST, Netlink};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
/// `RTMGRP_LINK`
const GROUP_LINK: u32 = 1;
/// `struct ifinfomsg`
const IFINFOMSG: usize = 16;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_PROMISCUITY: u16 = 30;
const IFLA_XDP: u16 = 43;
const IFLA_ALLMULTI: u16 = 61;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
/// Counters are not wanted.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

/// One interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `ARPHRD_*`
    pub arphrd: u16,
    /// `IFF_*`
    pub flags: u32,
    /// Its address, if that is an Ethernet one.
    pub mac: Option<Mac>,
    /// Bytes of the largest payload.
    pub mtu: u32,
    /// Index of the bridge, bond, team, ... that it belongs to.
    pub master: Option<u32>,
    /// What kind of virtual interface it is, such as `veth`; `None` for a real NIC.
    pub kind: Option<String>,
    /// How many ask for promiscuity.
    pub promiscuity: u32,
    /// How many ask for all multicast frames (0 also where the kernel, before 6.0, does not tell).
    pub allmulti: u32,
    /// The XDP program that is attached.
    pub xdp: Option<AttachedXdp>,
}

/// An XDP program on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachedXdp {
    /// `native`, `skb`, `hardware` or `several`.
    pub mode: &'static str,
    /// Its number, as bpftool shows it; 0 if there are several.
    pub program: u32,
}

/// What became of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is new, or something of it changed.
    Now(Link),
    /// The interface with this index is gone from this network namespace.
    Gone(u32),
    /// The kernel had more to say than fits the socket: ask for [`all`].
    Missed,
}

/// All links of this network namespace. Waits for the kernel's RTNL lock: not for a loop that must not.
///
/// # Errors
/// Those of the socket.
pub fn all() -> io::Result<Vec<Link>> {
    let request = Request::new(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, &[0; IFINFOMSG])
        .put(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    let mut links = Vec::new();
    Netlink::open(SockProtocol::NetlinkRoute)?.ask(&request, |message| {
        if let Some(LinkEvent::Now(link)) = event(message) {
            links.push(link);
        }
    })?;
    Ok(links)
}

/// Hears of every change of the links of one network namespace. Never blocks.
pub struct LinkWatch {
    socket: Netlink,
}

impl LinkWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn open() -> io::Result<LinkWatch> {
        Ok(LinkWatch {
            socket: Netlink::subscribe(SockProtocol::NetlinkRoute, GROUP_LINK)?,
        })
    }

    /// Takes up to `datagrams` (of one change each, as a rule) and appends what they say to `out`.
    ///
    /// # Errors
    /// Those of the socket; nothing to read is none.
    pub fn drain(&mut self, datagrams: usize, out: &mut Vec<LinkEvent>) -> io::Result<()> {
        for _ in 0..datagrams {
            match self.socket.receive() {
                Ok(bytes) => out.extend(super::codec::messages(bytes).filter_map(event)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => out.push(LinkEvent::Missed),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn event(message: Message<'_>) -> Option<LinkEvent> {
    let [family, ..] = *message.body else { return None };
    // Bridges speak of their ports with messages of the same type: a "deleted" there means "no longer a port".
    if i32::from(family) != libc::AF_UNSPEC {
        return None;
    }
    let index = u32_at(message.body, 4)?;
    match message.kind {
        RTM_NEWLINK => link(index, message.body).map(LinkEvent::Now),
        RTM_DELLINK => Some(LinkEvent::Gone(index)),
        _ => None,
    }
}

/// `None` for a message that tells only a part (wireless events are like that): all real ones have the MTU.
fn link(index: u32, body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index,
        arphrd: u16_of(body.get(2..4)?)?,
        flags: u32_at(body, 8)?,
        ..Link::default()
    };
    let mut whole = false;
    for (kind, value) in attributes(body.get(IFINFOMSG..)?) {
        let number = || u32_of(value).unwrap_or(0);
        match kind {
            IFLA_ADDRESS => link.mac = <[u8; 6]>::try_from(value).ok().map(Mac),
            IFLA_IFNAME => link.name = text_of(value),
            IFLA_MTU => {
                link.mtu = number();
                whole = true;
            }
            IFLA_MASTER => link.master = u32_of(value).filter(|master| *master != 0),
            IFLA_LINKINFO => {
                link.kind = attributes(value)
                    .find(|(kind, _)| *kind == IFLA_INFO_KIND)
                    .map(|(_, name)| text_of(name));
            }
            IFLA_PROMISCUITY => link.promiscuity = number(),
            IFLA_ALLMULTI => link.allmulti = number(),
            IFLA_XDP => link.xdp = attached(value),
            _ => {}
        }
    }
    whole.then_some(link)
}

fn attached(value: &[u8]) -> Option<AttachedXdp> {
    let number = |wanted: u16| {
        attributes(value)
            .find(|(kind, _)| *kind == wanted)
            .and_then(|(_, value)| u32_of(value))
    };
    let state = attributes(value)
        .find(|(kind, _)| *kind == IFLA_XDP_ATTACHED)
        .and_then(|(_, value)| value.first().copied())?;
    // XDP_ATTACHED_* (linux/if_link.h)
    let (mode, own) = match state {
        1 => ("native", IFLA_XDP_DRV_PROG_ID),
        2 => ("skb", IFLA_XDP_SKB_PROG_ID),
        3 => ("hardware", IFLA_XDP_HW_PROG_ID),
        4 => ("several", IFLA_XDP_PROG_ID),
        _ => return None,
    };
    Some(AttachedXdp {
        mode,
        program: number(IFLA_XDP_PROG_ID).or_else(|| number(own)).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, family: u8, index: u32, with_mtu: bool) -> Vec<u8> {
        let mut fixed = [0u8; IFINFOMSG];
        fixed[0] = family;
        fixed[2..4].copy_from_slice(&1u16.to_ne_bytes());
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        fixed[8..12].copy_from_slice(&0x1003u32.to_ne_bytes());
        let mut request = Request::new(kind, 0, &fixed)
            .put(IFLA_IFNAME, b"up0\0")
            .put(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .put(IFLA_MASTER, &9u32.to_ne_bytes())
            .nest(IFLA_LINKINFO, &[(IFLA_INFO_KIND, b"veth\0")])
            .nest(
                IFLA_XDP,
                &[
                    (IFLA_XDP_ATTACHED, &[1]),
                    (IFLA_XDP_PROG_ID, &77u32.to_ne_bytes()),
                ],
            );
        if with_mtu {
            request = request.put(IFLA_MTU, &1400u32.to_ne_bytes());
        }
        request.encode(0)
    }

    fn only(bytes: &[u8]) -> Option<LinkEvent> {
        super::super::codec::messages(bytes).find_map(event)
    }

    #[test]
    fn a_link_is_read_and_a_partial_or_a_bridges_message_is_not() {
        let Some(LinkEvent::Now(link)) = only(&message(RTM_NEWLINK, 0, 4, true)) else {
            panic!("a link")
        };
        assert_eq!((link.index, link.name.as_str(), link.mtu), (4, "up0", 1400));
        assert_eq!((link.master, link.kind.as_deref()), (Some(9), Some("veth")));
        assert_eq!(link.mac, Some(Mac([2, 0, 0, 0, 0, 1])));
        let xdp = AttachedXdp {
            mode: "native",
            program: 77,
        };
        assert_eq!(link.xdp, Some(xdp));
        assert_eq!(only(&message(RTM_NEWLINK, 0, 4, false)), None);
        assert_eq!(only(&message(RTM_DELLINK, 0, 4, false)), Some(LinkEvent::Gone(4)));
        let bridge = u8::try_from(libc::AF_BRIDGE).unwrap();
        assert_eq!(only(&message(RTM_DELLINK, bridge, 4, true)), None);
    }

    #[test]
    fn loopback_is_listed() {
        let links = all().unwrap();
        assert!(
            links.iter().any(|link| link.name == "lo" && link.index == 1),
            "{links:?}"
        );
    }
}
