//! What the workers decide by: published as a whole, so that a change of weights, NICs or algorithm never waits for a
//! worker and no worker waits for it.

use std::sync::Arc;

use crate::MAX_NICS;
use crate::nics::{NicError, NicIndex, NicInfo, NicSet, NicState};
use crate::policy::{Algorithm, weights_in_force};
use crate::slots::{Server, SlotTable};

/// One published state of affairs; never changed, only replaced.
pub(crate) struct Plan {
    pub algorithm: Algorithm,
    pub slots: Arc<SlotTable>,
    pub nics: Vec<NicState>,
    /// Weights in force, by index.
    pub weights: [u32; MAX_NICS],
    /// NICs that there are.
    pub present: NicSet,
}

/// What an operator can change. Held by whoever changes it; a worker never looks here.
pub(crate) struct Planner {
    hash_key: [u8; 16],
    algorithm: Algorithm,
    nics: Vec<NicState>,
    /// Ids of removed NICs, the one that went first in front: an id gets its index back, and an index is given to
    /// another id as late as possible, since idle sessions may still be pinned to it.
    removed: Vec<(NicIndex, String)>,
}

impl Planner {
    pub(crate) fn new(algorithm: Algorithm, nics: &[NicInfo], hash_key: [u8; 16]) -> Planner {
        let state = |(nic, info): (NicIndex, &NicInfo)| NicState {
            nic,
            info: info.clone(),
            drained: false,
            speed_mbps: None,
            weight: 0,
        };
        Planner {
            hash_key,
            algorithm,
            nics: (0u8..).zip(nics.iter().take(MAX_NICS)).map(state).collect(),
            removed: Vec::new(),
        }
    }

    pub(crate) fn set_algorithm(&mut self, algorithm: Algorithm) -> Algorithm {
        std::mem::replace(&mut self.algorithm, algorithm)
    }

    pub(crate) fn nic(&mut self, nic: NicIndex) -> Result<&mut NicState, NicError> {
        let found = self.nics.iter_mut().find(|state| state.nic == nic);
        found.ok_or(NicError::Unknown(nic))
    }

    pub(crate) fn add(&mut self, info: &NicInfo) -> Result<NicIndex, NicError> {
        if self.nics.iter().any(|state| state.info.id == info.id) {
            return Err(NicError::DuplicateId(info.id.clone()));
        }
        let before = self.removed.iter().position(|(_, id)| *id == info.id);
        let unused = || {
            (0u8..).take(MAX_NICS).find(|&index| {
                let of_removed = self.removed.iter().any(|&(nic, _)| nic == index);
                !of_removed && self.nics.iter().all(|state| state.nic != index)
            })
        };
        let nic = match (before, unused()) {
            (Some(at), _) => self.removed.remove(at).0,
            (None, Some(index)) => index,
            (None, None) if !self.removed.is_empty() => self.removed.remove(0).0,
            (None, None) => return Err(NicError::NoRoom),
        };
        self.nics.push(NicState {
            nic,
            info: info.clone(),
            drained: false,
            speed_mbps: None,
            weight: 0,
        });
        self.nics.sort_by_key(|state| state.nic);
        Ok(nic)
    }

    pub(crate) fn remove(&mut self, nic: NicIndex) -> Result<(), NicError> {
        let at = self.nics.iter().position(|state| state.nic == nic);
        let state = self.nics.remove(at.ok_or(NicError::Unknown(nic))?);
        self.removed.push((nic, state.info.id));
        Ok(())
    }

    /// The plan for what is set now. The slot table of `before` is kept if it would come out the same: building one
    /// is the only costly part.
    pub(crate) fn plan(&mut self, before: Option<&Plan>) -> Plan {
        let weights = weights_in_force(self.algorithm, &self.nics);
        for state in &mut self.nics {
            state.weight = weights[usize::from(state.nic) % MAX_NICS];
        }
        let server = |state: &NicState| (state.nic, state.info.id.clone(), state.weight);
        let same = before.filter(|before| before.nics.iter().map(server).eq(self.nics.iter().map(server)));
        let slots = same.map_or_else(
            || {
                let mut servers = Vec::with_capacity(self.nics.len());
                servers.extend(self.nics.iter().map(|state| Server {
                    nic: state.nic,
                    id: &state.info.id,
                    weight: state.weight,
                }));
                Arc::new(SlotTable::new(&servers, &self.hash_key))
            },
            |before| Arc::clone(&before.slots),
        );
        Plan {
            algorithm: self.algorithm,
            slots,
            nics: self.nics.clone(),
            weights,
            present: self.nics.iter().fold(0, |set, state| set | 1 << state.nic),
        }
    }
}
