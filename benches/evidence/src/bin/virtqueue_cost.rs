//! ADR 0003: nanoseconds a frame to take a one-descriptor chain, find its bytes and return it, by `virtio-queue`
//! 0.18 and by pointers that were resolved and checked once. Needs `--release`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Instant;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::NewBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vnic_evidence::{Claims, quantile};

const SIZE: u16 = 256;
const BURST: u16 = 32;
const BURSTS: u32 = 8192;
const FRAME: u32 = 72;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Buffers are above 4 GiB, as in a guest of QEMU with more than 2 GiB: the memory has two regions.
const BUFFERS: u64 = 1 << 32;

/// Memory of a guest whose driver has filled in every descriptor and never changes one.
fn guest<B: NewBitmap>() -> GuestMemoryMmap<B> {
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(BUFFERS), 1 << 20)])
            .expect("2 MiB of anonymous memory");
    for i in 0..SIZE {
        let at = u64::from(i);
        let words = [BUFFERS + at * 2048, u64::from(FRAME)];
        memory
            .write_obj(words, GuestAddress(DESC + 16 * at))
            .expect("inside the first region");
        memory
            .write_obj(i, GuestAddress(AVAIL + 4 + 2 * at))
            .expect("inside the first region");
    }
    memory
}

/// The driver makes one burst available.
fn publish(index: &AtomicU16) {
    index.store(
        index.load(Ordering::Relaxed).wrapping_add(BURST),
        Ordering::Release,
    );
}

/// Host address of a guest address.
fn host<B: NewBitmap>(memory: &GuestMemoryMmap<B>, guest: u64) -> *mut u8 {
    memory
        .get_host_address(GuestAddress(guest))
        .expect("inside a region")
}

fn nanoseconds_a_frame(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / f64::from(BURSTS * u32::from(BURST))
}

/// `virtio-queue`, one iterator a burst (its cheapest way).
fn by_crate<B: NewBitmap>() -> f64 {
    let memory = guest::<B>();
    // SAFETY: the available index is an aligned u16 of `memory`, which outlives it.
    let index = unsafe { &*host(&memory, AVAIL + 2).cast::<AtomicU16>() };
    let mut queue = Queue::new(SIZE).expect("256 is a valid size");
    queue
        .try_set_desc_table_address(GuestAddress(DESC))
        .expect("aligned");
    queue
        .try_set_avail_ring_address(GuestAddress(AVAIL))
        .expect("aligned");
    queue
        .try_set_used_ring_address(GuestAddress(USED))
        .expect("aligned");
    queue.set_ready(true);
    let start = Instant::now();
    for _ in 0..BURSTS {
        publish(index);
        let mut heads = [0; BURST as usize];
        let chains = queue.iter(&memory).expect("a ready queue");
        for (head, chain) in heads.iter_mut().zip(chains) {
            *head = chain.head_index();
            for descriptor in chain {
                let bytes = memory.get_slice(descriptor.addr(), descriptor.len() as usize);
                std::hint::black_box(bytes.expect("inside a region").ptr_guard().as_ptr());
            }
        }
        for head in heads {
            queue.add_used(&memory, head, FRAME).expect("a valid head");
        }
    }
    let result = nanoseconds_a_frame(start);
    assert_eq!(u32::from(queue.next_used()), BURSTS * u32::from(BURST) % 65536);
    result
}

/// The same steps and the same checks on pointers that were resolved once.
fn by_pointers() -> f64 {
    let memory = guest::<()>();
    let regions: Vec<(u64, u64, *mut u8)> = memory
        .iter()
        .map(|r| (r.start_addr().0, r.len(), host(&memory, r.start_addr().0)))
        .collect();
    let translate = |addr: u64, len: u64| {
        regions.iter().find_map(|&(start, size, base)| {
            let offset = addr.wrapping_sub(start);
            (offset < size && len <= size - offset).then(|| base.wrapping_add(offset as usize))
        })
    };
    let (desc, avail, used) = (host(&memory, DESC), host(&memory, AVAIL), host(&memory, USED));
    // SAFETY: both indexes are aligned u16s of `memory`, which outlives them.
    let (index, used_index) = unsafe {
        (
            &*avail.add(2).cast::<AtomicU16>(),
            &*used.add(2).cast::<AtomicU16>(),
        )
    };
    let (mut next_avail, mut next_used) = (0u16, 0u16);
    let start = Instant::now();
    for _ in 0..BURSTS {
        publish(index);
        let end = index.load(Ordering::Acquire);
        assert!(end.wrapping_sub(next_avail) <= SIZE);
        let mut heads = [0; BURST as usize];
        for head in &mut heads {
            let slot = usize::from(next_avail % SIZE);
            next_avail = next_avail.wrapping_add(1);
            // SAFETY: `slot` is below SIZE, and so is `head` when it is used; tables of SIZE entries are mapped.
            let (addr, len) = unsafe {
                *head = avail.add(4 + 2 * slot).cast::<u16>().read_volatile();
                assert!(*head < SIZE);
                let descriptor = desc
                    .add(16 * usize::from(*head))
                    .cast::<[u64; 2]>()
                    .read_volatile();
                (descriptor[0], descriptor[1] & 0xffff_ffff)
            };
            std::hint::black_box(translate(addr, len).expect("inside a region"));
        }
        for head in heads {
            let slot = usize::from(next_used % SIZE);
            next_used = next_used.wrapping_add(1);
            // SAFETY: `slot` is below SIZE, and the used ring has SIZE entries of 8 bytes.
            unsafe {
                used.add(4 + 8 * slot)
                    .cast::<[u32; 2]>()
                    .write_volatile([u32::from(head), FRAME])
            };
        }
        used_index.store(next_used, Ordering::Release);
        fence(Ordering::SeqCst);
    }
    nanoseconds_a_frame(start)
}

fn main() -> ExitCode {
    let mut rounds: [Vec<f64>; 3] = Default::default();
    for _ in 0..9 {
        rounds[0].push(by_pointers());
        rounds[1].push(by_crate::<()>());
        rounds[2].push(by_crate::<BitmapMmapRegion>());
    }
    for (name, samples) in [
        "cached pointers",
        "virtio-queue",
        "virtio-queue, migration bitmap",
    ]
    .iter()
    .zip(&mut rounds)
    {
        let [low, mid, high] = [0.0, 0.5, 1.0].map(|q| quantile(samples, q));
        println!("{name}: {mid:.1} ns a frame (of 9 runs: {low:.1} to {high:.1})");
    }
    let [pointers, plain, logged] = rounds.map(|mut samples| quantile(&mut samples, 0.5));
    let mut claims = Claims::default();
    claims.check(
        "virtio-queue costs at least ten times what cached pointers do",
        plain > 10.0 * pointers,
        format!(
            "{:.0} times; {:.0} times with a bitmap that could log",
            plain / pointers,
            logged / pointers
        ),
    );
    claims.exit()
}
