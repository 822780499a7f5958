//! Where a port's packed rings stand, kept in a file so that another vnicd can go on after this one, however it ends: QEMU does not know
//! (it has a ring's base from the last time that it stopped the ring itself).

use std::ffi::OsString;
use std::hash::Hasher as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use siphasher::sip::SipHasher13;
use tracing::warn;
use vnic_dataplane::virtq::{CursorFile, Keeping};

use crate::vhost::{Device, RingView, SharedRegion};

/// What a port's socket path, or name, is followed by.
const SUFFIX: &str = ".rings";

/// The file of one port. Made when the first packed ring starts.
pub(super) struct Cursors {
    path: Option<PathBuf>,
    file: Option<Arc<CursorFile>>,
}

impl Cursors {
    /// `folder`: from `--ring-dir`; without it the file lies beside the socket, if that has a path.
    pub(super) fn new(folder: Option<&Path>, port: &str, socket: Option<&Path>) -> Cursors {
        let mut path = match folder {
            Some(folder) => Some(folder.join(port).into_os_string()),
            None => socket.map(OsString::from),
        };
        path.iter_mut().for_each(|path| path.push(SUFFIX));
        Cursors {
            path: path.map(PathBuf::from),
            file: None,
        }
    }

    /// How a ring that starts now is to be kept; `None`: not at all, or it need not be.
    pub(super) fn keeping(
        &mut self,
        port: &str,
        device: &Device,
        ring: usize,
        packed: bool,
    ) -> Option<Keeping> {
        if !packed {
            self.forget(ring);
            return None;
        }
        self.open(port);
        let slot = self.file.as_ref()?.slot(ring)?;
        let view = device.rings().nth(ring)?;
        Some(Keeping {
            slot,
            session: session(device.memory(), &view)?,
            told: view.told,
        })
    }

    /// The front-end knows where the ring stands.
    pub(super) fn forget(&self, ring: usize) {
        if let Some(slot) = self.file.as_ref().and_then(|file| file.slot(ring)) {
            slot.clear();
        }
    }

    /// Opens the file, once: what cannot be had now is not tried for again.
    fn open(&mut self, port: &str) {
        if self.file.is_some() {
            return;
        }
        let Some(path) = self.path.take() else { return };
        match CursorFile::open(&path) {
            Ok((file, wrong)) => {
                if let Some(wrong) = wrong {
                    warn!(
                        port,
                        "{} was no use and begins anew: {wrong}; a packed ring that another vnicd left running may stand still until \
                         its driver is restarted",
                        path.display()
                    );
                }
                self.file = Some(Arc::new(file));
            }
            Err(error) => warn!(
                port,
                "{error}; without this file the guest's packed rings stand still after a restart of vnicd: choose a folder \
                 that it can write to with --ring-dir"
            ),
        }
    }
}

impl Drop for Cursors {
    /// A file that says nothing need not stay. One that does must: the front-end was not told.
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && file.is_empty()
        {
            let _ = std::fs::remove_file(file.path());
        }
    }
}

/// Tells this ring of this guest from all others: by the files of the guest's memory, which a front-end makes anew for each guest, where
/// they are mapped, and where the ring lies in them. The same for as long as the front-end lives, whoever asks.
fn session(memory: &[SharedRegion], ring: &RingView<'_>) -> Option<u64> {
    let addrs = ring.addrs?;
    let mut hasher = SipHasher13::new();
    for region in memory {
        for part in [
            region.file.0,
            region.file.1,
            region.guest_addr,
            region.user_addr,
            region.size,
            region.mmap_offset,
        ] {
            hasher.write_u64(part);
        }
    }
    for part in [addrs.desc, addrs.avail, addrs.used, ring.size.into()] {
        hasher.write_u64(part);
    }
    Some(hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vnic_dataplane::memory::guest::RegionSpec;

    use super::*;
    use crate::vhost::{DeviceConfig, QueueNum, RingAddrs};

    fn memory() -> Arc<OwnedFd> {
        Arc::new(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("a memfd"))
    }

    fn region(fd: &Arc<OwnedFd>, guest_addr: u64) -> SharedRegion {
        let spec = RegionSpec {
            guest_addr,
            user_addr: 0x7f00_0000_0000 + guest_addr,
            size: 0x10_0000,
            mmap_offset: guest_addr,
            fd: Arc::clone(fd),
        };
        SharedRegion::of(&spec).expect("a file")
    }

    #[test]
    fn a_session_is_the_same_only_with_the_same_files_places_and_rings() {
        let (one, other) = (memory(), memory());
        let addrs = RingAddrs {
            desc: 0x1000,
            avail: 0x2000,
            used: 0x2004,
        };
        let device = Device::new(DeviceConfig {
            max_queue_pairs: 1,
            queue_num_as: QueueNum::Pairs,
        });
        let ring = |addrs, size| RingView {
            addrs,
            size,
            ..device.rings().next().expect("a ring")
        };
        let first = session(&[region(&one, 0)], &ring(Some(&addrs), 256));
        assert!(first.is_some());
        // A front-end that reconnects sends its descriptors anew.
        let again = Arc::new(one.try_clone().expect("a descriptor"));
        assert_eq!(session(&[region(&again, 0)], &ring(Some(&addrs), 256)), first);
        let elsewhere = RingAddrs {
            desc: 0x3000,
            ..addrs
        };
        for differs in [
            session(&[region(&other, 0)], &ring(Some(&addrs), 256)),
            session(&[region(&one, 0x1000)], &ring(Some(&addrs), 256)),
            session(
                &[region(&one, 0), region(&one, 0x10_0000)],
                &ring(Some(&addrs), 256),
            ),
            session(&[region(&one, 0)], &ring(Some(&elsewhere), 256)),
            session(&[region(&one, 0)], &ring(Some(&addrs), 128)),
        ] {
            assert!(differs.is_some() && differs != first);
        }
        assert_eq!(session(&[region(&one, 0)], &ring(None, 256)), None);
    }

    #[test]
    fn the_file_lies_beside_the_socket_or_in_the_folder() {
        let path = |folder: Option<&str>, socket: Option<&str>| {
            let cursors = Cursors::new(folder.map(Path::new), "web", socket.map(Path::new));
            cursors.path.clone().map(|path| path.display().to_string())
        };
        assert_eq!(
            path(None, Some("/run/vnic/a.sock")).as_deref(),
            Some("/run/vnic/a.sock.rings")
        );
        assert_eq!(path(Some("/d"), Some("/a.sock")).as_deref(), Some("/d/web.rings"));
        assert_eq!(path(Some("/d"), None).as_deref(), Some("/d/web.rings"));
        assert_eq!(path(None, None), None);
    }

    #[test]
    fn a_file_stays_only_while_it_says_something() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("web.rings");
        let open = || {
            let mut cursors = Cursors::new(Some(folder.path()), "web", None);
            cursors.open("web");
            cursors
        };
        assert!(open().file.is_some());
        assert!(!path.exists(), "nothing was kept");
        std::fs::write(&path, b"no such file").expect("a file");
        let cursors = open();
        assert!(cursors.file.is_some(), "garbage is named and ignored");
        drop(cursors);
        assert!(!path.exists());
        let mut nowhere = Cursors::new(Some(Path::new("/nowhere")), "web", None);
        nowhere.open("web");
        nowhere.open("web");
        assert!(nowhere.file.is_none() && nowhere.path.is_none(), "tried once");
    }
}
