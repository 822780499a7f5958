//! Guest memory of many guests. A process of its own: what it takes, no other test can have at the same time.

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vnic_dataplane::fabric::MAX_PORTS;
use vnic_dataplane::memory::guest::{
    GuestMemory, GuestMemoryError, MAX_REGIONS, MAX_TABLE_REGIONS, RegionSpec,
};

#[test]
fn no_front_end_can_leave_another_one_without_memory() {
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(0x1000).unwrap();
    let fd = Arc::new(file.into());
    let regions: Vec<_> = (0..MAX_REGIONS as u64)
        .map(|at| RegionSpec {
            guest_addr: at * 0x1000,
            user_addr: at * 0x1000,
            size: 0x1000,
            mmap_offset: 0,
            fd: Arc::clone(&fd),
        })
        .collect();
    // All ports have all regions, and all replace them at the same moment.
    let mut held = Vec::new();
    for table in [&regions[..], &regions[..MAX_TABLE_REGIONS]] {
        for port in 0..MAX_PORTS {
            match GuestMemory::new(table) {
                Ok(memory) => held.push(memory),
                Err(error) => panic!("port {port}, {} regions: {error}", table.len()),
            }
        }
    }
    assert!(matches!(
        GuestMemory::new(&regions[..1]),
        Err(GuestMemoryError::TooManyMappings { guest_addr: 0 })
    ));
    held.pop();
    assert!(GuestMemory::new(&regions[..1]).is_ok());
}
