//! A ring that we share with the kernel: one side produces descriptors, the other consumes them.
//!
//! Both indexes run over all of `u32` and wrap; entry `i` is at `i & mask`. Each side keeps its own index and a copy of the other's,
//! which it reads again only when the copy says that there is nothing to do.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::syscall::Mapping;

/// Where the parts of a ring are in its mapping.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) producer: usize,
    pub(super) consumer: usize,
    pub(super) flags: usize,
    pub(super) entries: usize,
}

struct Parts<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    size: u32,
    /// Keeps the memory behind the pointers.
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointers are into shared memory that lives as long as `_mapping`; the indexes are atomics, and which entries
// a side may touch follows from them, on whatever thread it is.
unsafe impl<T: Send> Send for Parts<T> {}

impl<T: Copy> Parts<T> {
    fn new(mapping: Arc<Mapping>, layout: Layout, size: u32) -> io::Result<Parts<T>> {
        if !size.is_power_of_two() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(Parts {
            producer: mapping.at(layout.producer, 1)?,
            consumer: mapping.at(layout.consumer, 1)?,
            flags: mapping.at(layout.flags, 1)?,
            entries: mapping.at(layout.entries, size as usize)?,
            size,
            _mapping: mapping,
        })
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: inside the mapping and aligned (`Mapping::at`); both sides access it as an atomic only.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.consumer.as_ref() }
    }

    fn flags(&self) -> u32 {
        // SAFETY: as in `producer`.
        unsafe { self.flags.as_ref() }.load(Ordering::Relaxed)
    }

    /// The entry of an index; always inside the ring.
    fn entry(&self, index: u32) -> NonNull<T> {
        // SAFETY: the masked index is below `size`, and `size` entries are inside the mapping (`new`).
        unsafe { self.entries.add((index & (self.size - 1)) as usize) }
    }
}

/// Our side of a ring that the kernel consumes: fill and TX.
pub(super) struct Producer<T> {
    parts: Parts<T>,
    /// Next entry to write; the shared index follows at [`Producer::publish`].
    next: u32,
    published: u32,
    consumed: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(mapping: Arc<Mapping>, layout: Layout, size: u32) -> io::Result<Producer<T>> {
        let parts = Parts::new(mapping, layout, size)?;
        let next = parts.producer().load(Ordering::Relaxed);
        let consumed = parts.consumer().load(Ordering::Acquire);
        Ok(Producer {
            parts,
            next,
            published: next,
            consumed,
        })
    }

    /// Entries of the ring.
    pub(super) fn size(&self) -> u32 {
        self.parts.size
    }

    /// Entries that can be written; looks at the consumer's index only if fewer than `wanted` are known to be free.
    pub(super) fn free(&mut self, wanted: u32) -> u32 {
        let mut free = self.free_known();
        if free < wanted {
            // Acquire: the consumer has read the entries before it gave them back; our writes must not go before that.
            self.consumed = self.parts.consumer().load(Ordering::Acquire);
            free = self.free_known();
        }
        free
    }

    fn free_known(&self) -> u32 {
        // More used than there is room for would be a consumer that runs ahead: no room then.
        self.parts
            .size
            .saturating_sub(self.next.wrapping_sub(self.consumed))
    }

