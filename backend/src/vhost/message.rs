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
use vnic_dataplane::memory::guest::RegionSpec;

use super::eventfd;
use super::fault::Fault;
use super::vring::RingAddrs;

/// Bytes of a header: request, flags, payload size.
pub const HEADER_SIZE: usize = 12;

/// Most bytes of a payload, those of requests that are only known well enough to be refused included.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;

/// Most fds of a message: one per memory region.
pub const MAX_FDS: usize = 8;

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
        Some(R::SET_FEATURES | R::SET_PROTOCOL_FEATURES) => (exactly(8), exactly(0)),
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
    pub fn vring_state(code: Code, ring: u32, base: u16) -> Reply {
        let mut payload = [0; 8];
        payload.copy_from_slice(VhostUserVringState::new(ring, base.into()).as_slice());
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
mod tests {
    use std::fs::File;

    use super::*;

    fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap();
        [code, flags, size]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .chain(payload.iter().copied())
            .collect()
    }

    fn decode(code: u32, payload: &[u8], fds: usize) -> Result<Request, Fault> {
        let fds = (0..fds)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect();
        Message::decode(&message(code, 1, payload), fds).map(|message| message.request)
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn state(index: u32, num: u32) -> Vec<u8> {
        [index.to_ne_bytes(), num.to_ne_bytes()].concat()
    }

    #[test]
    fn headers_are_checked() {
        let flags = |flags| Message::decode(&message(1, flags, &[]), Vec::new());
        assert!(!flags(0x1).unwrap().need_reply);
        assert!(flags(0x9).unwrap().need_reply);
        assert!(matches!(flags(0x0), Err(Fault::Version { version: 0, .. })));
        assert!(matches!(flags(0x2), Err(Fault::Version { version: 2, .. })));
        assert!(matches!(flags(0x3), Err(Fault::Version { version: 3, .. })));
        assert!(
            matches!(flags(0x5), Err(Fault::Flags { flags: 5, .. })),
            "a reply is no request"
        );
        assert!(matches!(flags(0x8000_0001), Err(Fault::Flags { .. })));
        assert!(matches!(
            Message::decode(&[0; 11], Vec::new()),
            Err(Fault::ClosedMidMessage { received: 11 })
        ));
        let mut cut = message(2, 1, &[0; 8]);
        cut.pop();
        assert!(matches!(
            Message::decode(&cut, Vec::new()),
            Err(Fault::Size { size: 7, .. })
        ));
    }

    #[test]
    fn sizes_and_fds_are_checked_for_every_request() {
        // (request, payload, fds that are right, fds that are wrong)
        let table = [words(&[1]), words(&[0, 4096, 0, 0])].concat();
        let region = words(&[0, 0, 4096, 0, 0]);
        let cases: [(u32, Vec<u8>, usize, usize); 16] = [
            (1, vec![], 0, 1),
            (2, words(&[0]), 0, 1),
            (3, vec![], 0, 1),
            (4, vec![], 0, 1),
            (5, table, 1, 2),
            (8, state(0, 0), 0, 1),
            (9, words(&[0; 5]), 0, 1),
            (10, state(0, 0), 0, 1),
            (11, state(0, 0), 0, 1),
            (15, vec![], 0, 1),
            (16, words(&[0]), 0, 1),
            (17, vec![], 0, 1),
            (18, state(0, 0), 0, 1),
            (36, vec![], 0, 1),
            (37, region.clone(), 1, 0),
            (38, region, 0, 2),
        ];
        for (code, payload, right, wrong) in cases {
            assert!(
                !matches!(decode(code, &payload, right).unwrap(), Request::Unsupported),
                "{code}"
            );
            assert!(
                matches!(decode(code, &payload, wrong), Err(Fault::Fds { .. })),
                "{code}"
            );
            let longer = [&payload[..], &[0]].concat();
            let fault = decode(code, &longer, right).unwrap_err();
            assert!(
                matches!(fault, Fault::Size { .. } | Fault::Malformed { .. }),
                "{code}"
            );
            if let Some((_, shorter)) = payload.split_last() {
                let fault = decode(code, shorter, right).unwrap_err();
                assert!(
                    matches!(fault, Fault::Size { .. } | Fault::Malformed { .. }),
                    "{code}"
                );
            }
        }
        for code in [0, 6, 7, 19, 24, 31, 33, 45, u32::MAX] {
            assert!(matches!(
                decode(code, &[7; MAX_PAYLOAD], MAX_FDS).unwrap(),
                Request::Unsupported
            ));
            assert!(matches!(
                decode(code, &[7; MAX_PAYLOAD + 1], 0),
                Err(Fault::Size { .. })
            ));
        }
    }

    #[test]
    fn a_memory_table_has_as_many_regions_and_fds_as_it_says() {
        let table = |said: u64, regions: usize| {
            let mut table = words(&[said]);
            table.extend((0..regions).flat_map(|i| words(&[i as u64 * 4096, 4096, 1 << 40, 8192])));
            table
        };
        for count in 1..=8 {
            let Request::SetMemTable(regions) = decode(5, &table(count as u64, count), count).unwrap() else {
                panic!()
            };
            assert_eq!(regions.len(), count);
            let last = &regions[count - 1];
            assert_eq!(last.guest_addr, (count as u64 - 1) * 4096);
            assert_eq!(
                (last.size, last.user_addr, last.mmap_offset),
                (4096, 1 << 40, 8192)
            );
        }
        assert!(
            matches!(decode(5, &table(0, 0), 0), Err(Fault::Size { .. })),
            "no regions at all"
        );
        assert!(matches!(decode(5, &table(9, 9), 8), Err(Fault::Size { .. })));
        assert!(matches!(decode(5, &table(2, 1), 1), Err(Fault::Malformed { .. })));
        assert!(matches!(
            decode(5, &table(0xffff_ffff, 2), 2),
            Err(Fault::Malformed { .. })
        ));
        assert!(matches!(
            decode(5, &table(2, 2), 1),
            Err(Fault::Fds { fds: 1, min: 2, .. })
        ));
    }

    #[test]
    fn ring_fds_follow_bit_8_and_the_index_is_8_bits_wide() {
        for code in [12, 13, 14] {
            let number = |value: u64, fds| decode(code, &value.to_ne_bytes(), fds);
            assert!(matches!(
                number(0x1ff, 0).unwrap(),
                Request::SetVringKick { ring: 255, fd: None }
                    | Request::SetVringCall { ring: 255, fd: None }
                    | Request::SetVringErr { ring: 255, fd: None }
            ));
            assert!(matches!(number(0x100, 1), Err(Fault::Fds { fds: 1, max: 0, .. })));
            assert!(matches!(number(0, 0), Err(Fault::Fds { fds: 0, min: 1, .. })));
            assert!(matches!(
                number(0x300, 0),
                Err(Fault::Malformed { value: 0x300, .. })
            ));
            assert!(matches!(number(1 << 32, 1), Err(Fault::Malformed { .. })));
            assert!(
                matches!(number(0, 1), Err(Fault::NotAnEventFd { .. })),
                "/dev/null is no eventfd"
            );
        }
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let addr = [state(3, 1), words(&[0x10, 0x20, 0x30, 0x40])].concat();
        let Request::SetVringAddr {
            ring: 3,
            flags: 1,
            addrs,
        } = decode(9, &addr, 0).unwrap()
        else {
            panic!()
        };
        assert_eq!(
            addrs,
            RingAddrs {
                desc: 0x10,
                used: 0x20,
                avail: 0x30
            }
        );
        let region = words(&[0, 0x1000, 0x2000, 0x3000, 0x4000]);
        let Request::AddMemReg(added) = decode(37, &region, 1).unwrap() else {
            panic!()
        };
        let fields = [added.guest_addr, added.size, added.user_addr, added.mmap_offset];
        assert_eq!(fields, [0x1000, 0x2000, 0x3000, 0x4000]);
        assert!(matches!(
            decode(38, &region, 1).unwrap(),
            Request::RemMemReg {
                guest_addr: 0x1000,
                size: 0x2000,
                user_addr: 0x3000
            }
        ));
        assert!(matches!(
            decode(8, &state(7, 9), 0).unwrap(),
            Request::SetVringNum { ring: 7, size: 9 }
        ));
    }

    #[test]
    fn replies_carry_exactly_version_and_reply_flag() {
        let bytes = Reply::vring_state(Code(11), 3, 0xffff).encode();
        assert_eq!(bytes[..], message(11, 5, &state(3, 0xffff))[..]);
        let bytes = Reply::number(Code(1), u64::MAX - 1).encode();
        assert_eq!(bytes[..], message(1, 5, &words(&[u64::MAX - 1]))[..]);
    }
}
