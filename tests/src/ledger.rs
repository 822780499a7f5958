//! Which frames of a stream arrived, by which NIC and how often, while NICs lost their links.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::frontend::frames::flow;

/// A frame at the far end of a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// The NIC.
    pub nic: usize,
    /// The frame's number.
    pub number: u32,
    /// When it was read there.
    pub at: Instant,
}

/// The time without a link of a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// The NIC.
    pub nic: usize,
    /// Just before the link was taken away.
    pub lost: Instant,
    /// Just before it was given back.
    pub returned: Instant,
}

impl Outage {
    /// The time from the NIC's last frame (or the loss of its link, if that was later) to the first frame of one of its flows by another
    /// NIC; `None` if there was none before the link's return. `arrivals` are in the order of time.
    #[must_use]
    pub fn failover(&self, arrivals: &[Arrival]) -> Option<Duration> {
        let mut last_nic = BTreeMap::new();
        let mut last = self.lost;
        for arrival in arrivals.iter().take_while(|arrival| arrival.at < self.returned) {
            let before = last_nic.insert(flow(arrival.number), arrival.nic);
            if arrival.nic == self.nic {
                last = last.max(arrival.at);
            } else if arrival.at >= self.lost && before == Some(self.nic) {
                return Some(arrival.at.saturating_duration_since(last));
            }
        }
        None
    }

    /// Flows with a frame by another NIC while the link was away.
    #[must_use]
    pub fn survivors(&self, arrivals: &[Arrival]) -> usize {
        let during =
            |arrival: &&Arrival| arrival.nic != self.nic && (self.lost..self.returned).contains(&arrival.at);
        let flows: HashSet<u16> = arrivals
            .iter()
            .filter(during)
            .map(|arrival| flow(arrival.number))
            .collect();
        flows.len()
    }
}

/// What became of the frames of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Balance {
    /// Frames that never arrived, and that their flow's NIC may have had when it lost its link: the flow's frame before left by another NIC
    /// than the one after.
    pub lost: Vec<u32>,
    /// Frames that never arrived in the midst of others of their flow by the same NIC.
    pub vanished: Vec<u32>,
    /// Second arrivals by a NIC that had its link: the other one had sent the frame before it lost its own.
    pub twice: u32,
    /// Second arrivals by a NIC after its link was back: it had kept the frame.
    pub late: u32,
    /// Arrivals beyond the second.
    pub more: u32,
}

impl Balance {
    /// Of the frames 0 to `sent`, of which `arrivals` are in the order of time.
    #[must_use]
    pub fn of(sent: u32, arrivals: &[Arrival], outages: &[Outage]) -> Balance {
        let mut balance = Balance::default();
        let mut frames: BTreeMap<u32, Vec<Arrival>> = BTreeMap::new();
        for arrival in arrivals {
            frames.entry(arrival.number).or_default().push(*arrival);
        }
        for arrivals in frames.values() {
            let [first, second, more @ ..] = arrivals.as_slice() else {
                continue;
            };
            let kept = outages.iter().any(|outage| {
                outage.nic == second.nic
                    && (outage.lost..outage.returned).contains(&first.at)
                    && outage.returned <= second.at
            });
            *if kept {
                &mut balance.late
            } else {
                &mut balance.twice
            } += 1;
            balance.more += u32::try_from(more.len()).unwrap_or(u32::MAX);
        }
        for number in (0..sent).filter(|number| !frames.contains_key(number)) {
            let of_flow = |(other, arrivals): (&u32, &Vec<Arrival>)| {
                (flow(*other) == flow(number))
                    .then(|| arrivals.iter().map(|arrival| arrival.nic).collect::<Vec<_>>())
            };
            let before = frames.range(..number).rev().find_map(of_flow);
            let after = frames.range(number..).find_map(of_flow);
            if before.is_some() && after.is_some() && before != after {
                balance.lost.push(number);
            } else {
                balance.vanished.push(number);
            }
        }
        balance
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::frames::FLOWS;

    /// Frames of flow 0 as `(count, NIC, milliseconds)`.
    fn arrivals(began: Instant, list: &[(u32, usize, u64)]) -> Vec<Arrival> {
        let arrival = |&(count, nic, at)| Arrival {
            nic,
            number: count * FLOWS,
            at: began + Duration::from_millis(at),
        };
        list.iter().map(arrival).collect()
    }

    #[test]
    fn losses_and_second_arrivals_are_told_apart() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let outage = Outage {
            nic: 0,
            lost: at(10),
            returned: at(100),
        };
        // 1 was sent and copied, 2 is lost, 3 was copied and kept, 5 vanishes.
        let seen = arrivals(
            began,
            &[
                (0, 0, 8),
                (1, 0, 9),
                (1, 1, 12),
                (3, 1, 12),
                (4, 1, 13),
                (6, 1, 14),
                (3, 0, 101),
            ],
        );
        let balance = Balance::of(6 * FLOWS + 1, &seen, &[outage]);
        // The other flows have no frames at all.
        let of_flow_0 = |list: &[u32]| list.iter().filter(|number| flow(**number) == 0).count();
        assert_eq!(balance.lost, [2 * FLOWS]);
        assert_eq!(of_flow_0(&balance.vanished), 1);
        assert!(balance.vanished.contains(&(5 * FLOWS)));
        assert_eq!((balance.twice, balance.late, balance.more), (1, 1, 0));
        assert_eq!(outage.failover(&seen), Some(Duration::from_millis(2)));
        assert_eq!(outage.survivors(&seen), 1);
        assert_eq!(Outage { nic: 1, ..outage }.failover(&seen), None);
    }
}
