//! Messages of the vhost-user protocol: from bytes and fds to checked requests, and replies to bytes.
//!
//! Layouts are those of the vhost-user specification, "Message Specification"; numbers are in the machine's byte order.

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserSingleMemoryRegion, VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;
use vnic_dataplane::memory::guest::{MAX_TABLE_REGIONS, RegionSpec};
use vnic_lb::mac::Mac;

use super::eventfd;
use super::fault::Fault;
use super::vring::RingAddrs;

/// Bytes of a header: request, flags, payload size.
pub const HEADER_SIZE: usize = 12;

/// Most bytes of a payload, those of requests that are only known well enough to be refused included.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;

/// Most fds of a message: one per memory region.
pub const MAX_FDS: usize = MAX_TABLE_REGIONS;

/// Bytes of a reply: every reply that this back-end gives has a payload of 8.
pub const REPLY_SIZE: usize = HEADER_SIZE + 8;

/// The version of the protocol, in bits 0-1 of the flags.
const VERSION: u32 = 1;

const NEED_REPLY: u32 = VhostUserHeaderFlag::NEED_REPLY.bits();
const REPLY: u32 = VhostUserHeaderFlag::REPLY.bits();

/// Payload of the kick, call and error messages: bits 0-7 are the ring, bit 8 says that no fd comes along.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

/// A request's number; displayed with its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    /// The request, if the protocol knows it.
    #[must_use]
    pub fn known(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.0).ok()
    }

    /// Whether the front-end waits for a payload of this request's own, so that an 8-byte refusal would be taken for it.
    pub(super) fn has_own_reply(self) -> bool {
        use FrontendReq as R;
        matches!(
            self.known(),
            Some(
                R::GET_FEATURES
                    | R::GET_PROTOCOL_FEATURES
                    | R::GET_QUEUE_NUM
                    | R::GET_VRING_BASE
                    | R::GET_MAX_MEM_SLOTS
                    | R::GET_CONFIG
                    | R::GET_INFLIGHT_FD
                    | R::GET_STATUS
                    | R::GET_SHARED_OBJECT
                    | R::GET_SHMEM_CONFIG
                    | R::POSTCOPY_ADVISE
            )
        )
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some(name) => write!(f, "{} ({name:?})", self.0),
            None => write!(f, "{} (unknown)", self.0),
        }
    }
}

/// A header whose version, flags and size were checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) code: Code,
    pub(super) need_reply: bool,
    /// Bytes of payload, within the bounds of the request.
    pub(super) size: usize,
}

impl Header {
    /// Checks a header as soon as it is there, before its payload is waited for.
    pub(super) fn parse(bytes: &[u8; HEADER_SIZE], fds: usize) -> Result<Header, Fault> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let (code, flags, size) = (Code(word(0)), word(4), word(8));
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(Fault::Version { code, version });
        }
        if flags & !(VhostUserHeaderFlag::VERSION.bits() | NEED_REPLY) != 0 {
            return Err(Fault::Flags { code, flags });
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let (sizes, fd_counts) = shape(code);
        if !sizes.contains(&size) {
            return Err(Fault::Size {
                code,
                size,
                min: *sizes.start(),
                max: *sizes.end(),
            });
        }
        if !fd_counts.contains(&fds) {
            return Err(Fault::Fds {
                code,
                fds,
                min: *fd_counts.start(),
                max: *fd_counts.end(),
            });
        }
        Ok(Header {
            code,
            need_reply: flags & NEED_REPLY != 0,
            size,
        })
    }
}

/// Sizes of payload and numbers of fds that a request may come with.
fn shape(code: Code) -> (RangeInclusive<usize>, RangeInclusive<usize>) {
    use FrontendReq as R;
    let exactly = |n: usize| n..=n;
    match code.known() {
        Some(
            R::GET_FEATURES
            | R::GET_PROTOCOL_FEATURES
            | R::GET_QUEUE_NUM
            | R::GET_MAX_MEM_SLOTS
            | R::SET_OWNER
            | R::RESET_OWNER,
        ) => (exactly(0), exactly(0)),
        Some(R::SET_FEATURES | R::SET_PROTOCOL_FEATURES | R::SEND_RARP) => (exactly(8), exactly(0)),
        Some(R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR) => (exactly(8), 0..=1),
        Some(R::SET_VRING_NUM | R::SET_VRING_BASE | R::GET_VRING_BASE | R::SET_VRING_ENABLE) => {
            (exactly(size_of::<VhostUserVringState>()), exactly(0))
        }
        Some(R::SET_VRING_ADDR) => (exactly(size_of::<VhostUserVringAddr>()), exactly(0)),
        Some(R::SET_MEM_TABLE) => {
            let region = size_of::<VhostUserMemoryRegion>();
            let head = size_of::<VhostUserMemory>();
            (head + region..=head + MAX_FDS * region, 1..=MAX_FDS)
        }
        Some(R::ADD_MEM_REG) => (exactly(size_of::<VhostUserSingleMemoryRegion>()), exactly(1)),
        // Some front-ends send the fd along here too; it is closed unused.
        Some(R::REM_MEM_REG) => (exactly(size_of::<VhostUserSingleMemoryRegion>()), 0..=1),
        _ => (0..=MAX_PAYLOAD, 0..=MAX_FDS),
    }
}

