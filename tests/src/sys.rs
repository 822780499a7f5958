//! The few kernel interfaces of the fixtures that have no safe wrapper: packet sockets, TAP devices, link state.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Bytes of `struct virtio_net_hdr`, which PACKET_VNET_HDR puts before each frame.
const VNET_HDR_LEN: usize = 10;
/// Its flag that says that the checksum is still to be completed (virtio 1.3, 5.1.6).
const VNET_HDR_F_NEEDS_CSUM: u8 = 1;
/// The EtherType of an 802.1Q tag.
const ETHERTYPE_VLAN: u16 = 0x8100;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn socket_length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("socket structures are small")
}

fn set_option<T: Copy>(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> io::Result<()> {
    // SAFETY: `value` lives through the call and its exact size is given; the kernel only reads it.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            socket_length::<T>(),
        )
    })?;
    Ok(())
}

fn interface_request(interface: &str) -> io::Result<libc::ifreq> {
    let name = CString::new(interface)?;
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {interface} is too long"),
        ));
    }
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Ok(request)
}

/// A non-blocking raw packet socket on one interface. Received frames are made whole: partial checksums are completed
/// and a VLAN tag that the kernel took away is put back. Frames that this host sends on the interface are not seen.
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens a promiscuous socket on `interface`, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The system call that failed; CAP_NET_RAW is needed.
    pub fn open(interface: &str) -> io::Result<PacketSocket> {
        let index = libc::c_int::try_from(nix::net::if_::if_nametoindex(interface)?)
            .map_err(|_| io::Error::other("interface index out of range"))?;
        // Protocol 0 receives nothing until bind() names interface and protocol together.
        // SAFETY: a plain system call; the result is checked and owned at once.
        let fd = unsafe {
            let raw = check(libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            ))?;
            OwnedFd::from_raw_fd(raw)
        };
        set_option(
            &fd,
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            1 as libc::c_int,
        )?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1 as libc::c_int)?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1 as libc::c_int)?;
        // A burst must wait in the socket rather than be lost, so that loss in a test is never the fixture's.
        let buffer: libc::c_int = 16 << 20;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, buffer)?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, buffer)?;

        // SAFETY: both are plain data for which all zeroes is valid.
        let (mut address, mut membership): (libc::sockaddr_ll, libc::packet_mreq) =
            unsafe { (zeroed(), zeroed()) };
        address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).expect("AF_PACKET is 17");
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).expect("ETH_P_ALL is 3").to_be();
        address.sll_ifindex = index;
        // SAFETY: `address` is a whole sockaddr_ll and outlives the call.
        check(unsafe {
            libc::bind(
                fd.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                socket_length::<libc::sockaddr_ll>(),
            )
        })?;
        membership.mr_ifindex = index;
        membership.mr_type = u16::try_from(libc::PACKET_MR_PROMISC).expect("PACKET_MR_PROMISC is 1");
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, membership)?;
        Ok(PacketSocket { fd })
    }

    /// Receives one frame into `buffer` and returns its length, or `None` if there is none now.
    ///
    /// # Errors
    /// ENETDOWN once after the interface went down; other errors of recvmsg(2).
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut header = [0u8; VNET_HDR_LEN];
        let mut control = [0u64; 16];
        // Room for a VLAN tag that is put back.
        let room = buffer.len().saturating_sub(4);
        let mut vectors = [
            libc::iovec {
                iov_base: header.as_mut_ptr().cast(),
                iov_len: header.len(),
            },
            libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: room,
            },
        ];
        // SAFETY: msghdr is plain data; every pointer put into it below is to a live, large enough buffer.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: `message` describes buffers that live through the call and are not otherwise used meanwhile.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, 0) };
        let Ok(received) = usize::try_from(received) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock {
                Ok(None)
            } else {
                Err(error)
            };
        };
        let mut length = received.saturating_sub(VNET_HDR_LEN).min(room);
        if header[0] & VNET_HDR_F_NEEDS_CSUM != 0 {
            let start = u16::from_ne_bytes([header[6], header[7]]);
            let offset = u16::from_ne_bytes([header[8], header[9]]);
            complete_checksum(&mut buffer[..length], usize::from(start), usize::from(offset));
        }
        if let Some(tag) = vlan_tag(&message)
            && length >= 12
        {
            buffer.copy_within(12..length, 16);
            buffer[12..14].copy_from_slice(&tag.0.to_be_bytes());
            buffer[14..16].copy_from_slice(&tag.1.to_be_bytes());
            length += 4;
        }
        Ok(Some(length))
    }

    /// Sends one whole frame.
    ///
    /// # Errors
    /// ENETDOWN if the interface is down; other errors of writev(2).
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let header = [0u8; VNET_HDR_LEN];
        nix::sys::uio::writev(&self.fd, &[io::IoSlice::new(&header), io::IoSlice::new(frame)])?;
        Ok(())
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The tag (TPID, TCI) that the kernel took out of a received frame.
fn vlan_tag(message: &libc::msghdr) -> Option<(u16, u16)> {
    // SAFETY: the kernel filled `message`'s control buffer, and CMSG_FIRSTHDR checks its length.
    let control = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if control.cmsg_level != libc::SOL_PACKET || control.cmsg_type != libc::PACKET_AUXDATA {
        return None;
    }
    // SAFETY: a PACKET_AUXDATA message carries one tpacket_auxdata; read_unaligned asks for no alignment.
    let auxiliary = unsafe {
        libc::CMSG_DATA(control)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    if auxiliary.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = if auxiliary.tp_status & libc::TP_STATUS_VLAN_TPID_VALID == 0 {
        ETHERTYPE_VLAN
    } else {
        auxiliary.tp_vlan_tpid
    };
    Some((tpid, auxiliary.tp_vlan_tci))
}

/// Completes a checksum of which the pseudo-header's part is already in the field.
fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) {
    let field = start + offset;
    if field + 2 > frame.len() {
        return;
    }
    let mut sum = 0u64;
    for pair in frame[start..].chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let folded = !u16::try_from(sum).expect("folded to 16 bits");
    // In UDP zero means "no checksum" (RFC 768), and for TCP both forms of zero are equal.
    let folded = if folded == 0 { 0xffff } else { folded };
    frame[field..field + 2].copy_from_slice(&folded.to_be_bytes());
}

