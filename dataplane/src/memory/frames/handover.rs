//! Chunks between workers and NIC queues.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::{
    CHUNK_SHIFT, CHUNK_SIZE, CHUNK_SIZE_U32, ChunkCache, Frame, FrameMemory, MAX_SEGMENTS, NO_CHUNK,
    QueueOwner, RetiredQueue, state,
};

/// What the NIC queues need: addresses instead of tokens. Each function is one arrow of the module's picture.
impl FrameMemory {
    /// Address of the region, and its bytes, for registering it as a UMEM.
    pub(crate) fn extent_of_region(&self) -> (usize, usize) {
        (self.region.address(), self.chunks.len() * CHUNK_SIZE)
    }

    fn index_of(&self, address: u64) -> Option<u32> {
        let index = u32::try_from(address >> CHUNK_SHIFT)
            .ok()
            .filter(|index| *index < self.chunk_count());
        if index.is_none() {
            self.state_errors.fetch_add(1, Ordering::Relaxed);
        }
        index
    }

    /// Fill -> Held: one received descriptor, appended to the frame that began before it, or beginning one.
    ///
    /// On `Err` the descriptor is not ours to use and the frame is as it was.
    pub(crate) fn take_received(
        &self,
        owner: QueueOwner,
        partial: Option<Frame>,
        address: u64,
        len: u32,
    ) -> Result<Frame, Option<Frame>> {
        let offset = address & (CHUNK_SIZE as u64 - 1);
        let Some(index) = self.index_of(address) else {
            return Err(partial);
        };
        let (Ok(offset16), Ok(len16)) = (u16::try_from(offset), u16::try_from(len)) else {
            return Err(partial);
        };
        if usize::from(offset16) + usize::from(len16) > CHUNK_SIZE {
            self.state_errors.fetch_add(1, Ordering::Relaxed);
            return Err(partial);
        }
        if !self.move_on(index, state::fill(owner), state::HELD) {
            return Err(partial);
        }
        let chunk = self.chunk(index);
        chunk.offset.store(offset16, Ordering::Relaxed);
        chunk.len.store(len16, Ordering::Relaxed);
        chunk.next.store(NO_CHUNK, Ordering::Relaxed);
        Ok(match partial {
            None => Frame::new(self.id, index, len, 1),
            Some(mut frame) => {
                if let Some(tail) = self.indexes(&frame).last() {
                    self.chunk(tail).next.store(index, Ordering::Relaxed);
                }
                frame.append(len16.into());
                frame
            }
        })
    }

    /// Fill -> Free at once: a received descriptor of a frame that is being skipped.
    pub(crate) fn skip_received(&self, owner: QueueOwner, chunks: &mut ChunkCache, address: u64) {
        if let Some(index) = self.index_of(address)
            && self.move_on(index, state::fill(owner), state::FREE)
        {
            chunks.put(index);
        }
    }

    /// Held -> Tx: hands the frame's chunks to a NIC; `descriptor` is told each address and length in order, and whether another
    /// segment follows. Returns how many there were.
    #[inline]
    pub(crate) fn give_to_nic(
        &self,
        owner: QueueOwner,
        frame: Frame,
        mut descriptor: impl FnMut(u64, u32, bool),
    ) -> u32 {
        let mut left = frame.segment_count();
        let mut given = 0;
        for index in self.indexes(&frame) {
            left -= 1;
            let (start, len) = self.extent(index);
            if self.move_on(index, state::HELD, state::tx(owner)) {
                descriptor(
                    start as u64,
                    u32::try_from(len).unwrap_or(CHUNK_SIZE_U32),
                    left > 0,
                );
                given += 1;
            }
        }
        given
    }

    /// Tx -> Free: a completed address.
    #[inline]
    pub(crate) fn take_completed(&self, owner: QueueOwner, chunks: &mut ChunkCache, address: u64) {
        if let Some(index) = self.index_of(address)
            && self.move_on(index, state::tx(owner), state::FREE)
        {
            chunks.put(index);
        }
    }

