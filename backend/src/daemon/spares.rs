//! Whether the others can do without a NIC: asked before one is drained, given the weight 0 or removed.
//!
//! Only the keeper changes the balancer's NICs, one order after the other: what was found here holds until the order is carried
//! out, but for links that die, which no order can be held up for.

use vnic_lb::balancer::Balancer;
use vnic_lb::nics::{NicError, NicIndex, NicState};

/// A NIC is needed. Nothing was changed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum SpareError {
    #[error(
        "no NIC would be left that takes new sessions: first give another one a weight (`vnic nic set NIC weight=1`) or \
         undrain it (`vnic nic undrain NIC`)"
    )]
    NoneLeft,
    #[error(
        "NIC {id} carries all new sessions, since no other NIC that takes any is alive: bring the link of another one up \
         first (`vnic nics` shows them)"
    )]
    NoneAlive { id: String },
    #[error(
        "NIC {id}: with weight=0 it takes no new sessions, and no other NIC does: give it a weight of 1 or more, or none"
    )]
    Alone { id: String },
    #[error(transparent)]
    Nic(#[from] NicError),
}

const fn takes(nic: &NicState) -> bool {
    !nic.drained && !matches!(nic.info.weight, Some(0))
}

/// Whether another NIC takes new sessions if this one does not.
pub(super) fn check(balancer: &Balancer, nic: NicIndex) -> Result<(), SpareError> {
    let nics = balancer.nics();
    let Some(this) = nics.iter().find(|state| state.nic == nic) else {
        return Err(NicError::Unknown(nic).into());
    };
    let others = || nics.iter().filter(|state| state.nic != nic && takes(state));
    if others().next().is_none() {
        return Err(SpareError::NoneLeft);
    }
    let alive = balancer.alive();
    if alive.contains(nic) && !others().any(|state| alive.contains(state.nic)) {
        let id = this.info.id.clone();
        return Err(SpareError::NoneAlive { id });
    }
    Ok(())
}

/// [`Balancer::drain`] for one that the others can do without.
pub(super) fn drain(balancer: &Balancer, nic: NicIndex) -> Result<u64, SpareError> {
    check(balancer, nic)?;
    Ok(balancer.drain(nic)?)
}

/// [`Balancer::remove_nic`] for one that the others can do without, or for the only one.
pub(super) fn remove(balancer: &Balancer, nic: NicIndex) -> Result<u64, SpareError> {
    if balancer.nics().len() > 1 {
        check(balancer, nic)?;
    }
    Ok(balancer.remove_nic(nic)?)
}

/// Whether a NIC may be added with this weight.
pub(super) fn check_new(balancer: &Balancer, id: &str, weight: Option<u32>) -> Result<(), SpareError> {
    match weight {
        Some(0) if !balancer.nics().iter().any(takes) => Err(SpareError::Alone { id: id.to_owned() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vnic_lb::balancer::BalancerConfig;
    use vnic_lb::limits::{SessionLimits, Timeouts};
    use vnic_lb::nics::NicInfo;
    use vnic_lb::policy::Algorithm;

    use super::*;

    /// NICs `a`, `b` and so on, of which those in `alive` are.
    fn balancer(nics: u8, alive: &[NicIndex]) -> Arc<Balancer> {
        let info = |nic: u8| NicInfo {
            id: char::from(b'a' + nic).to_string(),
            weight: None,
        };
        let balancer = Balancer::new(&BalancerConfig {
            nics: (0..nics).map(info).collect(),
            algorithm: Algorithm::Hash,
            session_capacity: 1,
            workers: 1,
            timeouts: Timeouts::default(),
            limits: SessionLimits::default(),
            hash_key: [0; 16],
        });
        for nic in alive {
            balancer.set_alive(*nic, true, 0);
        }
        balancer
    }

    #[test]
    fn the_only_nic_that_is_alive_is_needed() {
        let balancer = balancer(2, &[0]);
        let needed = Err(SpareError::NoneAlive { id: "a".into() });
        assert_eq!(drain(&balancer, 0), needed);
        assert_eq!(remove(&balancer, 0), needed);
        assert!(balancer.nics().iter().all(takes), "nothing was changed");
        assert_eq!(drain(&balancer, 1), Ok(0), "a dead one carries nothing");
        let balancer = self::balancer(2, &[]);
        assert_eq!(drain(&balancer, 0), Ok(0), "nor do two");
    }

    #[test]
    fn of_two_orders_in_a_row_the_second_finds_what_the_first_has_done() {
        for first in [
            drain as fn(&Balancer, NicIndex) -> Result<u64, SpareError>,
            remove,
        ] {
            let balancer = balancer(3, &[0, 1, 2]);
            assert_eq!(drain(&balancer, 2), Ok(0));
            assert_eq!(first(&balancer, 0), Ok(0));
            assert_eq!(drain(&balancer, 1), Err(SpareError::NoneLeft));
            assert_eq!(remove(&balancer, 1), Err(SpareError::NoneLeft));
            balancer.undrain(2).unwrap();
            assert_eq!(drain(&balancer, 1), Ok(0));
        }
        let balancer = balancer(2, &[0, 1]);
        balancer.set_weight(1, Some(0)).unwrap();
        assert_eq!(check(&balancer, 0), Err(SpareError::NoneLeft));
    }

    #[test]
    fn the_only_nic_may_go_and_must_have_a_weight() {
        let balancer = balancer(1, &[0]);
        assert_eq!(drain(&balancer, 0), Err(SpareError::NoneLeft));
        assert_eq!(check_new(&balancer, "b", Some(0)), Ok(()));
        assert_eq!(remove(&balancer, 0), Ok(0));
        let alone = Err(SpareError::Alone { id: "b".into() });
        assert_eq!(check_new(&balancer, "b", Some(0)), alone);
        assert_eq!(check_new(&balancer, "b", None), Ok(()));
        assert_eq!(remove(&balancer, 0), Err(SpareError::Nic(NicError::Unknown(0))));
    }
}
