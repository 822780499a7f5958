//! The canonical, bidirectional session key.

/// Both directions of a flow give the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionKey {
    _private: (),
}
