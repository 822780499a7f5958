//! Kick, call and error fds.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::eventfd::EventFd;

/// Takes a received fd as an eventfd, or says what is wrong with it.
///
/// A worker writes to what comes out of this. A blocking pipe, a full socket or a terminal in its place could hold the worker
/// up and with it every other guest, so only eventfds are taken, and they are made non-blocking.
pub(super) fn adopt(fd: OwnedFd) -> Result<Arc<EventFd>, String> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = fs::read_link(&link).map_err(|error| format!("cannot be examined in {link}: {error}"))?;
    if target != Path::new("anon_inode:[eventfd]") {
        return Err(format!("is not an eventfd but {}", target.display()));
    }
    fcntl(&fd, FcntlArg::F_GETFL)
        .map(|flags| OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)
        .and_then(|flags| fcntl(&fd, FcntlArg::F_SETFL(flags)))
        .map_err(|errno| format!("cannot be made non-blocking: {errno}"))?;
    // SAFETY: `into_raw_fd` gives up the only ownership of the open descriptor, which the new EventFd takes over.
    Ok(Arc::new(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eventfd_is_taken_and_made_nonblocking() {
        let event = EventFd::new(0).unwrap();
        // SAFETY: as in `adopt`.
        let owned = unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) };
        let adopted = adopt(owned).unwrap();
        assert_eq!(adopted.read().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        adopted.write(3).unwrap();
        assert_eq!(adopted.read().unwrap(), 3);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        let text = adopt(fs::File::open("/dev/null").unwrap().into()).unwrap_err();
        assert!(text.contains("/dev/null"), "{text}");
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(adopt(reader.into()).unwrap_err().contains("pipe"));
    }
}
