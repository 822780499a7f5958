//! Where packed rings stand, in a file that outlives the process.
//!
//! A split ring's used index lies in the guest's memory, and front-ends take it from there when a back-end died. A packed ring has
//! no such index, and QEMU then sends the base it last knew, which may be days old. So each ring's position is noted in a shared
//! mapping of a small file: what a process stored there stays, however it ends.
//!
//! # What is noted, and when
//!
//! One store a burst, right before the burst's used elements are shown to the driver: the position before the burst and the one
//! after it. They become visible to the driver with a single store, that of the first element (see `PackedRing::publish`). So
//! after a crash the flags of the descriptor at the first position tell which of the two holds.
//!
//! # What it is worth
//!
//! A position is good only for the same ring of the same guest. So what memory, addresses and size the ring had is kept with it
//! (`session`), and the base that the front-end last gave or was told; `packed/resume.rs` adds a look at the ring itself. A
//! front-end that comes with another base knows something newer, or has worked on the ring itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Most rings of a port: two for each queue pair.
pub const MAX_RINGS: usize = 2 * crate::fabric::MAX_QUEUE_PAIRS;

const MAGIC: u64 = u64::from_le_bytes(*b"vnicring");
/// Of the layout. It may only change together with the number, and a file with another one is of no use.
const VERSION: u32 = 1;
const BYTES: usize = 4096;

const EMPTY: u32 = 0;
const KEPT: u32 = 1;

/// The file. A cache line for the header and one for each ring, which only the ring's holder writes to.
#[repr(C)]
struct Layout {
    header: Header,
    entries: [Entry; MAX_RINGS],
}

#[repr(C, align(64))]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
}

#[repr(C, align(64))]
struct Entry {
    /// The position before the last burst in the lower half, after it in the upper.
    moved: AtomicU32,
    state: AtomicU32,
    session: AtomicU64,
    told: AtomicU32,
    /// Of what else is there but `moved`.
    check: AtomicU32,
}

const _: () = assert!(size_of::<Layout>() <= BYTES);

/// Why the positions of a port's rings cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum CursorFileError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else could change it under us.
    #[error("{} is no regular file of this user that only it can write: remove it", .path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// Another process keeps its rings' positions there.
    #[error("{} is in use by another process: give each daemon its own", .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// The positions of one port's rings.
pub struct CursorFile {
    map: NonNull<Layout>,
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

// SAFETY: the mapping belongs to no thread, and is only accessed by atomic operations.
unsafe impl Send for CursorFile {}
// SAFETY: as above.
unsafe impl Sync for CursorFile {}

impl CursorFile {
    /// Opens the file, or makes it (mode 0600). The second result says what was wrong with what it held, if anything was; then it
    /// begins anew.
    ///
    /// # Errors
    ///
    /// See [`CursorFileError`].
    pub fn open(path: &Path) -> Result<(CursorFile, Option<&'static str>), CursorFileError> {
        let failed = |action| {
            let path = path.to_owned();
            move |source| CursorFileError::Io { path, action, source }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(failed("open"))?;
        let about = file.metadata().map_err(failed("look at"))?;
        // SAFETY: the call has no argument and cannot fail.
        let user = unsafe { libc::geteuid() };
        // One who could cut it short could end this process with SIGBUS.
        if !about.is_file() || about.uid() != user || about.mode() & 0o022 != 0 {
            return Err(CursorFileError::NotOurs {
                path: path.to_owned(),
            });
        }
        // SAFETY: a system call on a descriptor that we own, no memory involved.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
            return Err(CursorFileError::InUse {
                path: path.to_owned(),
            });
        }
        let bytes = BYTES as u64;
        let wrong = match about.len() {
            0 => None,
            len if len == bytes => None,
            _ => Some("its size is not that of such a file"),
        };
        if wrong.is_some() {
            file.set_len(0).map_err(failed("empty"))?;
        }
        file.set_len(bytes).map_err(failed("extend"))?;
        let range =
            libc::off_t::try_from(BYTES).map_err(|error| failed("extend")(io::Error::other(error)))?;
        // SAFETY: as above.
        let outcome = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, range) };
        if outcome != 0 {
            // A full file system would else show by SIGBUS later.
            return Err(failed("take room for")(io::Error::from_raw_os_error(outcome)));
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlaps nothing of ours.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                access,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(failed("map")(io::Error::last_os_error()));
        }
        let map = NonNull::new(map.cast()).ok_or_else(|| failed("map")(io::ErrorKind::AddrInUse.into()))?;
        let this = CursorFile {
            map,
            path: path.to_owned(),
            _file: file,
        };
        let found = this.begin();
        Ok((this, wrong.or(found)))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The place of one ring; `None` for one that no port has.
    #[must_use]
    pub fn slot(self: &Arc<CursorFile>, ring: usize) -> Option<CursorSlot> {
        let entry = self.layout().entries.get(ring)?;
        Some(CursorSlot {
            entry: NonNull::from(entry),
            _file: Arc::clone(self),
        })
    }

