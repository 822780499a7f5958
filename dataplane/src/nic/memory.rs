//! The in-memory twin of a NIC queue.
