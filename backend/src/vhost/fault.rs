//! What can go wrong on a connection, named by request and cause.

use std::error::Error;
use std::io;

use vnic_dataplane::memory::guest::GuestMemoryError;

use super::message::Code;

/// Ends the connection it happened on. The others do not notice.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The front-end closed the connection between two messages: the ordinary end.
    #[error("the front-end closed the connection")]
    Closed,
    /// The front-end closed the connection inside a message.
    #[error("the front-end closed the connection after {received} bytes of a message")]
    ClosedMidMessage {
        /// Bytes of the unfinished message.
        received: usize,
    },
    /// A system call on the socket failed.
    #[error("cannot {action} the vhost-user socket")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The header is of another protocol version.
    #[error("request {code} has protocol version {version}, only version 1 exists")]
    Version {
        /// The request.
        code: Code,
        /// Bits 0-1 of the flags.
        version: u32,
    },
    /// The header has flags that no request may have.
    #[error("request {code} has flags {flags:#x}: a request has none but need_reply")]
    Flags {
        /// The request.
        code: Code,
        /// All flags.
        flags: u32,
    },
    /// The payload is too short or too long for its request.
    #[error("request {code} has a payload of {size} bytes, expected {min} to {max}")]
    Size {
        /// The request.
        code: Code,
        /// Bytes in the message.
        size: usize,
        /// Fewest bytes allowed.
        min: usize,
        /// Most bytes allowed.
        max: usize,
    },
    /// The message brings too few or too many fds.
    #[error("request {code} brings {fds} file descriptors, expected {min} to {max}")]
    Fds {
        /// The request.
        code: Code,
        /// How many came.
        fds: usize,
        /// Fewest allowed.
        min: usize,
        /// Most allowed.
        max: usize,
    },
    /// The kernel could not deliver every fd (MSG_CTRUNC).
    #[error(
        "file descriptors were lost on the way: a message brings more than {max}, or this process has no free ones \
         (raise its RLIMIT_NOFILE)"
    )]
    FdsTruncated {
        /// Most fds that a message may bring.
        max: usize,
    },
    /// Fds came with a byte that is not the first one of a message.
    #[error("file descriptors came {offset} bytes into a message instead of with its first byte")]
    FdsMidMessage {
        /// Bytes of the message that were received before the read that brought them.
        offset: usize,
    },
    /// A field has a value that the request's format does not allow.
    #[error("request {code} is malformed: {detail} ({value:#x})")]
    Malformed {
        /// The request.
        code: Code,
        /// Which rule was broken.
        detail: &'static str,
        /// The field.
        value: u64,
    },
    /// A kick, call or error fd cannot be used.
    #[error("request {code} brings a file descriptor that {detail}")]
    NotAnEventFd {
        /// The request.
        code: Code,
        /// What is wrong with it.
        detail: String,
    },
    /// The request was well-formed but refused, and the front-end had not asked for a reply that could say so.
    #[error("request {code} {cause}")]
    Refused {
        /// The request.
        code: Code,
        /// Why.
        cause: Refusal,
    },
    /// The front-end sends requests but does not read the replies.
    #[error("the front-end left {unsent} bytes of replies unread")]
    NotReading {
        /// Bytes that wait here beside those in the socket's buffer.
        unsent: usize,
    },
    /// The front-end, or whoever can write to its file, took memory away that it shares.
    #[error(
        "the file of its memory region at guest address {guest_addr:#x} was cut short while the guest used it: restart the \
         guest, and let nothing truncate its memory's file"
    )]
    MemoryLost {
        /// The region.
        guest_addr: u64,
    },
}

impl Fault {
    /// Whether this is the ordinary end of a connection and not an error.
    #[must_use]
    pub fn is_clean_close(&self) -> bool {
        matches!(self, Fault::Closed)
    }
}

/// Why a well-formed request was not carried out. Texts continue "request N (NAME) ...".
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Unknown, or belongs to a feature that was not negotiated.
    #[error("was not negotiated")]
    NotNegotiated,
    /// There is no such ring.
    #[error(
        "names ring {ring}, but this port has {rings} rings (two per queue pair): give the port more with its `queues=`, or \
         the front-end fewer queue pairs"
    )]
    NoSuchRing {
        /// The index, at full width.
        ring: u32,
        /// Number of rings.
        rings: usize,
    },
    /// Feature bits that were not offered.
    #[error("sets feature bits {extra:#x} that were not offered")]
    Features {
        /// The bits too many.
        extra: u64,
    },
    /// Not a valid queue size.
    #[error(
        "sets a queue size of {size}; it must be at most 32768, not 0, and for a split ring a power of two"
    )]
    QueueSize {
        /// The size.
        size: u32,
    },
    /// A ring part that is not aligned (virtio 1.2, 2.7).
    #[error("places the {part} at {addr:#x}, which is not a multiple of {align}")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// User address.
        addr: u64,
        /// Bytes.
        align: u64,
    },
    /// SET_VRING_ADDR with flags that ask for what was not negotiated.
    #[error("has vring flags {flags:#x}: the dirty log (bit 0) was not negotiated and no other flag exists")]
    VringFlags {
        /// The flags.
        flags: u32,
    },
    /// A ring position that no split ring can have.
    #[error("sets a ring base of {base}; a split ring's is below 65536")]
    Base {
        /// The base.
        base: u32,
    },
    /// Neither 0 nor 1.
    #[error("has {value} where only 0 (disable) and 1 (enable) have a meaning")]
    Enable {
        /// The value.
        value: u32,
    },
    /// A region of no bytes, or one whose end exceeds 64 bits.
    #[error(
        "has a memory region of {size} bytes at guest address {guest_addr:#x} that is empty or wraps around"
    )]
    RegionBounds {
        /// Guest physical address.
        guest_addr: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions claim the same addresses.
    #[error("makes two memory regions overlap at {kind} address {addr:#x}")]
    RegionOverlap {
        /// Whose addresses: guest or user.
        kind: &'static str,
        /// Where the second one begins.
        addr: u64,
    },
    /// No slot is left.
    #[error("adds a memory region, but all {slots} slots are taken")]
    NoSlot {
        /// The answer to GET_MAX_MEM_SLOTS.
        slots: usize,
    },
    /// Nothing to remove.
    #[error("removes a memory region at guest address {guest_addr:#x} that is not there")]
    NoSuchRegion {
        /// Guest physical address.
        guest_addr: u64,
    },
    /// The memory could not be mapped.
    #[error("gives memory that cannot be used: {}", with_sources(.0))]
    Map(GuestMemoryError),
}

/// An error and what caused it, in one line: a refusal is itself a part of a sentence.
fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
