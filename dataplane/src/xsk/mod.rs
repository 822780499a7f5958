//! AF_XDP: the kernel interface, rings, UMEM registration and sockets.
//!
//! [`open_queue`] makes one socket for one queue of one NIC, with the whole [`crate::memory::frames::FrameMemory`] registered as that
//! socket's own UMEM (not XDP_SHARED_UMEM: a shared bind forces the first socket's mode on all), and gives its
//! two halves, [`XskRx`] and [`XskTx`]. Dropping both retires the queue: see [`retired`].

pub mod ethtool;
pub(crate) mod packet_ring;
pub mod retired;
mod ring;
mod rx;
mod socket;
mod syscall;
mod tx;

pub use rx::XskRx;
pub use socket::{XskConfig, XskError, XskInfo, ZeroCopy, open_queue};
pub(crate) use syscall::run_first;
pub use tx::XskTx;
