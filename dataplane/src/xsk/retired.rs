//! What happens to the chunks of a closed socket.
//!
//! When both halves of a queue are dropped, the chunks on its rings are quarantined and the socket closes. The kernel lets go of the
//! memory later: a driver's rings are torn down by a work item, and in copy mode a frame may wait in a device's own ring. Until then a chunk given
//! to somebody else could be overwritten, or its new bytes (another guest's) sent. The kernel keeps the queue assigned exactly that
//! long (net/xdp/xsk.c, xsk_destruct; net/xdp/xsk_buff_pool.c, xp_release_deferred, xp_clear_dev), so being able to bind it
//! again, or its interface being gone, is the sign that the chunks are ours.

use std::io;
use std::time::Instant;

use super::socket::family;
use super::syscall::{self, Mapping};
use crate::memory::frames::{CHUNK_SIZE, CHUNK_SIZE_U32, FrameMemory, QueueOwner, RetiredQueue};

/// Quarantines the chunks of a queue whose socket is about to close.
pub(super) fn retire(memory: &FrameMemory, owner: QueueOwner, ifindex: u32, queue: u32) {
    if memory.quarantine(owner) > 0 {
        memory.retired().push(RetiredQueue {
            owner,
            ifindex,
            queue,
            since: Instant::now(),
        });
    }
}

/// A new socket was bound to a queue: the kernel is done with those before it.
pub(super) fn rebound(memory: &FrameMemory, ifindex: u32, queue: u32) {
    memory.retired().retain(|retired| {
        let done = retired.ifindex == ifindex && retired.queue == queue;
        if done {
            memory.release(retired.owner);
        }
        !done
    });
}

/// Gives the chunks of closed queues back to the pool where the kernel is done with them; returns how many chunks are still quarantined.
///
/// For the control thread, once a second or so, while [`FrameMemory::census`] shows quarantined chunks: it makes system calls and may
/// take milliseconds. A queue that is opened again is released by that.
pub fn release_retired(memory: &FrameMemory) -> u32 {
    memory.retired().retain(|retired| {
        let done = torn_down(retired.ifindex, retired.queue);
        if done {
            let chunks = memory.release(retired.owner);
            let after_ms = u64::try_from(retired.since.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::debug!(
                ifindex = retired.ifindex,
                queue = retired.queue,
                chunks,
                after_ms,
                "released a retired queue"
            );
        }
        !done
    });
    memory.census().quarantined
}

/// Whether nothing is assigned to the queue any more: tries to bind it for a moment.
fn torn_down(ifindex: u32, queue: u32) -> bool {
    match probe(ifindex, queue) {
        Ok(()) => true,
        // No such interface: unregistering it waits for the queue.
        Err(error) => error.raw_os_error() == Some(libc::ENODEV),
    }
}

fn probe(ifindex: u32, queue: u32) -> io::Result<()> {
    let scratch = Mapping::anonymous(CHUNK_SIZE)?;
    let fd = syscall::socket(libc::AF_XDP, 0)?;
    // SAFETY: the scratch page is referred to by nobody, and outlives the socket's use of it: the kernel pins it, besides.
    unsafe { syscall::register_umem(&fd, scratch.address(), CHUNK_SIZE, CHUNK_SIZE_U32) }?;
    for option in [
        libc::XDP_UMEM_FILL_RING,
        libc::XDP_UMEM_COMPLETION_RING,
        libc::XDP_TX_RING,
    ] {
        syscall::set_option(&fd, libc::SOL_XDP, option, &1u32)?;
    }
    let address = libc::sockaddr_xdp {
        sxdp_family: family(),
        sxdp_flags: libc::XDP_COPY,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    syscall::bind(&fd, &address)
}
