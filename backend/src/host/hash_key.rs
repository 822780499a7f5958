//! The key of the session hash, kept in a file so that a restart sends every session the same way again.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the key (SipHash's).
pub const KEY_SIZE: usize = 16;
/// Name of the file in the state folder.
pub const FILE_NAME: &str = "hash.key";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum HashKeyError {
    /// Damaged, or not ours.
    #[error(
        "{} has {size} bytes and a hash key has {KEY_SIZE}: restore it from a backup, or remove it to get a new key \
         (sessions may then move to other NICs once)", .path.display()
    )]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes, at most one more than a key's.
        size: usize,
    },
    /// The system refused.
    #[error("cannot {action} {}: {source}; check its permissions or choose another folder with --state-dir", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Reads the key from `state_dir`, or makes one there (mode 0600) if there is none; makes the folder too (mode 0700).
pub fn load_or_create(state_dir: &Path) -> Result<[u8; KEY_SIZE], HashKeyError> {
    let path = state_dir.join(FILE_NAME);
    if let Some(key) = load(&path)? {
        return Ok(key);
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .map_err(failed("create", state_dir))?;
    create(&path)?;
    // Read it again: if two daemons start at once, both must use the key that was first.
    load(&path)?.ok_or_else(|| failed("read", &path)(io::ErrorKind::NotFound.into()))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HashKeyError {
    let path = path.to_owned();
    move |source| HashKeyError::Io { path, action, source }
}

fn load(path: &Path) -> Result<Option<[u8; KEY_SIZE]>, HashKeyError> {
    let file = match OpenOptions::new().read(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mode = file
        .metadata()
        .map_err(failed("look at", path))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others may read the hash key and so aim sessions at one NIC: chmod 600 it");
    }
    let mut bytes = Vec::with_capacity(KEY_SIZE + 1);
    file.take(KEY_SIZE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    match <[u8; KEY_SIZE]>::try_from(bytes.as_slice()) {
        Ok(key) => Ok(Some(key)),
        Err(_) => Err(HashKeyError::WrongSize {
            path: path.to_owned(),
            size: bytes.len(),
        }),
    }
}

/// Writes a new key beside the path and links it there: the path never names half a key, and an existing one stays.
fn create(path: &Path) -> Result<(), HashKeyError> {
    let mut key = [0; KEY_SIZE];
    let urandom = Path::new("/dev/urandom");
    let mut random = OpenOptions::new()
        .read(true)
        .open(urandom)
        .map_err(failed("open", urandom))?;
    random.read_exact(&mut key).map_err(failed("read", urandom))?;

    let temporary = path.with_extension(format!("key.{}.tmp", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(&key)?;
            file.sync_all()
        });
    let linked = written.and_then(|()| std::fs::hard_link(&temporary, path));
    let _ = std::fs::remove_file(&temporary);
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("deep/state");
        let key = load_or_create(&state).unwrap();
        assert_eq!(load_or_create(&state).unwrap(), key);
        assert_ne!(key, [0; KEY_SIZE]);
        let mode = std::fs::metadata(state.join(FILE_NAME))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            std::fs::read_dir(&state).unwrap().count(),
            1,
            "no temporary file is left"
        );
        let other = tempfile::tempdir().unwrap();
        assert_ne!(load_or_create(other.path()).unwrap(), key);
    }

    #[test]
    fn a_damaged_key_is_told_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        for size in [0, 15, 17] {
            std::fs::write(&path, vec![1; size]).unwrap();
            let message = load_or_create(dir.path()).unwrap_err().to_string();
            assert!(
                message.contains(&format!("{size} bytes")) && message.contains("remove it"),
                "{message}"
            );
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size as u64);
        }
    }

    #[test]
    fn an_impossible_folder_is_told() {
        let message = load_or_create(Path::new("/dev/null/state"))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("/dev/null/state") && message.contains("--state-dir"),
            "{message}"
        );
    }
}
