//! A device that ends at any moment, and successors that go on.

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::super::cursors::{CursorFile, Keeping};
use super::super::super::testing::{AVAIL_FLAG, Driver, Kind, SCRATCH, USED_FLAG};
use super::super::{Direction, Engine, More, PackedRing};

const SESSION: u64 = 5;

struct Scene {
    driver: Driver,
    keep: Keeping,
    /// Ids that the driver waits for, in the order of making them available.
    waiting: VecDeque<u16>,
    /// Descriptors of those.
    entries: VecDeque<u16>,
    ring: PackedRing,
    taken: usize,
    completed: usize,
    /// The front-end has dropped a chain: QEMU does so once in a ring's life, as a count of its own then goes wrong.
    dropped: bool,
    _folder: tempfile::TempDir,
}

impl Scene {
    /// A new ring, whose front-end knows nothing but its beginning, ever.
    fn new(size: u16) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let (file, _) = CursorFile::open(&folder.path().join("p.rings")).unwrap();
        let driver = Driver::of(Kind::Packed, size, 0);
        let keep = Keeping {
            slot: Arc::new(file).slot(1).unwrap(),
            session: SESSION,
            told: driver.spec.base,
        };
        let ring = PackedRing::new(&driver.spec, Some(&keep)).unwrap();
        Scene {
            driver,
            keep,
            waiting: VecDeque::new(),
            entries: VecDeque::new(),
            ring,
            taken: 0,
            completed: 0,
            dropped: false,
            _folder: folder,
        }
    }

    /// Offers a chain if the ring has room for it; of several descriptors, or one that refers to a table.
    fn offer(&mut self, buffers: u16, indirect: bool) {
        let entries = if indirect { 1 } else { buffers };
        if self.entries.iter().sum::<u16>() + entries > self.driver.spec.size {
            return;
        }
        let lens = vec![100; usize::from(buffers)];
        let (id, _) = self.driver.post(&lens, indirect.then_some(0));
        self.waiting.push_back(id);
        self.entries.push_back(entries);
    }

    fn gather(&mut self, max: usize) {
        if self.taken > self.completed {
            return;
        }
        self.taken = match self.ring.gather(Direction::Writable, max) {
            Ok(More::Chains(count)) => count,
            Ok(_) => 0,
            Err(error) => panic!("{error}"),
        };
        self.completed = 0;
    }

    fn complete(&mut self, count: usize) {
        let count = count.min(self.taken - self.completed);
        self.ring.complete(self.completed, std::iter::repeat_n(60, count));
        self.completed += count;
    }

    /// The driver takes what it was shown; each must be the next that it waits for.
    fn used(&mut self) {
        for (id, len) in self.driver.used() {
            assert_eq!(
                self.waiting.pop_front(),
                Some(id),
                "given back twice, or out of order"
            );
            self.entries.pop_front();
            assert!(len == 60 || len == 0, "{len}");
        }
    }

    /// Whether the ring has moved and cannot be told from a new one.
    fn is_ambiguous(&self) -> bool {
        let flags =
            (0..self.driver.spec.size).map(|index| self.driver.ring_desc(index).3 & (AVAIL_FLAG | USED_FLAG));
        let first = flags.skip_while(|&flags| flags == AVAIL_FLAG);
        self.ring.base() != self.driver.spec.base && first.into_iter().all(|flags| flags == 0)
    }

    /// The device ends, and its successor is told the base of long ago.
    fn crash(&mut self, between_note_and_store: bool) {
        if between_note_and_store && let Some((first, _)) = self.ring.first {
            self.keep.slot.note(first.bits(), self.ring.next_used.bits());
        }
        self.go_on();
    }

    fn go_on(&mut self) {
        self.ring = PackedRing::new(&self.driver.spec, Some(&self.keep)).unwrap();
        (self.taken, self.completed) = (0, 0);
    }

    /// Whether a chain of one descriptor that the driver waits for is at this position.
    fn is_lone_chain(&self, position: u32) -> bool {
        let size = u32::from(self.driver.spec.size);
        let mut at = self.driver.settled_base() & 0xffff;
        self.entries.iter().any(|&entries| {
            let here = at;
            at += u32::from(entries);
            if at & 0x7fff >= size {
                at = (at - size) ^ 0x8000;
            }
            here == position && entries == 1
        })
    }

    /// The device ends, the driver makes all available that it can, and the front-end, which handles what the guest sends while there is no
    /// device, drops what it finds where it thinks that the ring stands.
    fn crash_and_drop(&mut self) {
        if self.dropped || self.is_ambiguous() {
            return;
        }
        (0..self.driver.spec.size).for_each(|_| self.offer(1, false));
        let told = self.keep.told;
        let (index, wrap) = (u16::try_from(told & 0x7fff).unwrap(), told & 0x8000 != 0);
        let (available, used) = match wrap {
            true => (AVAIL_FLAG, AVAIL_FLAG | USED_FLAG),
            false => (USED_FLAG, 0),
        };
        let (addr, _, id, flags) = self.driver.ring_desc(index);
        if flags & (AVAIL_FLAG | USED_FLAG) == available && self.is_lone_chain(told & 0xffff) {
            self.driver.desc(index, addr, 0, id, used);
            let size = self.driver.spec.size;
            let next = match index + 1 == size {
                true => u32::from(!wrap) << 15,
                false => u32::from(index + 1) | u32::from(wrap) << 15,
            };
            self.driver.spec.base = next | next << 16;
            self.keep.told = self.driver.spec.base;
            self.dropped = true;
        }
        self.go_on();
    }

    /// All that the driver made available comes back.
    fn finish(mut self) {
        loop {
            self.complete(usize::MAX);
            self.ring.publish();
            self.used();
            self.gather(64);
            if self.taken == 0 {
                break;
            }
        }
        assert!(self.waiting.is_empty(), "lost: {:?}", self.waiting);
        assert_eq!(self.ring.base(), self.driver.settled_base());
    }
}

