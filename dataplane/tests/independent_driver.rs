//! Our device side against a driver side that is not ours: `virtio-queue`'s mock queue over `vm-memory`'s mapping of the
//! same memory. Where the two disagree, one of us has the specification wrong.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vnic_dataplane::memory::frames::{ChunkCache, Frame, FrameMemory};
use vnic_dataplane::memory::guest::{GuestMemory, RegionSpec};
use vnic_dataplane::virtq::{Ring, RingSpec};
use vnic_dataplane::vnet;

const MEMORY: usize = 4 << 20;
const BUFFERS: u64 = 1 << 20;
/// Bytes of a virtio-net header with VERSION_1 (virtio 1.2, 5.1.6).
const HEADER: u64 = 12;

/// The guest's memory as its driver maps it, and as we do.
fn memory() -> (GuestMemoryMmap, Arc<GuestMemory>) {
    let fd: OwnedFd = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd.try_clone().unwrap());
    file.set_len(MEMORY as u64).unwrap();
    let theirs = GuestMemoryMmap::<()>::from_ranges_with_files([(
        GuestAddress(0),
        MEMORY,
        Some(FileOffset::new(file, 0)),
    )]);
    let ours = GuestMemory::new(&[RegionSpec {
        guest_addr: 0,
        user_addr: 0,
        size: MEMORY as u64,
        mmap_offset: 0,
        fd: Arc::new(fd),
    }]);
    (theirs.unwrap(), ours.unwrap())
}

fn ring(queue: &MockSplitQueue<GuestMemoryMmap>, size: u16, memory: Arc<GuestMemory>) -> Ring {
    Ring::new(&RingSpec {
        packed: false,
        size,
        desc_addr: queue.desc_table_addr().0,
        avail_addr: queue.avail_addr().0,
        used_addr: queue.used_addr().0,
        base: 0,
        event_idx: false,
        indirect: false,
        mergeable: true,
        version_1: true,
        call: None,
        memory,
    })
    .unwrap()
}

fn descriptor(addr: u64, len: u64, flags: u32, next: u16) -> RawDescriptor {
    let (len, flags) = (u32::try_from(len).unwrap(), u16::try_from(flags).unwrap());
    RawDescriptor::from(Descriptor::new(addr, len, flags, next))
}

fn pattern(number: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| u8::try_from((at * 7 + number * 31) % 251).unwrap())
        .collect()
}

fn content(memory: &FrameMemory, frame: &Frame) -> Vec<u8> {
    memory.segments(frame).flatten().copied().collect()
}

#[test]
fn chains_of_another_driver_are_taken_whole_and_in_order() {
    let (theirs, ours) = memory();
    let queue = MockSplitQueue::new(&theirs, 64);
    let lengths = [60usize, 61, 1514, 200, 1000];
    let mut descriptors = Vec::new();
    for (number, len) in (0u64..).zip(lengths) {
        let at = BUFFERS + number * 0x1000;
        theirs
            .write_slice(&pattern(number, len), GuestAddress(at + 0x800))
            .unwrap();
        // The header in a descriptor of its own, the frame in two.
        let next = |ahead: usize| u16::try_from(descriptors.len() + ahead).unwrap();
        let (half, rest) = (len as u64 / 2, len as u64 - len as u64 / 2);
        let chain = [
            descriptor(at, HEADER, VRING_DESC_F_NEXT, next(1)),
            descriptor(at + 0x800, half, VRING_DESC_F_NEXT, next(2)),
            descriptor(at + 0x800 + half, rest, 0, 0),
        ];
        descriptors.extend(chain);
    }
    queue.add_desc_chains(&descriptors, 0).unwrap();

    let frames = FrameMemory::new(64).unwrap();
    let mut chunks = ChunkCache::new(Arc::clone(&frames));
    let mut device = ring(&queue, 64, ours);
    let mut taken = Vec::new();
    let mut looks = Vec::new();
    vnet::look(&mut device, 32, &mut looks).unwrap();
    vnet::take(&device, looks.iter().enumerate(), &mut chunks, &mut taken);
    vnet::finish(&mut device);
    assert_eq!(looks.len(), lengths.len());
    for ((number, len), frame) in (0u64..).zip(lengths).zip(&taken) {
        assert_eq!(content(&frames, frame), pattern(number, len), "frame {number}");
    }
    let used: u16 = theirs.read_obj(GuestAddress(queue.used_addr().0 + 2)).unwrap();
    assert_eq!(usize::from(used), lengths.len());
    for at in 0..lengths.len() as u64 {
        let element = queue.used_addr().0 + 4 + at * 8;
        let head: u32 = theirs.read_obj(GuestAddress(element)).unwrap();
        assert_eq!(u64::from(head), at * 3, "completed in order, each by its head");
    }
    VecDeque::from(taken)
        .drain(..)
        .for_each(|frame| chunks.free(frame));
}

#[test]
fn buffers_of_another_driver_are_filled() {
    let (theirs, ours) = memory();
    let queue = MockSplitQueue::new(&theirs, 64);
    // Six buffers of 512 bytes: a frame of 1200 takes three of them.
    let buffers: Vec<RawDescriptor> = (0..6)
        .map(|number| descriptor(BUFFERS + number * 0x1000, 512, VRING_DESC_F_WRITE, 0))
        .collect();
    queue.add_desc_chains(&buffers, 0).unwrap();

    let frames = FrameMemory::new(64).unwrap();
    let mut chunks = ChunkCache::new(Arc::clone(&frames));
    let mut device = ring(&queue, 64, ours);
    let mut given = Vec::new();
    for (number, len) in [(0u64, 60usize), (1, 1200), (2, 300)] {
        let mut frame = chunks.alloc(len).unwrap();
        frames.write(&mut frame, 0, &pattern(number, len));
        given.push(frame);
    }
    let outcome = vnet::give_to_guest(&mut device, &frames, &given).unwrap();
    assert_eq!(outcome.delivered, 3);
    let read = |addr: u64, len: usize| {
        let mut bytes = vec![0u8; len];
        theirs.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    };
    // num_buffers is the header's last field (virtio 1.2, 5.1.6.1).
    let num_buffers = |buffer: u64| {
        theirs
            .read_obj::<u16>(GuestAddress(BUFFERS + buffer * 0x1000 + 10))
            .unwrap()
    };
    assert_eq!((num_buffers(0), num_buffers(1), num_buffers(4)), (1, 3, 1));
    let room = 512 - 12;
    assert_eq!(read(BUFFERS + HEADER, 60), pattern(0, 60));
    let long = [
        read(BUFFERS + 0x1000 + HEADER, room),
        read(BUFFERS + 0x2000, 512),
        read(BUFFERS + 0x3000, 1200 - room - 512),
    ];
    assert_eq!(long.concat(), pattern(1, 1200));
    assert_eq!(read(BUFFERS + 0x4000 + HEADER, 300), pattern(2, 300));
    let used: u16 = theirs.read_obj(GuestAddress(queue.used_addr().0 + 2)).unwrap();
    assert_eq!(used, 5);
    given.drain(..).for_each(|frame| chunks.free(frame));
}
