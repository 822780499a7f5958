//! The driver's side of a ring of either kind, for tests. It reaches the guest's memory through the file, not through the
//! mappings that are under test.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{PackedRing, Ring, RingSpec, SplitRing};
use crate::memory::guest::{GuestMemory, RegionSpec};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Guest memory is two regions that meet here, and lie the other way round in the file.
pub(crate) const EDGE: u64 = 0x10_0000;
pub(crate) const MEMORY_END: u64 = 2 * EDGE;
const USER: u64 = 0x7f00_0000_0000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x4_0000;
/// Free for tests; the buffers that [`Driver::buffer`] hands out begin a little before the edge.
pub(crate) const SCRATCH: u64 = 0x8_0000;
const BUFFERS: u64 = EDGE - 0x4000;

/// The flags of a packed ring's descriptors and event suppression areas.
pub(crate) const AVAIL_FLAG: u16 = 1 << 7;
pub(crate) const USED_FLAG: u16 = 1 << 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Split,
    Packed,
}

/// A driver. Which kind of ring it has is in its spec.
pub(crate) struct Driver {
    file: File,
    pub(crate) spec: RingSpec,
    /// Split: the available index.
    pub(crate) avail_idx: u16,
    /// Split: the used index up to which was looked. Packed: the same in descriptors since the ring was new.
    last_used: u32,
    /// Split: the next descriptor of the table. Packed: descriptors made available since the ring was new.
    next_desc: u32,
    /// Packed: ids in use, with the number of descriptors in the ring.
    ids: HashMap<u16, u16>,
    next_id: u16,
    next_buffer: u64,
    next_table: u64,
}

/// A buffer of a chain: guest address, bytes, whether the device may write.
pub(crate) type Buffer = (u64, u32, bool);

impl Driver {
    /// As [`Driver::of`], for a split ring.
    pub(crate) fn new(size: u16, base: u16) -> Driver {
        Driver::of(Kind::Split, size, base)
    }

    /// Everything negotiated; a ring that has already run to index `base` (packed: has used as many descriptors).
    pub(crate) fn of(kind: Kind, size: u16, base: u16) -> Driver {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: a new descriptor that nothing else owns.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let file = File::from(fd.try_clone().unwrap());
        file.set_len(MEMORY_END).unwrap();
        let region = |guest_addr| RegionSpec {
            guest_addr,
            user_addr: USER + guest_addr,
            size: EDGE,
            mmap_offset: EDGE - guest_addr,
            fd: Arc::clone(&fd),
        };
        let packed = kind == Kind::Packed;
        let spec = RingSpec {
            packed,
            size,
            desc_addr: USER + DESC,
            avail_addr: USER + AVAIL,
            used_addr: USER + USED,
            base: base.into(),
            event_idx: true,
            indirect: true,
            mergeable: true,
            version_1: true,
            call: Some(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            memory: GuestMemory::new(&[region(0), region(EDGE)]).unwrap(),
        };
        let mut driver = Driver {
            file,
            spec,
            avail_idx: base,
            last_used: base.into(),
            next_desc: if packed { base.into() } else { 0 },
            ids: HashMap::new(),
            next_id: 77,
            next_buffer: BUFFERS,
            next_table: SCRATCH,
        };
        if packed {
            driver.spec.base = driver.settled_base();
            // What earlier rounds left: used descriptors.
            for back in 1..=u32::from(size.min(base)) {
                let flags = driver.flags(u32::from(base) - back, AVAIL_FLAG | USED_FLAG, 0);
                driver.desc(driver.place_of(u32::from(base) - back), 0, 0, 0, flags);
            }
        } else {
            driver.put_u16(AVAIL + 2, base);
            driver.put_u16(USED + 2, base);
        }
        driver
    }

    pub(crate) fn ring(&self) -> Ring {
        Ring::new(&self.spec).unwrap()
    }

    pub(crate) fn split(&self) -> SplitRing {
        SplitRing::new(&self.spec).unwrap()
    }

    pub(crate) fn packed(&self) -> PackedRing {
        PackedRing::new(&self.spec, None).unwrap()
    }

    /// The base of a ring that has used all that it took, once [`Driver::used`] has seen it.
    pub(crate) fn settled_base(&self) -> u32 {
        if self.spec.packed {
            let half = u32::from(self.position(self.last_used));
            half | half << 16
        } else {
            self.last_used
        }
    }

    /// Packed: the index in the ring of the descriptor that `count` others came before.
    pub(crate) fn place_of(&self, count: u32) -> u16 {
        u16::try_from(count % u32::from(self.spec.size)).unwrap()
    }

    /// Packed: the wrap counter then.
    fn wrap_of(&self, count: u32) -> bool {
        (count / u32::from(self.spec.size)).is_multiple_of(2)
    }

    /// Packed: both, as in an event suppression area.
    pub(crate) fn position(&self, count: u32) -> u16 {
        self.place_of(count) | u16::from(self.wrap_of(count)) << 15
    }

    /// Packed: the first flags where the wrap counter is 1, the others where it is 0.
    fn flags(&self, count: u32, one: u16, zero: u16) -> u16 {
        if self.wrap_of(count) { one } else { zero }
    }

    pub(crate) fn write(&self, mut addr: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (at, here) = self.place(addr, bytes.len());
            self.file.write_all_at(&bytes[..here], at).unwrap();
            bytes = &bytes[here..];
            addr += here as u64;
        }
    }

