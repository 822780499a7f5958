use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::*;

fn memfd(bytes: u64) -> Arc<OwnedFd> {
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    File::from(fd.try_clone().unwrap()).set_len(bytes).unwrap();
    Arc::new(fd)
}

fn spec(guest_addr: u64, user_addr: u64, size: u64, mmap_offset: u64, fd: &Arc<OwnedFd>) -> RegionSpec {
    RegionSpec {
        guest_addr,
        user_addr,
        size,
        mmap_offset,
        fd: fd.clone(),
    }
}

fn pieces(memory: &GuestMemory, mut addr: u64, mut len: u32) -> Option<Vec<(usize, u32)>> {
    let mut window = Window::EMPTY;
    let mut pieces = Vec::new();
    while len > 0 {
        let (host, here) = memory.resolve(&mut window, addr, len)?;
        pieces.push((host.as_ptr() as usize, here));
        addr = addr.checked_add(here.into())?;
        len -= here;
    }
    Some(pieces)
}

#[test]
fn splits_at_region_edges_and_stops_at_holes() {
    let fd = memfd(0x6000);
    // Adjacent in guest addresses, swapped in the file; then a hole; then one more.
    let memory = GuestMemory::new(&[
        spec(0x1000, 0x7000_0000, 0x1000, 0x1000, &fd),
        spec(0x2000, 0x8000_0000, 0x1000, 0x0000, &fd),
        spec(0x4000, 0x9000_0000, 0x2000, 0x3000, &fd),
    ])
    .unwrap();
    let user = |addr, len| memory.host_of_user(addr, len).map(|p| p.as_ptr() as usize);

    assert_eq!(
        pieces(&memory, 0x1000, 0x1000),
        Some(vec![(user(0x7000_0000, 1).unwrap(), 0x1000)])
    );
    assert_eq!(
        pieces(&memory, 0x1ff0, 0x20),
        Some(vec![
            (user(0x7000_0ff0, 16).unwrap(), 16),
            (user(0x8000_0000, 16).unwrap(), 16)
        ])
    );
    assert_eq!(pieces(&memory, 0x2ff0, 0x11), None, "runs into the hole");
    assert_eq!(pieces(&memory, 0x3000, 1), None);
    assert_eq!(pieces(&memory, 0x5fff, 1).unwrap().len(), 1);
    assert_eq!(pieces(&memory, 0x5fff, 2), None);
    assert_eq!(pieces(&memory, 0, 1), None);
    assert_eq!(pieces(&memory, u64::MAX, u32::MAX), None);

    assert!(user(0x7000_0000, 0x1000).is_some());
    assert_eq!(
        user(0x7000_0000, 0x1001),
        None,
        "ring parts may not cross regions"
    );
    assert_eq!(user(0x6fff_ffff, 1), None);
    assert_eq!(user(u64::MAX, usize::MAX), None);
}

#[test]
fn an_offset_inside_a_page_is_honoured() {
    let fd = memfd(0x3000);
    let whole = GuestMemory::new(&[spec(0, 0, 0x3000, 0, &fd)]).unwrap();
    let part = GuestMemory::new(&[spec(0, 0, 0x800, 0x1234, &fd)]).unwrap();
    let at = |m: &GuestMemory, addr| m.host_of_user(addr, 1).unwrap().as_ptr();
    // SAFETY: both pointers lie in live mappings of at least the bytes touched.
    unsafe {
        at(&whole, 0x1234 + 5).write_volatile(77);
        assert_eq!(at(&part, 5).read_volatile(), 77);
    }
}

#[test]
fn bad_tables_are_refused_with_their_cause() {
    let fd = memfd(0x4000);
    let refusal = |specs: &[RegionSpec]| GuestMemory::new(specs).unwrap_err();
    assert!(matches!(refusal(&[]), GuestMemoryError::NoRegions));
    assert!(matches!(
        refusal(&[spec(7, 0, 0, 0, &fd)]),
        GuestMemoryError::Empty { guest_addr: 7 }
    ));
    for (guest, user, offset, name) in [
        (u64::MAX - 0xfff, 0, 0, "guest address"),
        (0, u64::MAX, 0, "user address"),
        (0, 0, u64::MAX - 5, "file offset"),
    ] {
        match refusal(&[spec(guest, user, 0x1000, offset, &fd)]) {
            GuestMemoryError::Overflow { field, .. } => assert_eq!(field, name),
            other => panic!("{other}"),
        }
    }
    assert!(matches!(
        refusal(&[spec(0, 0, 0x1001, 0x3000, &fd)]),
        GuestMemoryError::PastEndOfFile {
            needed: 0x4001,
            actual: 0x4000,
            ..
        }
    ));
    assert!(matches!(
        refusal(&[spec(0, 0, i64::MAX.cast_unsigned(), 0, &fd)]),
        GuestMemoryError::PastEndOfFile { .. }
    ));
    for (second, name) in [
        ((0xfff, 0x9000), "guest address"),
        ((0x8000, 0xfff), "user address"),
    ] {
        let table = [
            spec(0, 0, 0x1000, 0, &fd),
            spec(second.0, second.1, 0x1000, 0, &fd),
        ];
        match refusal(&table) {
            GuestMemoryError::Overlap { field, .. } => assert_eq!(field, name),
            other => panic!("{other}"),
        }
    }
    let many: Vec<_> = (0..510)
        .map(|i| spec(i * 0x1000, i * 0x1000, 0x1000, 0, &fd))
        .collect();
    assert!(matches!(
        refusal(&many),
        GuestMemoryError::TooManyRegions { count: 510 }
    ));
    assert_eq!(GuestMemory::new(&many[1..]).unwrap().regions.len(), 509);

    let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    assert!(matches!(
        refusal(&[spec(0, 0, 0x1000, 0, &null)]),
        GuestMemoryError::NotAFile { .. }
    ));
    let read_only = File::open(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd())
    ))
    .unwrap();
    let read_only = Arc::new(OwnedFd::from(read_only));
    assert!(matches!(
        refusal(&[spec(0, 0, 0x1000, 0, &read_only)]),
        GuestMemoryError::Map { .. }
    ));
}

