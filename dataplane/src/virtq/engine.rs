//! What both kinds of ring are to those who work on a burst.

use std::ops::Range;
use std::sync::Arc;

use super::bytes::Lines;
use super::chain::{Batch, Chain, Cursor, Direction, Front, HEADER, Head};
use super::notify::Call;
use super::walk::Tables;
use super::{RingError, RingSpec};

/// What a gather found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum More {
    /// This many chains, at least one.
    Chains(usize),
    /// The driver has made nothing more available.
    Empty,
    /// The batch cannot hold the next chain beside the ones it has.
    Full,
}

/// What a ring consists of beside its format.
pub(crate) struct Core {
    pub(super) batch: Batch,
    pub(super) tables: Tables,
    pub(super) call: Call,
    pub(super) event_idx: bool,
    mergeable: bool,
    version_1: bool,
}

impl Core {
    pub(super) fn new(spec: &RingSpec) -> Core {
        Core {
            batch: Batch::new(Arc::clone(&spec.memory)),
            tables: Tables::new(spec.indirect),
            call: Call::new(spec.call.clone()),
            event_idx: spec.event_idx,
            mergeable: spec.mergeable,
            version_1: spec.version_1,
        }
    }
}

/// A ring's format, for what works on bursts: compiled once for each, so that nothing is asked per frame.
pub(crate) trait Engine {
    /// What does not depend on the format.
    fn core(&self) -> &Core;

    /// Descriptors.
    fn size(&self) -> u16;

    /// Takes up to `max` available chains into an empty batch.
    fn gather(&mut self, direction: Direction, max: usize) -> Result<More, RingError>;

    /// Takes up to `max` more chains into the batch. A chain that breaks a rule is not taken: chains before it are
    /// returned first, the error by the next call.
    fn gather_more(&mut self, direction: Direction, max: usize) -> Result<More, RingError>;

    /// Makes the batch's chains from `index` on available again, and empties the batch.
    fn return_from(&mut self, index: usize);

    /// Marks the batch's chains from an index on as used, one for each number of bytes that were written, to be seen with the next
    /// [`Engine::publish`]. Chains must be completed in the order taken.
    fn complete(&mut self, from: usize, written: impl IntoIterator<Item = u32>);

    /// Shows the driver what was completed.
    fn publish(&mut self);

    /// Empties the batch, whose chains were all completed.
    fn forget(&mut self);

    /// Marks all chains of the batch as used, with nothing written into them, and empties it.
    #[inline]
    fn complete_unwritten(&mut self) {
        self.complete(0, std::iter::repeat(0));
        self.forget();
    }

    /// Marks the chains from `first` up to `end`, into which `written` bytes went, as used.
    #[inline]
    fn complete_chains(&mut self, first: usize, end: usize, written: usize) {
        let mut left = written;
        for index in first..end {
            let Some(chain) = self.chain(index) else { break };
            let here = left.min(chain.len());
            left -= here;
            self.complete(index, [u32::try_from(here).unwrap_or(u32::MAX)]);
        }
    }

    /// Whether VIRTIO_NET_F_MRG_RXBUF was negotiated.
    #[inline]
    fn mergeable(&self) -> bool {
        self.core().mergeable
    }

    /// Whether VIRTIO_F_VERSION_1 was negotiated.
    #[inline]
    fn version_1(&self) -> bool {
        self.core().version_1
    }

    /// The chains of the batch, in the order taken.
    #[inline]
    fn chain(&self, index: usize) -> Option<Chain> {
        self.core().batch.chains().get(index).copied()
    }

    /// All of them.
    #[inline]
    fn chains(&self) -> &[Chain] {
        self.core().batch.chains()
    }

    /// The beginning of a chain whose header has `skip` bytes, at least two.
    #[inline(always)]
    fn front(&self, chain: &Chain, skip: usize) -> Front {
        self.core().batch.front(chain, skip)
    }

    /// The place of the byte that `skip` bytes of a chain precede.
    #[inline]
    fn cursor(&self, chain: &Chain, skip: usize) -> Cursor {
        self.core().batch.cursor(chain, skip)
    }

    /// Copies bytes from the cursor on, across descriptors and chains. Returns how many there were.
    #[inline]
    fn read(&self, cursor: &mut Cursor, out: &mut [u8]) -> usize {
        self.core().batch.read(cursor, out)
    }

    /// The cache lines of a chain's first `len` bytes that are not on their way since it was gathered.
    #[inline(always)]
    fn lines(&self, index: usize, len: usize) -> Lines {
        let batch = &self.core().batch;
        match batch.chains().get(index) {
            Some(chain) => batch.lines(chain, len),
            None => Lines::NONE,
        }
    }

    /// Takes the gathered buffers' first lines away from other cores, before they are all written.
    #[inline(always)]
    fn claim(&self) {
        self.core().batch.claim();
    }

    /// Copies the bytes of a chain from `skip` on, as many as `out` takes: at once, if the chain is of one descriptor and has them.
    /// `false`, and nothing done, if not.
    #[inline(always)]
    fn read_whole(&self, chain: &Chain, skip: usize, out: &mut [u8]) -> bool {
        self.core().batch.read_whole(chain, skip, out)
    }

    /// Writes bytes from the cursor on, across descriptors and chains. Returns how many there was room for.
    #[inline]
    fn write(&self, cursor: &mut Cursor, bytes: &[u8]) -> usize {
        self.core().batch.write(cursor, bytes)
    }

    /// Puts `header` and `frame` into a chain: at once, if it is of one descriptor and has room. `false`, and nothing done, if not.
    /// Meanwhile brings in the `next` frame, but for its first line.
    #[inline(always)]
    fn write_whole(&self, chain: &Chain, header: &[u8; HEADER], frame: &[u8], next: Option<&[u8]>) -> bool {
        self.core().batch.write_whole(chain, header, frame, next)
    }

    /// Copies up to `most` bytes from the cursor on to a cursor of another ring, across descriptors and chains of both. Returns how
    /// many there were and had room.
    #[inline]
    fn transfer(&self, from: &mut Cursor, to: &impl Engine, at: &mut Cursor, most: usize) -> usize {
        self.core().batch.transfer(from, &to.core().batch, at, most)
    }

    /// Puts `header`, `head` and then the bytes of `chain` in `rest` into a chain of another ring: at once, if both chains are of one
    /// descriptor and have them. `false`, and nothing done, if not. Meanwhile brings in what is read `next`.
    #[inline(always)]
    fn pass_whole(
        &self,
        chain: &Chain,
        rest: Range<usize>,
        to: (&impl Engine, &Chain),
        front: (&[u8; HEADER], &Head),
        next: Option<Lines>,
    ) -> bool {
        let target = (&to.0.core().batch, to.1);
        self.core().batch.pass_whole(chain, rest, target, front, next)
    }
}
