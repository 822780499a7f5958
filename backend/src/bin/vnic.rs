//! vnic
fn main() {}
