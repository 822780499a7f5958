//! The daemon `vnicd` and the operator's command line `vnic`.

pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod host;
pub mod vhost;