    /// Whether nothing is noted, so that the file need not stay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let mut entries = self.layout().entries.iter();
        entries.all(|entry| entry.state.load(Ordering::Relaxed) == EMPTY)
    }

    fn layout(&self) -> &Layout {
        // SAFETY: the mapping is page-aligned, has BYTES, no fewer than the layout, and lives as long as `self`. Any bytes are
        // valid values of atomics.
        unsafe { self.map.as_ref() }
    }

    /// Checks the header and makes one where there is none; says what was wrong.
    fn begin(&self) -> Option<&'static str> {
        let Header { magic, version } = &self.layout().header;
        let wrong = match (magic.load(Ordering::Relaxed), version.load(Ordering::Relaxed)) {
            (MAGIC, VERSION) => return None,
            (0, 0) => None,
            (MAGIC, _) => Some("it is of another version"),
            _ => Some("it begins with something else"),
        };
        magic.store(0, Ordering::Release);
        for entry in &self.layout().entries {
            entry.state.store(EMPTY, Ordering::Release);
        }
        version.store(VERSION, Ordering::Release);
        // Last: a process that ends before has made no valid file.
        magic.store(MAGIC, Ordering::Release);
        wrong
    }
}

impl Drop for CursorFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and has BYTES; slots hold the file, so none is left.
        unsafe { libc::munmap(self.map.as_ptr().cast(), BYTES) };
    }
}

/// The place of one ring in a [`CursorFile`].
#[derive(Clone)]
pub struct CursorSlot {
    entry: NonNull<Entry>,
    /// Keeps the mapping.
    _file: Arc<CursorFile>,
}

// SAFETY: as for the file, which it holds.
unsafe impl Send for CursorSlot {}
// SAFETY: as for the file, which it holds.
unsafe impl Sync for CursorSlot {}

/// Where a ring's position is kept, and what it is to be kept with.
#[derive(Clone)]
pub struct Keeping {
    /// The place.
    pub slot: CursorSlot,
    /// Stands for the memory, the addresses and the size of the ring: what differs is another ring.
    pub session: u64,
    /// The base that the front-end last gave or was told.
    pub told: u32,
}

/// What a [`CursorSlot`] holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// The base that the front-end knew of.
    pub(super) told: u32,
    /// The positions before and after the last burst, as [`super::packed_layout::Position::bits`].
    pub(super) moved: (u16, u16),
}

impl CursorSlot {
    /// Forgets the position: the front-end was told, so what it says next is true.
    pub fn clear(&self) {
        self.entry().state.store(EMPTY, Ordering::Relaxed);
    }

    /// What is kept of this session.
    pub(super) fn kept(&self, session: u64) -> Option<Kept> {
        let entry = self.entry();
        let told = entry.told.load(Ordering::Relaxed);
        let kept = entry.state.load(Ordering::Acquire) == KEPT
            && entry.session.load(Ordering::Relaxed) == session
            && entry.check.load(Ordering::Relaxed) == check(session, told);
        let [before_low, before_high, after_low, after_high] =
            entry.moved.load(Ordering::Relaxed).to_le_bytes();
        kept.then_some(Kept {
            told,
            moved: (
                u16::from_le_bytes([before_low, before_high]),
                u16::from_le_bytes([after_low, after_high]),
            ),
        })
    }

    /// Begins to keep a ring that stands at `position`.
    pub(super) fn begin(&self, session: u64, told: u32, position: u16) {
        let entry = self.entry();
        if self.kept(session).is_none_or(|kept| kept.told != told) {
            // Release, here as below: the compiler must leave the order as it is. That a process ended does not reorder stores.
            entry.state.store(EMPTY, Ordering::Release);
            entry.session.store(session, Ordering::Release);
            entry.told.store(told, Ordering::Release);
            entry.check.store(check(session, told), Ordering::Release);
        }
        self.note(position, position);
        entry.state.store(KEPT, Ordering::Release);
    }