/// One request of a front-end, checked for form but not for sense.
#[derive(Debug)]
pub struct Message {
    /// Its number.
    pub code: Code,
    /// The front-end asks for a reply (which it may only if REPLY_ACK was negotiated).
    pub need_reply: bool,
    /// What it asks for.
    pub request: Request,
}

/// What a message asks for. Ring indexes are as wide as the front-end sent them.
#[derive(Debug)]
#[allow(missing_docs, reason = "the specification's names; fields say what they are")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetOwner,
    ResetOwner,
    GetQueueNum,
    GetMaxMemSlots,
    SetMemTable(Vec<RegionSpec>),
    AddMemReg(RegionSpec),
    RemMemReg {
        guest_addr: u64,
        user_addr: u64,
        size: u64,
    },
    SetVringNum {
        ring: u32,
        size: u32,
    },
    SetVringAddr {
        ring: u32,
        flags: u32,
        addrs: RingAddrs,
    },
    SetVringBase {
        ring: u32,
        base: u32,
    },
    GetVringBase {
        ring: u32,
    },
    /// `None`: no fd, the ring is to be polled.
    SetVringKick {
        ring: u32,
        fd: Option<Arc<EventFd>>,
    },
    /// `None`: no fd, the driver polls.
    SetVringCall {
        ring: u32,
        fd: Option<Arc<EventFd>>,
    },
    /// `None`: nobody wants to be told.
    SetVringErr {
        ring: u32,
        fd: Option<Arc<EventFd>>,
    },
    SetVringEnable {
        ring: u32,
        value: u32,
    },
    /// Announce the guest with this address.
    SendRarp(Mac),
    /// Any request whose feature is not offered; payload and fds were dropped.
    Unsupported,
}

impl Message {
    /// Decodes one whole message. The fds are those that came with its first byte; those that it does not keep are closed.
    pub fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Fault> {
        let Some((head, payload)) = bytes.split_first_chunk() else {
            return Err(Fault::ClosedMidMessage {
                received: bytes.len(),
            });
        };
        Message::from_parts(Header::parse(head, fds.len())?, payload, fds)
    }