    /// Whether the chunk of this address is on its way out by the queue `owner`.
    pub(crate) fn is_sending(&self, owner: QueueOwner, address: u64) -> bool {
        self.index_of(address)
            .is_some_and(|index| self.chunk(index).state.load(Ordering::Relaxed) == state::tx(owner))
    }

    /// A copy of the frame that begins at this address and is on its way out by the queue `owner`; `None` if it is not, or chunks ran
    /// out. Only for who holds the queue's sending half: nobody else can take the chunks out of state Tx meanwhile.
    pub(crate) fn copy_in_flight(
        &self,
        owner: QueueOwner,
        chunks: &mut ChunkCache,
        address: u64,
    ) -> Option<Frame> {
        let head = self.index_of(address)?;
        let mut indexes = [0; MAX_SEGMENTS];
        let (mut count, mut len) = (0, 0);
        let mut next = head;
        while next != NO_CHUNK && count < MAX_SEGMENTS {
            let chunk = self.chunks.get(next as usize)?;
            if chunk.state.load(Ordering::Relaxed) != state::tx(owner) {
                return None;
            }
            indexes[count] = next;
            count += 1;
            len += usize::from(chunk.len.load(Ordering::Relaxed));
            next = chunk.next.load(Ordering::Relaxed);
        }
        let mut copy = chunks.alloc(len)?;
        let mut offset = 0;
        for index in &indexes[..count] {
            let bytes = self.sending_segment(*index);
            self.write(&mut copy, offset, bytes);
            offset += bytes.len();
        }
        Some(copy)
    }

    /// Held -> Tx, keeping the token: for the twin, which plays the kernel's part and reads the frame later.
    pub(crate) fn mark_sending(&self, owner: QueueOwner, frame: &Frame) {
        for index in self.indexes(frame) {
            self.move_on(index, state::HELD, state::tx(owner));
        }
    }

    /// Tx -> Held, the way back of [`FrameMemory::mark_sending`].
    pub(crate) fn mark_sent(&self, owner: QueueOwner, frame: &Frame) {
        for index in self.indexes(frame) {
            self.move_on(index, state::tx(owner), state::HELD);
        }
    }

    /// Held -> Free without a cache, for the rare paths that have none.
    pub(crate) fn free_to_pool(&self, frame: Frame) {
        // The next link is read before the chunk can have another owner.
        let indexes: [Option<u32>; MAX_SEGMENTS] = {
            let mut indexes = self.indexes(&frame);
            std::array::from_fn(|_| indexes.next())
        };
        let mut pool = self.pool();
        for index in indexes.into_iter().flatten() {
            if self.move_on(index, state::HELD, state::FREE) {
                pool.push(index);
            }
        }
    }

    /// Fill or Tx -> Quarantined, for every chunk of a queue whose both halves are gone. Returns how many.
    pub(crate) fn quarantine(&self, owner: QueueOwner) -> u32 {
        let mut count = 0;
        for chunk in &self.chunks {
            let bits = chunk.state.load(Ordering::Relaxed);
            if bits == state::fill(owner) || bits == state::tx(owner) {
                chunk.state.store(state::quarantined(owner), Ordering::Relaxed);
                count += 1;
            }
        }
        count
    }

    /// Quarantined -> Free, once nothing in the kernel can touch the chunks any more. Returns how many.
    pub(crate) fn release(&self, owner: QueueOwner) -> u32 {
        let mut count = 0;
        let mut pool = self.pool();
        for (index, chunk) in (0..).zip(&self.chunks) {
            if chunk.state.load(Ordering::Relaxed) == state::quarantined(owner) {
                chunk.state.store(state::FREE, Ordering::Relaxed);
                pool.push(index);
                count += 1;
            }
        }
        count
    }

    /// The closed queues whose chunks are still quarantined.
    pub(crate) fn retired(&self) -> MutexGuard<'_, Vec<RetiredQueue>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
