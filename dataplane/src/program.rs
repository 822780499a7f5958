//! The XDP program: loading, attaching, and its maps.