#[derive(Debug, Clone)]
enum Act {
    Offer(u16, bool),
    Gather(usize),
    Complete(usize),
    Publish,
    Used,
    Crash(bool),
    CrashAndDrop,
}

/// `drops`: with a front-end that drops what the guest sends while no device is there; then chains are as Linux makes them with
/// VIRTIO_RING_F_INDIRECT_DESC, one descriptor in the ring each.
fn acts(drops: bool) -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (1..=4u16, any::<bool>())
            .prop_map(move |(buffers, indirect)| Act::Offer(buffers, indirect || drops)),
        3 => (1..=6usize).prop_map(Act::Gather),
        4 => (1..=4usize).prop_map(Act::Complete),
        2 => Just(Act::Publish),
        2 => Just(Act::Used),
        1 => any::<bool>().prop_map(move |between| match drops {
            true => Act::CrashAndDrop,
            false => Act::Crash(between),
        }),
    ];
    prop::collection::vec(act, 1..200)
}

fn play(size: u16, acts: Vec<Act>) {
    let mut scene = Scene::new(size);
    for act in acts {
        match act {
            Act::Offer(buffers, indirect) => scene.offer(buffers, indirect),
            Act::Gather(max) => scene.gather(max),
            Act::Complete(count) => scene.complete(count),
            Act::Publish => scene.ring.publish(),
            Act::Used => scene.used(),
            Act::Crash(_) if scene.is_ambiguous() => {}
            Act::Crash(between) => scene.crash(between),
            Act::CrashAndDrop => scene.crash_and_drop(),
        }
    }
    scene.finish();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn wherever_a_device_ends_each_buffer_comes_back_once(size in 1..=16u16, acts in acts(false)) {
        play(size, acts);
    }

    #[test]
    fn whatever_the_front_end_dropped_each_buffer_comes_back_once(size in 1..=16u16, acts in acts(true)) {
        play(size, acts);
    }
}

/// A ring that has been round, at every position, with nothing, one or all of it available.
#[test]
fn a_ring_goes_on_in_every_position() {
    for size in [1, 2, 5, 8] {
        for moved in 1..=4 * size {
            for offered in [0, 1, size] {
                let mut scene = Scene::new(size);
                for _ in 0..moved {
                    scene.offer(1, false);
                    scene.gather(1);
                    scene.complete(1);
                    scene.ring.publish();
                    scene.used();
                }
                let base = scene.ring.base();
                assert!(base == scene.driver.spec.base || !scene.is_ambiguous());
                (0..offered).for_each(|_| scene.offer(1, false));
                scene.crash(false);
                assert_eq!(scene.ring.base(), base, "{moved} of {size}, {offered} offered");
                scene.finish();
            }
        }
    }
}

