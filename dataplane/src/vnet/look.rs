//! A first look at what a guest sends: enough to decide where each frame goes, before any of it is copied.

use super::header::Header;
use crate::memory::frames::{MAX_SEGMENTS, SEGMENT_SIZE};
use crate::virtq::{Chain, Direction, Engine, HEAD, Head, More, Ring, RingError, either};

/// Bytes of an Ethernet header.
const MIN_LEN: usize = 14;
/// Most bytes that a frame of ours holds.
const MAX_LEN: usize = MAX_SEGMENTS * SEGMENT_SIZE;

/// Why a chain gives no frame; the reasons are drop counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Shorter than an Ethernet header (14 bytes).
    TooShort,
    /// Longer than a frame may be.
    TooLong,
    /// A header that asks for an offload that was not negotiated, or is malformed.
    BadHeader,
}

/// The beginning of one frame that the guest sends.
///
/// It is a copy, each byte of which was read once. What is decided, is decided on it, and it is what reaches the
/// frame's destination, whatever the guest makes of its memory meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    head: Head,
    /// Bytes of the virtio-net header.
    skip: u8,
    flaw: Option<Flaw>,
    /// Bytes of the frame.
    len: u32,
}

impl Look {
    /// The frame's first bytes: at least the Ethernet header and a VLAN tag's worth, less only of a shorter frame.
    #[inline]
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.head[..HEAD.min(self.len())]
    }

    /// Bytes of the frame, as the guest sends it: not padded.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are no bytes, which is never so.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the header before it.
    #[inline]
    pub(super) fn skip(&self) -> usize {
        self.skip.into()
    }

    /// Why this is no frame to be sent on.
    #[inline]
    #[must_use]
    pub fn flaw(&self) -> Option<Flaw> {
        self.flaw
    }

    /// [`Look::head`] with zeros behind a frame that is shorter.
    #[inline]
    pub(super) fn padded_head(&self) -> &Head {
        &self.head
    }

    #[inline(always)]
    fn at(ring: &impl Engine, chain: &Chain, skip: u8) -> Look {
        let front = ring.front(chain, skip.into());
        let whole_header = chain.len() >= usize::from(skip);
        let len = chain.len().saturating_sub(skip.into());
        let flaw = if !whole_header || !Header::asks_for_nothing(front.first) {
            Some(Flaw::BadHeader)
        } else if chain.is_truncated() || len > MAX_LEN {
            Some(Flaw::TooLong)
        } else if len < MIN_LEN {
            Some(Flaw::TooShort)
        } else {
            None
        };
        Look {
            head: front.head,
            skip,
            flaw,
            // A chain is shorter than 4 GiB.
            len: u32::try_from(len).unwrap_or(0),
        }
    }
}

/// Gathers up to `max` chains that the guest sends and looks at each; `looks` becomes one entry a chain, in their order. They stay
/// gathered until [`super::finish`] completes them.
///
/// A burst may end before `max` chains though more are available (at most 256 chains, 1024 segments and some 4096
/// descriptors are gathered). A chain that breaks the ring's rules is an error only when it comes first.
pub fn look(ring: &mut Ring, max: usize, looks: &mut Vec<Look>) -> Result<(), RingError> {
    either!(ring, engine => look_at(engine, max, looks))
}

fn look_at<R: Engine>(ring: &mut R, max: usize, looks: &mut Vec<Look>) -> Result<(), RingError> {
    looks.clear();
    let More::Chains(_) = ring.gather(Direction::Readable, max)? else {
        return Ok(());
    };
    let ring = &*ring;
    let skip = if Header::len_on(ring) == Header::LEN {
        Header::LEN_U8
    } else {
        Header::LEGACY_LEN_U8
    };
    looks.extend(ring.chains().iter().map(|chain| Look::at(ring, chain, skip)));
    Ok(())
}

/// Shows `each` the first bytes of gathered frames, up to 256: copies that need not be what was looked at, for what may be
/// decided on either.
pub fn peek<'a, T>(
    ring: &Ring,
    picks: impl Iterator<Item = (usize, &'a Look, T)>,
    mut each: impl FnMut(usize, T, &[u8]),
) {
    either!(ring, engine => {
        for (index, look, what) in picks {
            let Some(chain) = engine.chain(index) else { break };
            let mut bytes = [0; PEEK];
            let len = look.len().min(PEEK);
            let mut cursor = engine.cursor(&chain, look.skip());
            engine.read(&mut cursor, &mut bytes[..len]);
            each(index, what, &bytes[..len]);
        }
    });
}

/// Bytes that [`peek`] reads: what parsing needs.
const PEEK: usize = 256;

/// Completes all chains of the last [`look`], in their order, and publishes them. Does not notify.
pub fn finish(ring: &mut Ring) {
    either!(ring, engine => {
        engine.complete_unwritten();
        engine.publish();
    });
}
