//! The two kinds of memory that frames live in: the guests' ([`guest`]) and our own ([`frames`]).

pub mod frames;
pub mod guest;
mod huge;

pub use huge::prefer_huge_pages;