/// While nobody looked, the guest restarted, and its new ring lies where the old one was.
#[test]
fn a_new_ring_in_the_old_one_s_place_begins_at_its_beginning() {
    let size = 8;
    for moved in 1..=4 * size {
        for offered in 0..=size {
            let mut scene = Scene::new(size);
            for _ in 0..moved {
                scene.offer(1, false);
                scene.gather(1);
                scene.complete(1);
                scene.ring.publish();
                scene.used();
            }
            let start = scene.driver.spec.base;
            for at in 0..size {
                let flags = if at < offered { AVAIL_FLAG } else { 0 };
                scene.driver.desc(at, SCRATCH, 100, at, flags);
            }
            scene.crash(false);
            assert_eq!(scene.ring.base(), start, "after {moved}, {offered} available");
        }
    }
}

/// Positions that do not belong to what is in the ring.
#[test]
fn a_position_that_does_not_fit_is_not_believed() {
    let mut scene = Scene::new(8);
    for _ in 0..11 {
        scene.offer(1, false);
        scene.gather(1);
        scene.complete(1);
        scene.ring.publish();
        scene.used();
    }
    // The second round, with three used: the next is 3, with a wrap counter of 0.
    let right = scene.driver.position(11);
    let start = scene.driver.spec.base;
    let claim = |before: u16, after: u16| {
        scene.keep.slot.begin(SESSION, start, before);
        scene.keep.slot.note(before, after);
        PackedRing::new(&scene.driver.spec, Some(&scene.keep))
            .unwrap()
            .base()
    };
    let both = u32::from(right) | u32::from(right) << 16;
    assert_eq!(claim(right, right), both);
    assert_eq!(claim(0x8007, right), both, "a burst over the ring's end");
    for wrong in [2, 4, 7, 0x8003, 0x8002, 0x8007, 8, 0x7fff, 0xffff] {
        assert_eq!(claim(wrong, wrong), start, "{wrong:#x}");
    }
    // More than once round, and a burst of which the ring knows nothing.
    assert_eq!(claim(0x8002, right), start);
    assert_eq!(claim(right, 2), start);
    // The front-end, or the memory, is another one.
    scene.keep.slot.begin(SESSION, start, right);
    for (session, told) in [(SESSION + 1, start), (SESSION, 0x8001_8001)] {
        let keep = Keeping {
            session,
            told,
            ..scene.keep.clone()
        };
        let mut spec = scene.driver.spec.clone();
        spec.base = told;
        scene.keep.slot.begin(SESSION, start, right);
        assert_eq!(PackedRing::new(&spec, Some(&keep)).unwrap().base(), told);
    }
}

/// A driver can write anything: no state of a ring may hold the device up.
#[test]
fn garbage_in_the_ring_is_survived() {
    let size = 4;
    for flags in 0..256u32 {
        for (before, after) in [(0x8000, 0x8002), (0x8001, 0x0001), (2, 3), (3, 0x8001)] {
            let scene = Scene::new(size);
            for at in 0..size {
                let two = flags >> (2 * at) & 3;
                let bits = [0, AVAIL_FLAG, USED_FLAG, AVAIL_FLAG | USED_FLAG][two as usize];
                // Chains without end, all with the same id.
                scene.driver.desc(at, SCRATCH, 100, 9, bits | 1);
            }
            scene.keep.slot.note(before, after);
            let mut ring = PackedRing::new(&scene.driver.spec, Some(&scene.keep)).unwrap();
            let _ = ring.gather(Direction::Readable, 64);
            ring.publish();
            let (avail, used) = (ring.base() & 0xffff, ring.base() >> 16);
            assert!((avail & 0x7fff) < 4 && (used & 0x7fff) < 4, "{:#x}", ring.base());
        }
    }
}

#[test]
fn a_front_end_that_knows_better_is_believed() {
    let mut scene = Scene::new(8);
    scene.offer(1, false);
    scene.gather(1);
    scene.complete(1);
    scene.ring.publish();
    scene.used();
    let told = scene.ring.base();
    // It stopped the ring: the position is its business now.
    scene.keep.slot.clear();
    scene.driver.spec.base = told;
    scene.keep.told = told;
    scene.offer(2, true);
    scene.crash(false);
    assert_eq!(scene.ring.base(), told);
    scene.finish();
}
