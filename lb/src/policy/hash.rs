//! `hash`: the session's slot decides.

use super::{NewSession, Policy};
use crate::nics::NicIndex;

/// Gives the same answer with a full table, after a restart, and on another host with the same hash key.
#[derive(Debug, Clone, Copy, Default)]
pub struct HashPolicy;

impl Policy for HashPolicy {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn choose(&self, session: &NewSession<'_>) -> Option<NicIndex> {
        session.slots.choose(session.slot, session.alive)
    }
}