    /// Decodes a payload whose header was checked.
    pub(super) fn from_parts(header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Fault> {
        let Header {
            code,
            need_reply,
            size,
        } = header;
        if payload.len() != size {
            return Err(Fault::Size {
                code,
                size: payload.len(),
                min: size,
                max: size,
            });
        }
        let request = request(code, payload, fds)?;
        Ok(Message {
            code,
            need_reply,
            request,
        })
    }
}

fn request(code: Code, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Request, Fault> {
    use FrontendReq as R;
    let Some(known) = code.known() else {
        return Ok(Request::Unsupported);
    };
    Ok(match known {
        R::GET_FEATURES => Request::GetFeatures,
        R::SET_FEATURES => Request::SetFeatures(number(code, payload)?),
        R::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
        R::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(number(code, payload)?),
        R::SET_OWNER => Request::SetOwner,
        R::RESET_OWNER => Request::ResetOwner,
        R::GET_QUEUE_NUM => Request::GetQueueNum,
        R::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
        R::SET_MEM_TABLE => Request::SetMemTable(mem_table(code, payload, fds)?),
        R::ADD_MEM_REG => {
            let body: VhostUserSingleMemoryRegion = body(code, payload)?;
            let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| fd_count(code, fds.len(), 1))?;
            Request::AddMemReg(region(&body, fd))
        }
        R::REM_MEM_REG => {
            let body: VhostUserSingleMemoryRegion = body(code, payload)?;
            Request::RemMemReg {
                guest_addr: body.guest_phys_addr,
                user_addr: body.user_addr,
                size: body.memory_size,
            }
        }
        R::SET_VRING_NUM => {
            let (ring, size) = vring_state(code, payload)?;
            Request::SetVringNum { ring, size }
        }
        R::SET_VRING_ADDR => {
            let body: VhostUserVringAddr = body(code, payload)?;
            let addrs = RingAddrs {
                desc: body.descriptor,
                avail: body.available,
                used: body.used,
            };
            Request::SetVringAddr {
                ring: body.index,
                flags: body.flags,
                addrs,
            }
        }
        R::SET_VRING_BASE => {
            let (ring, base) = vring_state(code, payload)?;
            Request::SetVringBase { ring, base }
        }
        R::GET_VRING_BASE => Request::GetVringBase {
            ring: vring_state(code, payload)?.0,
        },
        R::SET_VRING_KICK => {
            let (ring, fd) = vring_fd(code, payload, fds)?;
            Request::SetVringKick { ring, fd }
        }
        R::SET_VRING_CALL => {
            let (ring, fd) = vring_fd(code, payload, fds)?;
            Request::SetVringCall { ring, fd }
        }
        R::SET_VRING_ERR => {
            let (ring, fd) = vring_fd(code, payload, fds)?;
            Request::SetVringErr { ring, fd }
        }
        R::SET_VRING_ENABLE => {
            let (ring, value) = vring_state(code, payload)?;
            Request::SetVringEnable { ring, value }
        }
        R::SEND_RARP => {
            // The address is in the first six bytes of the number as it lies in memory.
            let [mac @ .., _, _] = number(code, payload)?.to_ne_bytes();
            Request::SendRarp(Mac(mac))
        }
        _ => Request::Unsupported,
    })
}

/// Reads a body without asking anything of its alignment.
fn body<T: ByteValued + Default>(code: Code, payload: &[u8]) -> Result<T, Fault> {
    let mut value = T::default();
    let bytes = value.as_mut_slice();
    if bytes.len() != payload.len() {
        return Err(Fault::Size {
            code,
            size: payload.len(),
            min: bytes.len(),
            max: bytes.len(),
        });
    }
    bytes.copy_from_slice(payload);
    Ok(value)
}

fn number(code: Code, payload: &[u8]) -> Result<u64, Fault> {
    body(code, payload)
}

fn vring_state(code: Code, payload: &[u8]) -> Result<(u32, u32), Fault> {
    let state: VhostUserVringState = body(code, payload)?;
    Ok((state.index, state.num))
}

fn vring_fd(code: Code, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(u32, Option<Arc<EventFd>>), Fault> {
    let value = number(code, payload)?;
    if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
        return Err(Fault::Malformed {
            code,
            detail: "bits above 8 are set in the ring index",
            value,
        });
    }
    let expected = usize::from(value & VRING_NO_FD == 0);
    if fds.len() != expected {
        return Err(fd_count(code, fds.len(), expected));
    }
    let ring = u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX);
    let fd = fds.into_iter().next().map(eventfd::adopt).transpose();
    let fd = fd.map_err(|detail| Fault::NotAnEventFd { code, detail })?;
    Ok((ring, fd))
}

fn mem_table(code: Code, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<RegionSpec>, Fault> {
    let (head, rest) = payload.split_at(payload.len().min(size_of::<VhostUserMemory>()));
    let count = body::<VhostUserMemory>(code, head)?.num_regions;
    let regions = rest.chunks_exact(size_of::<VhostUserMemoryRegion>());
    if usize::try_from(count) != Ok(regions.len()) || !regions.remainder().is_empty() {
        let detail = "the payload's size does not fit the number of regions";
        return Err(Fault::Malformed {
            code,
            detail,
            value: count.into(),
        });
    }
    if fds.len() != regions.len() {
        return Err(fd_count(code, fds.len(), regions.len()));
    }
    regions
        .zip(fds)
        .map(|(bytes, fd)| Ok(region(&body(code, bytes)?, fd)))
        .collect()
}

fn region(body: &VhostUserMemoryRegion, fd: OwnedFd) -> RegionSpec {
    RegionSpec {
        guest_addr: body.guest_phys_addr,
        user_addr: body.user_addr,
        size: body.memory_size,
        mmap_offset: body.mmap_offset,
        fd: Arc::new(fd),
    }
}

fn fd_count(code: Code, fds: usize, expected: usize) -> Fault {
    Fault::Fds {
        code,
        fds,
        min: expected,
        max: expected,
    }
}

/// An answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the front-end waits for it"]
pub struct Reply {
    code: Code,
    payload: [u8; 8],
}

impl Reply {
    /// An answer that is one number. To a request with need_reply, 0 says done and anything else refused.
    pub fn number(code: Code, value: u64) -> Reply {
        Reply {
            code,
            payload: value.to_ne_bytes(),
        }
    }

    /// The answer to GET_VRING_BASE.
    pub fn vring_state(code: Code, ring: u32, base: u32) -> Reply {
        let mut payload = [0; 8];
        payload.copy_from_slice(VhostUserVringState::new(ring, base).as_slice());
        Reply { code, payload }
    }

    /// Header and payload, ready to send.
    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_SIZE] {
        let mut bytes = [0; REPLY_SIZE];
        // QEMU compares the flags of a reply with exactly these two: need_reply must not be echoed.
        let words = [self.code.0, VERSION | REPLY, 8];
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        bytes[HEADER_SIZE..].copy_from_slice(&self.payload);
        bytes
    }
}

#[cfg(test)]
mod tests;
