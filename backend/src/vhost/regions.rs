//! The memory table: which regions a front-end shares, and what changes to them are allowed.

use std::io;

use nix::sys::stat::fstat;
use vnic_dataplane::memory::guest::{GuestMemoryError, RegionSpec};

use super::fault::Refusal;
use super::features::MAX_MEM_SLOTS;

/// A region that a front-end shares. Its file is open no longer than it takes to map it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// The front-end's virtual address.
    pub user_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region begins in the file.
    pub mmap_offset: u64,
    /// The file: device and inode. No other has these while the region is mapped.
    pub file: (u64, u64),
}

impl SharedRegion {
    /// The region of a message, without its descriptor.
    ///
    /// # Errors
    ///
    /// Those of fstat(2).
    pub fn of(spec: &RegionSpec) -> io::Result<SharedRegion> {
        let file = fstat(&spec.fd)?;
        Ok(SharedRegion {
            guest_addr: spec.guest_addr,
            user_addr: spec.user_addr,
            size: spec.size,
            mmap_offset: spec.mmap_offset,
            file: (file.st_dev, file.st_ino),
        })
    }
}

/// The regions that a front-end shares now.
///
/// QEMU before 8.1 keeps one memory table per queue pair and sends ADD_MEM_REG and REM_MEM_REG for each of them, all over the one
/// connection. So a region that is added again is the same region with one more holder, and it goes when the last one gives it up.
#[derive(Debug, Clone, Default)]
pub(super) struct RegionTable {
    regions: Vec<SharedRegion>,
    /// For each region, how many times it was added and not removed.
    holders: Vec<u32>,
}

impl RegionTable {
    /// The table after SET_MEM_TABLE.
    pub(super) fn replaced(specs: &[RegionSpec]) -> Result<RegionTable, Refusal> {
        let regions = specs.iter().map(shared).collect::<Result<Vec<_>, _>>()?;
        check(&regions)?;
        Ok(RegionTable {
            holders: vec![1; regions.len()],
            regions,
        })
    }

    /// The regions, each once.
    pub(super) fn regions(&self) -> &[SharedRegion] {
        &self.regions
    }

    /// The table after ADD_MEM_REG. It has a region more, unless that has another holder only.
    pub(super) fn with(&self, spec: &RegionSpec) -> Result<RegionTable, Refusal> {
        let mut table = self.clone();
        if let Some(at) = self.position(spec.guest_addr, spec.user_addr, spec.size) {
            table.holders[at] = table.holders[at].saturating_add(1);
            return Ok(table);
        }
        if table.regions.len() >= MAX_MEM_SLOTS {
            return Err(Refusal::NoSlot { slots: MAX_MEM_SLOTS });
        }
        table.regions.push(shared(spec)?);
        table.holders.push(1);
        check(&table.regions)?;
        Ok(table)
    }

    /// The table after REM_MEM_REG, which names a region by everything but its offset. It has a region less, unless that has
    /// other holders.
    pub(super) fn without(&self, guest_addr: u64, user_addr: u64, size: u64) -> Result<RegionTable, Refusal> {
        let at = self
            .position(guest_addr, user_addr, size)
            .ok_or(Refusal::NoSuchRegion { guest_addr })?;
        let mut table = self.clone();
        table.holders[at] -= 1;
        if table.holders[at] == 0 {
            table.regions.remove(at);
            table.holders.remove(at);
        }
        Ok(table)
    }

    fn position(&self, guest_addr: u64, user_addr: u64, size: u64) -> Option<usize> {
        self.regions.iter().position(|region| {
            region.guest_addr == guest_addr && region.user_addr == user_addr && region.size == size
        })
    }
}

fn shared(spec: &RegionSpec) -> Result<SharedRegion, Refusal> {
    SharedRegion::of(spec).map_err(|source| {
        Refusal::Map(GuestMemoryError::Stat {
            guest_addr: spec.guest_addr,
            source,
        })
    })
}

/// Refuses what can never be a memory table. User addresses may not overlap either: a ring is given by user addresses, and
/// each must mean one place. The specification says nothing of it; QEMU and Cloud Hypervisor map each block of memory once.
fn check(regions: &[SharedRegion]) -> Result<(), Refusal> {
    for region in regions {
        let ends =
            [region.guest_addr, region.user_addr, region.mmap_offset].map(|at| at.checked_add(region.size));
        if region.size == 0 || ends.contains(&None) {
            return Err(Refusal::RegionBounds {
                guest_addr: region.guest_addr,
                size: region.size,
            });
        }
    }
    refuse_overlap(regions, "guest", |region| region.guest_addr)?;
    refuse_overlap(regions, "user", |region| region.user_addr)
}

/// For regions whose ends do not wrap around.
fn refuse_overlap(
    regions: &[SharedRegion],
    kind: &'static str,
    start: impl Fn(&SharedRegion) -> u64,
) -> Result<(), Refusal> {
    let mut spans: Vec<_> = regions
        .iter()
        .map(|region| (start(region), region.size))
        .collect();
    spans.sort_unstable();
    let overlaps = |pair: &&[(u64, u64)]| pair[1].0 - pair[0].0 < pair[0].1;
    match spans.windows(2).find(overlaps) {
        Some(pair) => Err(Refusal::RegionOverlap {
            kind,
            addr: pair[1].0,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn region(guest_addr: u64, size: u64) -> RegionSpec {
        let fd = std::fs::File::open("/dev/null").unwrap().into();
        RegionSpec {
            guest_addr,
            user_addr: guest_addr,
            size,
            mmap_offset: 0,
            fd: Arc::new(fd),
        }
    }

    #[test]
    fn a_region_added_for_each_queue_pair_goes_with_the_last() {
        let one = RegionTable::default().with(&region(0, 0x1000)).unwrap();
        let two = one.with(&region(0, 0x1000)).unwrap();
        assert_eq!(two.regions(), one.regions());
        let left = two.without(0, 0, 0x1000).unwrap();
        assert_eq!(left.regions(), one.regions());
        let empty = left.without(0, 0, 0x1000).unwrap();
        assert!(empty.regions().is_empty());
        assert!(empty.without(0, 0, 0x1000).is_err());
    }

    #[test]
    fn neither_guest_nor_user_addresses_may_overlap() {
        let at = |guest_addr, user_addr| RegionSpec {
            user_addr,
            ..region(guest_addr, 0x1000)
        };
        let refusal = |second| {
            let refused = RegionTable::replaced(&[at(0x4000, 0x9000), second]);
            refused.unwrap_err().to_string()
        };
        assert_eq!(
            refusal(at(0x4fff, 0)),
            "makes two memory regions overlap at guest address 0x4fff"
        );
        assert_eq!(
            refusal(at(0x3001, 0)),
            "makes two memory regions overlap at guest address 0x4000"
        );
        assert_eq!(
            refusal(at(0, 0x9000)),
            "makes two memory regions overlap at user address 0x9000"
        );
        let beside = [at(0x4000, 0x9000), at(0x5000, 0x8000), at(0x3000, 0xa000)];
        assert!(RegionTable::replaced(&beside).is_ok());
    }

    #[test]
    fn a_region_that_differs_in_anything_is_another_one() {
        let table = RegionTable::default().with(&region(0, 0x1000)).unwrap();
        assert!(table.with(&region(0, 0x2000)).is_err(), "it overlaps");
        let both = table.with(&region(0x1000, 0x1000)).unwrap();
        assert_eq!(both.regions().len(), 2);
    }
}
