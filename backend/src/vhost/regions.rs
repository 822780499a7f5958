//! The memory table: which regions a front-end shares, and what changes to them are allowed.

use std::sync::Arc;

use vnic_dataplane::memory::guest::RegionSpec;

use super::fault::Refusal;
use super::features::MAX_MEM_SLOTS;

/// The table after SET_MEM_TABLE.
pub(super) fn replaced(regions: Vec<RegionSpec>) -> Result<Vec<RegionSpec>, Refusal> {
    check(&regions)?;
    Ok(regions)
}

/// The table after ADD_MEM_REG.
pub(super) fn with(table: &[RegionSpec], region: RegionSpec) -> Result<Vec<RegionSpec>, Refusal> {
    if table.len() >= MAX_MEM_SLOTS {
        return Err(Refusal::NoSlot { slots: MAX_MEM_SLOTS });
    }
    let mut regions: Vec<RegionSpec> = table.iter().map(share).collect();
    regions.push(region);
    check(&regions)?;
    Ok(regions)
}

/// The table after REM_MEM_REG, which names a region by everything but its offset.
pub(super) fn without(
    table: &[RegionSpec],
    guest_addr: u64,
    user_addr: u64,
    size: u64,
) -> Result<Vec<RegionSpec>, Refusal> {
    let named = |region: &&RegionSpec| {
        region.guest_addr == guest_addr && region.user_addr == user_addr && region.size == size
    };
    if !table.iter().any(|region| named(&region)) {
        return Err(Refusal::NoSuchRegion { guest_addr });
    }
    Ok(table.iter().filter(|region| !named(region)).map(share).collect())
}

/// Refuses what can never be a memory table, before anything is mapped. User addresses may overlap: a front-end that shows
/// one piece of memory at two guest addresses has one user address for both.
fn check(regions: &[RegionSpec]) -> Result<(), Refusal> {
    let mut spans = Vec::with_capacity(regions.len());
    for region in regions {
        let ends =
            [region.guest_addr, region.user_addr, region.mmap_offset].map(|at| at.checked_add(region.size));
        match ends {
            [Some(end), Some(_), Some(_)] if region.size > 0 => spans.push((region.guest_addr, end)),
            _ => {
                return Err(Refusal::RegionBounds {
                    guest_addr: region.guest_addr,
                    size: region.size,
                });
            }
        }
    }
    spans.sort_unstable();
    let neighbours = spans.iter().zip(spans.iter().skip(1));
    match neighbours.into_iter().find(|(first, second)| second.0 < first.1) {
        Some((_, second)) => Err(Refusal::RegionOverlap { guest_addr: second.0 }),
        None => Ok(()),
    }
}

/// The same region, sharing its fd.
fn share(region: &RegionSpec) -> RegionSpec {
    RegionSpec {
        fd: Arc::clone(&region.fd),
        ..*region
    }
}
