//! The whole dataplane without root: an engine, guests that drive their rings through a memfd, and in-memory NICs.

mod concurrency;
mod lab;
mod pinned;
mod redrive;
mod rings;
mod state;
mod switching;
mod turns;