#[test]
fn files_that_are_not_in_memory_are_refused() {
    let map = |file: File, size| GuestMemory::new(&[spec(0, 0, size, 0, &Arc::new(file.into()))]);
    // A regular file on a file system of its own kind, wherever the tests run.
    let elsewhere = File::open("/proc/self/maps").unwrap();
    assert!(matches!(
        map(elsewhere, 0x1000),
        Err(GuestMemoryError::NotInMemory { guest_addr: 0 })
    ));
    // What QEMU's memory-backend-file makes there.
    let shared = tempfile::tempfile_in("/dev/shm").unwrap();
    shared.set_len(0x1000).unwrap();
    map(shared, 0x1000).unwrap();
}

#[test]
fn adding_and_removing_share_the_other_mappings() {
    let fd = memfd(0x4000);
    let one = GuestMemory::new(&[spec(0, 0x10_0000, 0x1000, 0, &fd)]).unwrap();
    let two = one
        .with_region(&spec(0x1000, 0x20_0000, 0x1000, 0x1000, &fd))
        .unwrap();
    assert_eq!((one.regions.len(), two.regions.len()), (1, 2));
    assert_eq!(one.host_of_user(0x10_0000, 1), two.host_of_user(0x10_0000, 1));
    assert!(matches!(
        two.with_region(&spec(0x1800, 0x30_0000, 0x1000, 0, &fd)),
        Err(GuestMemoryError::Overlap { .. })
    ));
    assert_eq!(two.without_region(0, 0x10_0000, 0x2000).regions.len(), 2);
    let rest = two.without_region(0, 0x10_0000, 0x1000);
    assert!(rest.host_of_user(0x10_0000, 1).is_none());
    assert_eq!(rest.host_of_user(0x20_0000, 1), two.host_of_user(0x20_0000, 1));
    let none = rest.without_region(0x1000, 0x20_0000, 0x1000);
    assert!(none.regions.is_empty());
}

/// How many mappings the process has between these addresses.
fn mappings(start: usize, end: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some((number(from)?, number(to)?))
    };
    maps.lines()
        .filter_map(range)
        .filter(|&(from, to)| from < end && start < to)
        .count()
}

#[test]
fn a_file_that_shrinks_after_mapping_costs_its_owner_only() {
    const PAGES: u64 = 64;
    let size = PAGES * 0x1000;
    let (cut, whole) = (memfd(size), memfd(0x1000));
    let memory = GuestMemory::new(&[spec(0, 0, 0x1000, 0, &whole), spec(size, size, size, 0, &cut)]).unwrap();
    let event = loss_event().unwrap();
    assert_eq!(memory.lost(), None);
    File::from(cut.try_clone().unwrap()).set_len(0x1000).unwrap();
    let at = |addr| memory.host_of_user(addr, 8).unwrap().cast::<u64>();
    // SAFETY: aligned places within the mappings; what lies behind the file's end is what is being tested.
    unsafe {
        at(8).write_volatile(1);
        for page in (1..PAGES).step_by(2) {
            at(size + page * 0x1000).write_volatile(page);
        }
        for page in (1..PAGES).step_by(2) {
            assert_eq!(at(size + page * 0x1000).read_volatile(), page);
            assert_eq!(at(size + (page - 1) * 0x1000).read_volatile(), 0);
        }
        assert_eq!(at(8).read_volatile(), 1);
    }
    assert_eq!(memory.lost(), Some(size));
    event.read().expect("the control thread is told");
    let start = at(size).as_ptr().addr();
    let end = start + usize::try_from(size).unwrap();
    assert_eq!(mappings(start, end), 1, "one that takes the place of the other");
    // Whoever has the slot next begins anew.
    drop(memory);
    let again = GuestMemory::new(&[spec(0, 0, 0x1000, 0, &whole)]).unwrap();
    assert_eq!(again.lost(), None);
    // SAFETY: as above.
    unsafe { assert_eq!(again.host_of_user(8, 8).unwrap().cast::<u64>().read_volatile(), 1) };
}

#[test]
fn a_sigbus_anywhere_else_still_kills() {
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    let fd = memfd(0x1000);
    let _guarded = GuestMemory::new(&[spec(0, 0, 0x1000, 0, &fd)]).unwrap();
    let own = memfd(0);
    let raw = std::os::fd::AsRawFd::as_raw_fd(&*own);
    // SAFETY: a new mapping, where the kernel likes.
    let page = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 0x1000, prot, libc::MAP_SHARED, raw, 0)
    };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: the child does nothing but touch memory and exit.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: mapped, though behind the file's end; _exit ends the child without running anything of the parent's.
            unsafe {
                page.cast::<u8>().read_volatile();
                libc::_exit(0);
            }
        }
        ForkResult::Parent { child } => {
            let status = waitpid(child, None).unwrap();
            assert!(
                matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
                "{status:?}"
            );
        }
    }
    // SAFETY: the page that was mapped above, used by nobody.
    unsafe { libc::munmap(page, 0x1000) };
}
