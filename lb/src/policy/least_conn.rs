//! `least_conn`: the NIC with the fewest sessions for its weight.

use super::NewSession;
use crate::nics::NicIndex;

/// Half-open sessions of a NIC that count as sessions, whatever else it has.
const HALF_OPEN_CAP: u64 = 1024;

/// argmin (sessions + 1) / weight. Anybody can send SYNs, so half-open sessions count up to a cap only. A flood drives
/// every NIC to its cap; then the SYNs say nothing any more and go by their slots, `None` here.
pub(super) fn choose(session: &NewSession<'_>) -> Option<NicIndex> {
    let mut best: Option<(f64, NicIndex)> = None;
    for nic in session.in_order() {
        let at = usize::from(nic);
        let half_open = session.loads.half_open[at];
        let established = session.loads.sessions[at].saturating_sub(half_open);
        let cap = HALF_OPEN_CAP + established / 8;
        if session.opening && half_open >= cap {
            continue;
        }
        let cost = (established + half_open.min(cap) + 1) as f64 / session.weight(nic);
        if best.is_none_or(|(lowest, _)| cost < lowest) {
            best = Some((cost, nic));
        }
    }
    best.map(|(_, nic)| nic)
}