    /// Notes that used elements take the ring from one position to another. To be followed by the store (at least Release) that shows
    /// them to the driver.
    #[inline]
    pub(super) fn note(&self, before: u16, after: u16) {
        let moved = u32::from(before) | u32::from(after) << 16;
        self.entry().moved.store(moved, Ordering::Release);
    }

    #[inline]
    fn entry(&self) -> &Entry {
        // SAFETY: it lies in the mapping of the file that `self` holds.
        unsafe { self.entry.as_ref() }
    }
}

/// Tells an entry from garbage.
fn check(session: u64, told: u32) -> u32 {
    let mixed = (session ^ u64::from(told).rotate_left(32) ^ MAGIC).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [.., a, b, c, d] = mixed.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open(path: &Path) -> (Arc<CursorFile>, Option<&'static str>) {
        let (file, wrong) = CursorFile::open(path).unwrap();
        (Arc::new(file), wrong)
    }

    #[test]
    fn a_position_outlives_the_file_s_user() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.rings");
        let (file, wrong) = open(&path);
        assert_eq!(wrong, None);
        assert!(file.is_empty());
        assert!(file.slot(MAX_RINGS).is_none());
        let kept = |slot: &CursorSlot, session| slot.kept(session).map(|kept| (kept.told, kept.moved));
        let slot = file.slot(3).unwrap();
        assert_eq!(kept(&slot, 7), None);
        slot.begin(7, 9, 0x8001);
        assert_eq!(kept(&slot, 7), Some((9, (0x8001, 0x8001))));
        slot.note(0x8001, 0x0002);
        assert!(!file.is_empty());
        drop((slot, file));
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );

        let (file, wrong) = open(&path);
        assert_eq!(wrong, None);
        let slot = file.slot(3).unwrap();
        assert_eq!(kept(&slot, 7), Some((9, (0x8001, 0x0002))));
        assert_eq!(kept(&slot, 8), None, "another session");
        assert_eq!(kept(&file.slot(2).unwrap(), 7), None);
        // A new session in the same place.
        slot.begin(8, 9, 0x8000);
        assert_eq!(kept(&slot, 7), None);
        assert_eq!(kept(&slot, 8), Some((9, (0x8000, 0x8000))));
        slot.clear();
        assert_eq!(kept(&slot, 8), None);
        assert!(file.is_empty());
    }

    #[test]
    fn garbage_is_named_and_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.rings");
        let mut another_version = MAGIC.to_le_bytes().to_vec();
        another_version.resize(BYTES, 2);
        for (bytes, said) in [
            (vec![7; 100], "size"),
            (vec![7; 2 * BYTES], "size"),
            (vec![7; BYTES], "something else"),
            (another_version, "version"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            let (file, wrong) = open(&path);
            assert!(wrong.is_some_and(|text| text.contains(said)), "{wrong:?}");
            assert!(file.is_empty());
            file.slot(0).unwrap().begin(1, 2, 3);
            drop(file);
            let (file, wrong) = open(&path);
            let kept = file.slot(0).unwrap().kept(1);
            assert_eq!(
                (wrong, kept.map(|kept| kept.moved)),
                (None, Some((3, 3))),
                "{said}"
            );
        }
        // A header, and entries of garbage.
        let bytes = std::fs::read(&path).unwrap();
        let mut damaged = vec![1; BYTES];
        damaged[..16].copy_from_slice(&bytes[..16]);
        std::fs::write(&path, damaged).unwrap();
        let (file, wrong) = open(&path);
        assert_eq!(wrong, None);
        for ring in 0..MAX_RINGS {
            assert_eq!(file.slot(ring).unwrap().kept(u64::from_le_bytes([1; 8])), None);
        }
    }

    #[test]
    fn what_is_not_ours_alone_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.rings");
        let refused = |path: &Path| match CursorFile::open(path) {
            Ok(_) => panic!("{} was taken", path.display()),
            Err(error) => error.to_string(),
        };
        let holder = open(&path).0;
        assert!(refused(&path).contains("in use"));
        drop(holder);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
        assert!(refused(&path).contains("remove it"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("elsewhere", &link).unwrap();
        assert!(refused(&link).contains("cannot open"));
        assert!(refused(Path::new("/nowhere/p.rings")).contains("/nowhere/p.rings"));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused(&fifo).contains("regular"));
    }
}
