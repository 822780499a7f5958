//! How a new session gets its NIC.
