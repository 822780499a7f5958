//! vnicd
fn main() {}