    pub(crate) fn read(&self, mut addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let (at, here) = self.place(addr, len - done);
            self.file
                .read_exact_at(&mut bytes[done..done + here], at)
                .unwrap();
            done += here;
            addr += here as u64;
        }
        bytes
    }

    /// Where a guest address is in the file, and how many bytes follow it there.
    fn place(&self, addr: u64, len: usize) -> (u64, usize) {
        let region = addr / EDGE * EDGE;
        (
            addr - region + EDGE - region,
            len.min(usize::try_from(region + EDGE - addr).unwrap()),
        )
    }

    /// A word that both sides use at the same time. Not by way of the file: the kernel copies byte by byte as it likes.
    fn word(&self, addr: u64) -> &AtomicU16 {
        let host = self.spec.memory.host_of_user(USER + addr, 2).unwrap();
        assert!(addr.is_multiple_of(2), "{addr:#x} is not aligned");
        // SAFETY: it is mapped for as long as the spec has the memory, and aligned; whoever else uses it does so atomically.
        unsafe { AtomicU16::from_ptr(host.as_ptr().cast()) }
    }

    /// Everything that was written before is there when the device sees this.
    fn put_u16(&self, addr: u64, value: u16) {
        self.word(addr).store(value.to_le(), Ordering::Release);
    }

    /// Everything that the device wrote before it wrote this is there.
    fn get_u16(&self, addr: u64) -> u16 {
        u16::from_le(self.word(addr).load(Ordering::Acquire))
    }

    fn slot(&self, counter: u16) -> u64 {
        u64::from(counter % self.spec.size)
    }

    /// Writes a descriptor of the table at `table`.
    pub(crate) fn put_desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&addr.to_le_bytes());
        desc[8..12].copy_from_slice(&len.to_le_bytes());
        desc[12..14].copy_from_slice(&flags.to_le_bytes());
        desc[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &desc);
    }

    /// Writes a descriptor of the ring's own table. Its last word is written last: in a packed ring these are the flags.
    pub(crate) fn desc(&self, index: u16, addr: u64, len: u32, third: u16, fourth: u16) {
        let at = DESC + 16 * u64::from(index);
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.put_u16(at + 12, third);
        self.put_u16(at + 14, fourth);
    }

    /// Makes the chain at `head` available.
    pub(crate) fn offer_head(&mut self, head: u16) {
        self.put_u16(AVAIL + 4 + 2 * self.slot(self.avail_idx), head);
        self.set_avail(self.avail_idx.wrapping_add(1));
    }

    pub(crate) fn set_avail(&mut self, index: u16) {
        self.avail_idx = index;
        self.put_u16(AVAIL + 2, index);
    }

    /// Where a buffer of `len` bytes may be put; goes round the memory behind the rings.
    pub(crate) fn buffer(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > MEMORY_END {
            self.next_buffer = BUFFERS;
        }
        let addr = self.next_buffer;
        self.next_buffer += u64::from(len);
        addr
    }

    /// Makes a chain of buffers available, the ones from `indirect_from` on through an indirect table; returns its head.
    /// Descriptors are used in a circle: the caller keeps fewer outstanding than the ring has.
    /// In a packed ring such a chain is indirect as a whole, and the result is its id.
    pub(crate) fn offer(&mut self, buffers: &[Buffer], indirect_from: Option<usize>) -> u16 {
        if self.spec.packed {
            return self.offer_packed(buffers, indirect_from.is_some_and(|from| from < buffers.len()));
        }
        let direct = indirect_from.unwrap_or(buffers.len());
        let mut links: Vec<(u64, u32, u16)> = buffers[..direct].iter().map(|&b| flags_of(b)).collect();
        if direct < buffers.len() {
            let table = self.table();
            let inner = &buffers[direct..];
            for (at, &buffer) in (0u16..).zip(inner) {
                let (addr, len, flags) = flags_of(buffer);
                let more = if usize::from(at) + 1 < inner.len() {
                    NEXT
                } else {
                    0
                };
                self.put_desc(table, at, addr, len, flags | more, at + 1);
            }
            links.push((table, u32::try_from(inner.len() * 16).unwrap(), INDIRECT));
        }
        let head = self.place_of(self.next_desc);
        for (at, &(addr, len, flags)) in links.iter().enumerate() {
            let here = self.place_of(self.next_desc);
            self.next_desc += 1;
            let more = if at + 1 < links.len() { NEXT } else { 0 };
            self.desc(here, addr, len, flags | more, self.place_of(self.next_desc));
        }
        self.offer_head(head);
        head
    }

    /// Where an indirect table may be put: not aligned, and sometimes across the edge.
    fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table = if table + 0x1000 > EDGE - 0x4000 {
            SCRATCH + 8
        } else {
            table + 0x208
        };
        table
    }

    fn offer_packed(&mut self, buffers: &[Buffer], indirect: bool) -> u16 {
        let mut links: Vec<(u64, u32, u16)> = buffers.iter().map(|&buffer| flags_of(buffer)).collect();
        if indirect {
            let table = self.table();
            for (at, &(addr, len, flags)) in (0..).zip(&links) {
                // NEXT means nothing in a table, and drivers exist that set it.
                self.put_desc(table, at, addr, len, 0xabcd, flags | NEXT | AVAIL_FLAG);
            }
            links = vec![(table, u32::try_from(links.len() * 16).unwrap(), INDIRECT)];
        }
        // Ids have nothing to do with places, and only the last descriptor's counts.
        let id = self.next_id;
        self.next_id = id.wrapping_mul(25).wrapping_add(13);
        let entries = u16::try_from(links.len()).unwrap();
        assert!(self.ids.insert(id, entries).is_none(), "id {id} is in use");
        assert!(
            self.ids.values().sum::<u16>() <= self.spec.size,
            "more than the ring has"
        );
        let end = self.next_desc + u32::from(entries);
        let descs = (self.next_desc..end)
            .zip(links)
            .map(|(count, (addr, len, flags))| {
                let (id, more) = if count + 1 == end { (id, 0) } else { (!id, NEXT) };
                (addr, len, id, flags | more)
            });
        let descs: Vec<_> = descs.collect();
        self.make_available(&descs);
        id
    }

    /// Packed: writes descriptors (address, length, id, flags but those that make them available).
    fn make_available(&mut self, descs: &[(u64, u32, u16, u16)]) {
        let first = self.next_desc;
        self.next_desc += u32::try_from(descs.len()).unwrap();
        // The first of a chain comes last: when the device sees it, the others must be there (virtio 1.2, 2.8.21).
        for (count, &(addr, len, id, flags)) in (first..self.next_desc).zip(descs).rev() {
            let available = self.flags(count, AVAIL_FLAG, USED_FLAG);
            self.desc(self.place_of(count), addr, len, id, flags | available);
        }
    }

    /// Makes descriptors (address, length, flags but those that make them available) available as they are. Split: each goes on, if it
    /// does, at the next, the last at the first.
    pub(crate) fn offer_raw(&mut self, descs: &[(u64, u32, u16)]) {
        if self.spec.packed {
            let descs: Vec<_> = (self.next_desc..)
                .zip(descs)
                .map(|(count, &(addr, len, flags))| (addr, len, self.place_of(count), flags))
                .collect();
            return self.make_available(&descs);
        }
        let count = u16::try_from(descs.len()).unwrap();
        for (at, &(addr, len, flags)) in (0..).zip(descs) {
            self.desc(at, addr, len, flags, (at + 1) % count);
        }
        self.offer_head(0);
    }

    /// Writes a descriptor of an indirect table.
    pub(crate) fn put_table(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16) {
        let (third, fourth) = match self.spec.packed {
            true => (0, flags),
            false => (flags, index + 1),
        };
        self.put_desc(table, index, addr, len, third, fourth);
    }

    /// Where the next chain goes, as a count: see [`Driver::wants_kick`].
    pub(crate) fn offered(&self) -> u32 {
        match self.spec.packed {
            true => self.next_desc,
            false => self.avail_idx.into(),
        }
    }

    /// Whether the device asked for a kick for what was offered since `before`.
    pub(crate) fn wants_kick(&self, before: u32) -> bool {
        // What was offered is there before the device's wish is looked at.
        fence(Ordering::SeqCst);
        if self.spec.packed {
            let (place, flags) = self.device_event();
            return match flags {
                1 => false,
                2 if self.spec.event_idx => {
                    (before..self.next_desc).any(|count| self.position(count) == place)
                }
                _ => true,
            };
        }
        if !self.spec.event_idx {
            return self.used_flags() & 1 == 0;
        }
        let before = u16::try_from(before).unwrap();
        let (now, event) = (self.avail_idx, self.avail_event());
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// A chain that the device reads.
    pub(crate) fn send(&mut self, parts: &[&[u8]], indirect_from: Option<usize>) -> u16 {
        let mut buffers = Vec::new();
        for part in parts {
            let len = u32::try_from(part.len()).unwrap();
            let addr = self.buffer(len);
            self.write(addr, part);
            buffers.push((addr, len, false));
        }
        self.offer(&buffers, indirect_from)
    }

    /// A chain that the device writes.
    pub(crate) fn post(&mut self, lens: &[u32], indirect_from: Option<usize>) -> (u16, Vec<Buffer>) {
        let buffers: Vec<Buffer> = lens.iter().map(|&len| (self.buffer(len), len, true)).collect();
        (self.offer(&buffers, indirect_from), buffers)
    }

    /// Used elements that were not yet looked at.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        if self.spec.packed {
            while let Some((id, len)) = self.used_packed() {
                used.push((id, len));
            }
            return used;
        }
        let published = self.used_idx();
        let mut last_used = u16::try_from(self.last_used).unwrap();
        while last_used != published {
            let element = self.read(USED + 4 + 8 * self.slot(last_used), 8);
            let id = u32::from_le_bytes(element[..4].try_into().unwrap());
            used.push((
                u16::try_from(id).unwrap(),
                u32::from_le_bytes(element[4..].try_into().unwrap()),
            ));
            last_used = last_used.wrapping_add(1);
        }
        self.last_used = last_used.into();
        used
    }

    fn used_packed(&mut self) -> Option<(u16, u32)> {
        let place = self.place_of(self.last_used);
        let flags = self.get_u16(DESC + 16 * u64::from(place) + 14);
        if flags & (AVAIL_FLAG | USED_FLAG) != self.flags(self.last_used, AVAIL_FLAG | USED_FLAG, 0) {
            return None;
        }
        // After the flags, before which nothing else is sure to be there.
        let (_, len, id, _) = self.ring_desc(place);
        assert_eq!(len > 0, flags & WRITE != 0, "WRITE says that the length counts");
        // An id that is not in use is what a hostile test made available.
        let entries = self.ids.remove(&id).unwrap_or(1);
        self.last_used += u32::from(entries);
        Some((id, len))
    }

    /// A descriptor of the ring: address, length and its last two words.
    pub(crate) fn ring_desc(&self, index: u16) -> (u64, u32, u16, u16) {
        let at = DESC + 16 * u64::from(index);
        let bytes = self.read(at, 12);
        (
            u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            u32::from_le_bytes(bytes[8..].try_into().unwrap()),
            self.get_u16(at + 12),
            self.get_u16(at + 14),
        )
    }

    /// Packed: what the driver wants of notifications (position, flags).
    pub(crate) fn set_driver_event(&self, position: u16, flags: u16) {
        self.put_u16(AVAIL, position);
        self.put_u16(AVAIL + 2, flags);
    }

    /// Packed: what the device wants of kicks (position, flags).
    pub(crate) fn device_event(&self) -> (u16, u16) {
        let host = self.spec.memory.host_of_user(USER + USED, 4).unwrap();
        // Both with one read, as a driver does: the device may be writing them, and a place goes with its flags.
        // SAFETY: as in `word`; the area is aligned to 4.
        let words = unsafe { AtomicU32::from_ptr(host.as_ptr().cast()) }.load(Ordering::Acquire);
        let [a, b, c, d] = u32::from_le(words).to_le_bytes();
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.get_u16(USED + 2)
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.get_u16(USED)
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.get_u16(USED + 4 + 8 * u64::from(self.spec.size))
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.spec.size), index);
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.put_u16(AVAIL, flags);
    }

    /// Cuts the file behind the guest's memory to nothing.
    pub(crate) fn shrink(&self) {
        self.file.set_len(0).unwrap();
    }

    /// Notifications since the last look.
    pub(crate) fn calls(&self) -> u64 {
        self.spec.call.as_ref().map_or(0, |fd| fd.read().unwrap_or(0))
    }
}

/// What it made available, what it has seen come back, and what the device wants of kicks.
impl Display for Driver {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} offered, {} seen used, ", self.offered(), self.last_used)?;
        if self.spec.packed {
            let (place, flags) = self.device_event();
            return write!(f, "device event {place:#06x}, flags {flags}");
        }
        let (used, flags) = (self.used_idx(), self.used_flags());
        write!(f, "used index {used}, flags {flags}")?;
        match self.spec.event_idx {
            true => write!(f, ", available event {}", self.avail_event()),
            false => Ok(()),
        }
    }
}

fn flags_of((addr, len, writable): Buffer) -> (u64, u32, u16) {
    (addr, len, if writable { WRITE } else { 0 })
}