/// Opens a TAP interface without offloads, non-blocking, in the calling thread's network namespace.
///
/// # Errors
/// No /dev/net/tun, no CAP_NET_ADMIN, or the name is taken.
pub fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI).expect("both flags are small");
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file)
}

/// Gives a TAP device a carrier or takes it away, as a cable does.
///
/// # Errors
/// Those of TUNSETCARRIER (Linux 5.0).
pub fn set_tap_carrier(tap: &File, up: bool) -> io::Result<()> {
    /// `TUNSETCARRIER` of linux/if_tun.h: `_IOW('T', 226, int)`.
    const TUNSETCARRIER: libc::Ioctl = 0x4004_54e2;
    let carrier = libc::c_int::from(up);
    // SAFETY: the kernel reads one int, which lives across the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETCARRIER, &raw const carrier) })?;
    Ok(())
}

/// Asks for the link state of interfaces in the network namespace in which it was opened.
pub struct LinkProbe {
    socket: OwnedFd,
}

impl LinkProbe {
    /// Opens a probe in the calling thread's network namespace.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<LinkProbe> {
        // SAFETY: a plain system call; the result is checked and owned at once.
        let socket = unsafe {
            OwnedFd::from_raw_fd(check(libc::socket(
                libc::AF_INET,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
                0,
            ))?)
        };
        Ok(LinkProbe { socket })
    }

    /// Whether the interface is up and has carrier.
    ///
    /// # Errors
    /// ENODEV if it is gone.
    pub fn is_up(&self, interface: &str) -> io::Result<bool> {
        let mut request = interface_request(interface)?;
        // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
        // SAFETY: SIOCGIFFLAGS filled the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_UP == 0 {
            return Ok(false);
        }
        // IFF_RUNNING follows the carrier up to a second late; ETHTOOL_GLINK reads the carrier itself.
        const ETHTOOL_GLINK: u32 = 0xa;
        let mut value = [ETHTOOL_GLINK, 0];
        let mut request = interface_request(interface)?;
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        // SAFETY: ETHTOOL_GLINK reads and writes one ethtool_value (two u32), which lives through the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) })?;
        Ok(value[1] != 0)
    }

    /// Sets the number of combined channels (queue pairs in use) of an interface, as `ethtool -L` does.
    ///
    /// # Errors
    /// EINVAL beyond the device's maximum; EOPNOTSUPP if the driver cannot.
    pub fn set_combined_channels(&self, interface: &str, combined: u32) -> io::Result<()> {
        const ETHTOOL_GCHANNELS: u32 = 0x3c;
        const ETHTOOL_SCHANNELS: u32 = 0x3d;
        // struct ethtool_channels: cmd, max_{rx,tx,other,combined}, {rx,tx,other,combined}_count.
        let mut channels = [0u32; 9];
        for operation in [ETHTOOL_GCHANNELS, ETHTOOL_SCHANNELS] {
            channels[0] = operation;
            if operation == ETHTOOL_SCHANNELS {
                channels[8] = combined;
            }
            let mut request = interface_request(interface)?;
            request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
            // SAFETY: both operations read and write one ethtool_channels (nine u32), which lives through the call.
            check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) })?;
        }
        Ok(())
    }
}

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// Makes the child process that `command` starts die with the thread that started it, so that a killed test leaves
/// nothing behind.
pub fn die_with_parent(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(|_| ()));
    }
}

/// Set by the first SIGINT or SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interruption(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT and SIGTERM only set what [`interrupted`] returns, so that the program can clean up.
///
/// # Errors
/// Those of sigaction(2).
pub fn note_interruptions() -> io::Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let action = SigAction::new(
            SigHandler::Handler(note_interruption),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether SIGINT or SIGTERM has come since [`note_interruptions`].
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completed_checksum_sums_to_all_ones() {
        let mut frame = vec![0u8; 14];
        frame.extend_from_slice(&[0x12, 0x34, 0, 0, 0x56, 0x78, 0x9a]);
        complete_checksum(&mut frame, 14, 2);
        let mut sum = 0u32;
        for pair in frame[14..].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn a_checksum_field_outside_the_frame_changes_nothing() {
        let mut frame = vec![7u8; 20];
        complete_checksum(&mut frame, 18, 16);
        assert_eq!(frame, vec![7u8; 20]);
    }
}
