//! The shared session table.