    /// Writes the next entry. Panics when [`Producer::free`] did not say that there is one.
    pub(super) fn push(&mut self, value: T) {
        assert!(self.free_known() > 0, "push to a full ring");
        // SAFETY: the entry is inside the ring and free: the consumer has given it back (acquired in `free`) and does not read it
        // before the producer's index passes it.
        unsafe { self.parts.entry(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
    }

    /// Shows what was pushed to the consumer; returns whether there was anything new.
    pub(super) fn publish(&mut self) -> bool {
        if self.published == self.next {
            return false;
        }
        // Release: the entries are written before the index that makes them visible.
        self.parts.producer().store(self.next, Ordering::Release);
        self.published = self.next;
        true
    }

    /// Published entries that the consumer has not taken.
    pub(super) fn unconsumed(&mut self) -> u32 {
        self.consumed = self.parts.consumer().load(Ordering::Acquire);
        self.published.wrapping_sub(self.consumed)
    }

    /// Index behind the last entry that was published.
    pub(super) fn published(&self) -> u32 {
        self.published
    }

    /// Index of the first entry that the consumer is not known to have taken.
    pub(super) fn consumed(&self) -> u32 {
        self.consumed
    }

    /// What was written at `index`, one of the last [`Producer::size`] before [`Producer::published`].
    pub(super) fn written(&self, index: u32) -> T {
        // SAFETY: the entry is inside the ring. Every entry holds a value: we wrote it, or it is still zero as the kernel made the ring,
        // and `T` is a plain structure of integers. The consumer never writes entries, and we do not while `self` is borrowed.
        unsafe { self.parts.entry(index).read() }
    }

    /// The kernel asks to be woken (XDP_RING_NEED_WAKEUP).
    pub(super) fn needs_wakeup(&self) -> bool {
        // The kernel sets the flag before it looks at the ring a last time, and we read it after the index is stored. The fence
        // keeps that order: without it both sides could miss each other.
        std::sync::atomic::fence(Ordering::SeqCst);
        self.parts.flags() & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Our side of a ring that the kernel produces: RX and completion.
pub(super) struct Consumer<T> {
    parts: Parts<T>,
    /// Next entry to read; the shared index follows at [`Consumer::release`].
    next: u32,
    released: u32,
    produced: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(mapping: Arc<Mapping>, layout: Layout, size: u32) -> io::Result<Consumer<T>> {
        let parts = Parts::new(mapping, layout, size)?;
        let next = parts.consumer().load(Ordering::Relaxed);
        let produced = parts.producer().load(Ordering::Acquire);
        Ok(Consumer {
            parts,
            next,
            released: next,
            produced,
        })
    }

    /// The next entry, or `None` when the producer has no more.
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.next == self.produced {
            // Acquire: the entries were written before the index that we see.
            self.produced = self.parts.producer().load(Ordering::Acquire);
            if self.next == self.produced {
                return None;
            }
        }
        // SAFETY: inside the ring, and written before the index passed it (acquired); the producer does not write it again before
        // `release`.
        let value = unsafe { self.parts.entry(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(value)
    }

    /// Gives the entries that were read back to the producer.
    pub(super) fn release(&mut self) {
        if self.released != self.next {
            // Release: our reads are over before the producer may write again.
            self.parts.consumer().store(self.next, Ordering::Release);
            self.released = self.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout {
        producer: 0,
        consumer: 64,
        flags: 128,
        entries: 192,
    };

    /// A producer and a consumer of one ring over plain memory, whose indexes begin at `start`.
    fn pair(size: u32, start: u32) -> (Producer<u64>, Consumer<u64>) {
        let mapping = Arc::new(Mapping::anonymous(192 + 8 * size as usize).unwrap());
        let parts = Parts::<u64>::new(mapping.clone(), LAYOUT, size).unwrap();
        parts.producer().store(start, Ordering::Relaxed);
        parts.consumer().store(start, Ordering::Relaxed);
        let producer = Producer::new(mapping.clone(), LAYOUT, size).unwrap();
        (producer, Consumer::new(mapping, LAYOUT, size).unwrap())
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(u32),
        Publish,
        Pop(u32),
        Release,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..12u32).prop_map(Step::Push),
            Just(Step::Publish),
            (0..12u32).prop_map(Step::Pop),
            Just(Step::Release),
        ];
        proptest::collection::vec(step, 0..120)
    }

    proptest! {
        /// Against a queue that says what is pushed, visible, taken and given back; indexes pass 2^32 in many of the runs.
        #[test]
        fn behaves_as_a_bounded_queue(start in prop_oneof![any::<u32>(), (u32::MAX - 40)..=u32::MAX], steps in steps()) {
            const SIZE: u32 = 8;
            let (mut producer, mut consumer) = pair(SIZE, start);
            let (mut pushed, mut visible) = (VecDeque::new(), VecDeque::new());
            let (mut taken, mut number) = (0, 0u64);
            for step in steps {
                match step {
                    Step::Push(count) => {
                        let used = pushed.len() + visible.len() + taken;
                        let free = producer.free(SIZE);
                        prop_assert_eq!(free as usize, SIZE as usize - used);
                        for _ in 0..count.min(free) {
                            producer.push(number);
                            pushed.push_back(number);
                            number += 1;
                        }
                    }
                    Step::Publish => {
                        prop_assert_eq!(producer.publish(), !pushed.is_empty());
                        visible.append(&mut pushed);
                    }
                    Step::Pop(count) => for _ in 0..count {
                        let value = visible.pop_front();
                        prop_assert_eq!(consumer.pop(), value);
                        taken += usize::from(value.is_some());
                    },
                    Step::Release => {
                        consumer.release();
                        taken = 0;
                    }
                }
                prop_assert_eq!(producer.unconsumed() as usize, visible.len() + taken);
            }
        }
    }

    #[test]
    fn two_threads_see_every_value_in_order() {
        const COUNT: u64 = 100_000;
        let (mut producer, mut consumer) = pair(64, u32::MAX - 1000);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut number = 0;
                while number < COUNT {
                    if producer.free(1) == 0 {
                        std::thread::yield_now();
                        continue;
                    }
                    producer.push(number);
                    number += 1;
                    producer.publish();
                }
            });
            let mut expected = 0;
            while expected < COUNT {
                match consumer.pop() {
                    Some(value) => {
                        assert_eq!(value, expected);
                        expected += 1;
                        consumer.release();
                    }
                    None => std::thread::yield_now(),
                }
            }
        });
    }

    #[test]
    #[should_panic(expected = "full ring")]
    fn a_full_ring_takes_nothing() {
        let (mut producer, _consumer) = pair(2, 0);
        for value in 0..3 {
            producer.push(value);
        }
    }

    #[test]
    fn a_ring_outside_its_mapping_or_of_odd_size_is_refused() {
        let mapping = Arc::new(Mapping::anonymous(4096).unwrap());
        assert!(Producer::<u64>::new(mapping.clone(), LAYOUT, 512).is_err());
        assert!(Producer::<u64>::new(mapping.clone(), LAYOUT, 12).is_err());
        assert!(
            Consumer::<u64>::new(
                mapping.clone(),
                Layout {
                    flags: 4096,
                    ..LAYOUT
                },
                8
            )
            .is_err()
        );
        assert!(
            Consumer::<u64>::new(
                mapping,
                Layout {
                    consumer: 65,
                    ..LAYOUT
                },
                8
            )
            .is_err()
        );
    }
}
