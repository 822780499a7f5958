//! `adaptive`: the NIC with the lowest latency for its idle capacity.

use super::NewSession;
use crate::nics::NicIndex;

/// NICs whose cost is within this factor of the lowest count as equal: small differences are noise, and following
/// them would send each herd of new sessions to the NIC that was best a moment ago.
const HYSTERESIS: f64 = 1.1;

/// Utilisation beyond which a NIC does not get dearer: 100 times the cost of an idle one.
const MAX_UTILISATION: f64 = 0.99;

/// What the measurements say of one NIC, as of the last [`crate::balancer::Balancer::tick`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NicCost {
    /// Latency over that of the best NIC, times the penalty for refused frames; 1 or more.
    pub latency: f64,
    /// Part of the capacity in use, 0 to 1.
    pub utilisation: f64,
    /// Part of the capacity that one more session is expected to use.
    pub per_session: f64,
    /// Sessions then.
    pub sessions: u64,
}

impl NicCost {
    /// The cost with `sessions` pinned to the NIC: what came since the measurement has yet to show in it.
    pub(crate) fn with(&self, sessions: u64) -> f64 {
        let since = sessions.saturating_sub(self.sessions) as f64;
        let utilisation = self.utilisation + since * self.per_session;
        self.latency / (1.0 - utilisation.min(MAX_UTILISATION))
    }
}

pub(super) fn choose(session: &NewSession<'_>, cost: impl Fn(NicIndex) -> NicCost) -> Option<NicIndex> {
    let costs = session
        .in_order()
        .map(|nic| (cost(nic).with(session.loads.sessions[usize::from(nic)]), nic));
    let lowest = costs.clone().map(|(cost, _)| cost).fold(f64::INFINITY, f64::min);
    costs
        .into_iter()
        .find(|&(cost, _)| cost <= lowest * HYSTERESIS)
        .map(|(_, nic)| nic)
}
