//! Who probes whom: what the operator asked for, and what NICs, programs and the health thread are told of it.

use std::net::IpAddr;
use std::sync::PoisonError;

use anyhow::Result;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use tracing::warn;
use vnic_dataplane::probe::{Asker, ProbeTarget};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::Daemon;
use super::drive::Drive;
use super::health::{Command, ProbePlan};
use super::kept::Done;
use super::nic::{NicRuntime, Phase};
use super::operator::Refusal;
use crate::config;
use crate::control::protocol::{CallError, ErrorCode, Reply};
use crate::control::report::NicProbeReport;

/// Answers that a NIC's program counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected {
    asker: Mac,
    nic: NicIndex,
    target: ProbeTarget,
}

impl Daemon {
    /// `nic_probe`
    pub(super) fn set_probe(&mut self, id: &str, target: Option<&str>) -> Result<Reply, CallError> {
        let index = self.nic_called(id)?.index();
        let target = config::probe_of(target.unwrap_or("off"))
            .map_err(|error| CallError::new(ErrorCode::BadParams, error.to_string()))?;
        let text = |target: Option<ProbeTarget>| target.map(|target| target.to_string());
        let Some(nic) = self.nic_at(index) else {
            return Err(CallError::new(ErrorCode::NotFound, "the NIC is gone"));
        };
        let before = std::mem::replace(&mut nic.config.probe, target);
        // Answers that are counted although nobody asks do no harm.
        let failure = match target {
            Some(_) => self.expect_answers().into_iter().next(),
            None => None,
        };
        if let Some((by, error)) = failure {
            if let Some(nic) = self.nic_at(index) {
                nic.config.probe = before;
            }
            self.arm_probes();
            return Err(Refusal::Probe {
                id: id.to_owned(),
                by,
                cause: format!("{error:#}"),
            }
            .into());
        }
        let report = NicProbeReport {
            id: id.to_owned(),
            probe: text(target),
            before: text(before),
        };
        self.arm_probes();
        let cause = report.probe.as_deref().unwrap_or("off");
        self.journal.note(Some(id), "probe", cause);
        Reply::report(&report)
    }

    /// Whether nobody probes, nor has the traces of it.
    fn probes_nothing(&self) -> bool {
        let idle = |nic: &NicRuntime| nic.config.probe.is_none() && nic.probing.is_none();
        let expects_nothing = |drive: &Drive| drive.expected.is_empty();
        let mut drives = self.nics.iter().filter_map(|nic| nic.drive.as_ref());
        self.nics.iter().all(idle) && drives.all(expects_nothing)
    }

    /// Has the keeper list the host's addresses, for which the kernel may take its time; then comes [`Daemon::addresses_listed`].
    pub(super) fn list_addresses(&mut self) {
        if !self.addresses.is_listing && !self.probes_nothing() {
            self.addresses.is_listing = true;
            self.keeper.run(|| Done::Addresses(host_addresses()));
        }
    }

    /// Takes in the host's addresses, which come and go.
    pub(super) fn addresses_listed(&mut self, all: Vec<HostAddress>) {
        self.addresses = Addresses {
            known: Some(all),
            is_listing: false,
        };
        self.arm_probes();
    }

    /// Has every NIC's program count the answers to all probes that are asked for; returns which NICs' cannot, and why.
    fn expect_answers(&mut self) -> Vec<(String, anyhow::Error)> {
        let asking = self.nics.iter().filter(|nic| nic.drive.is_some());
        let expected: Vec<Expected> = asking
            .filter_map(|nic| {
                Some(Expected {
                    asker: nic.mac(),
                    nic: nic.index(),
                    target: nic.config.probe?,
                })
            })
            .collect();
        let mut failures = Vec::new();
        for nic in &mut self.nics {
            let own = nic.mac();
            let Some(drive) = &mut nic.drive else { continue };
            if let Err(error) = drive.expect(&expected, own) {
                failures.push((nic.config.id.clone(), error));
            }
        }
        failures
    }

    /// Brings what is probed to what is asked for, and to the addresses that the NICs have now. Costs nothing while nobody probes.
    pub(super) fn arm_probes(&mut self) {
        if self.probes_nothing() {
            // Whoever probes next begins with those of that time.
            self.addresses.known = None;
            return;
        }
        self.count_answers();
        if self.addresses.known.is_none() {
            return self.list_addresses();
        }
        for nic in &mut self.nics {
            let plan = nic.probe_plan(&self.addresses);
            if matches!(nic.phase, Phase::Driven) && nic.probing != plan {
                nic.probing = plan;
                self.health.tell(Command::Probe(nic.index(), plan));
            }
        }
    }

    /// [`Daemon::expect_answers`], and a word in the log where that fails.
    pub(super) fn count_answers(&mut self) {
        for (nic, error) in self.expect_answers() {
            warn!(nic, "cannot take answers to probes: {error:#}");
        }
    }
}

impl NicRuntime {
    /// Whom it is to probe; `addresses` are the host's, if they are known.
    pub(super) fn probe_plan(&self, addresses: &Addresses) -> Option<ProbePlan> {
        let target = self.config.probe?;
        let known = addresses.known.as_deref().unwrap_or_default();
        let asker = Asker {
            mac: self.mac(),
            address: own_address(known, &self.interface.name, target.address()),
        };
        Some(ProbePlan { target, asker })
    }
}

/// What counts the answers that come by one NIC.
trait Counter {
    fn count(&mut self, answers: &Expected) -> Result<()>;
    fn count_no_more(&mut self, asker: Mac) -> Result<()>;
    /// Lets frames to another NIC's address in, or no more: they go to the host and are counted on the way.
    fn admit(&mut self, asker: Mac, admit: bool) -> Result<()>;
}

impl Counter for Drive {
    fn count(&mut self, answers: &Expected) -> Result<()> {
        Ok(self
            .program
            .expect_answers(answers.asker, answers.nic, answers.target)?)
    }

    fn count_no_more(&mut self, asker: Mac) -> Result<()> {
        Ok(self.program.expect_no_answers(asker)?)
    }

    fn admit(&mut self, asker: Mac, admit: bool) -> Result<()> {
        if let Some(group) = &self.nic.group {
            let group = group.tap.lock().unwrap_or_else(PoisonError::into_inner);
            match admit {
                true => group.admit(asker)?,
                false => group.withdraw(asker)?,
            }
        }
        Ok(())
    }
}

impl Drive {
    /// Has the program count these answers and no others, and the NIC let them in: in a lag they come by any NIC.
    fn expect(&mut self, wanted: &[Expected], own: Mac) -> Result<()> {
        let mut counted = std::mem::take(&mut self.expected);
        let outcome = bring(self, &mut counted, wanted, own);
        self.expected = counted;
        outcome
    }
}

/// Brings what is `counted` to what is `wanted`. After an error `counted` is what is counted indeed, and the way back is the same way.
fn bring(
    counter: &mut impl Counter,
    counted: &mut Vec<Expected>,
    wanted: &[Expected],
    own: Mac,
) -> Result<()> {
    let is_over = |old: &Expected| wanted.iter().all(|new| new.asker != old.asker);
    while let Some(at) = counted.iter().position(is_over) {
        let asker = counted[at].asker;
        counter.count_no_more(asker)?;
        counted.swap_remove(at);
        if asker != own {
            counter.admit(asker, false)?;
        }
    }
    for new in wanted.iter().copied() {
        match counted.iter_mut().find(|old| old.asker == new.asker) {
            Some(old) if *old == new => {}
            Some(old) => {
                counter.count(&new)?;
                *old = new;
            }
            None => {
                counter.count(&new)?;
                counted.push(new);
                if new.asker != own {
                    counter.admit(new.asker, true)?;
                }
            }
        }
    }
    Ok(())
}

/// The host's addresses, as the keeper has listed them.
#[derive(Default)]
pub(super) struct Addresses {
    /// `None` while nobody probes.
    known: Option<Vec<HostAddress>>,
    /// The keeper is at it.
    is_listing: bool,
}

/// An address of an interface, and the mask of its network.
pub(super) struct HostAddress {
    ifname: String,
    address: IpAddr,
    mask: IpAddr,
}

/// Addresses of the host's interfaces; none if the kernel does not tell.
fn host_addresses() -> Vec<HostAddress> {
    let listed = |entry: InterfaceAddress| {
        let (address, mask) = (entry.address?, entry.netmask?);
        let v4 = address.as_sockaddr_in().zip(mask.as_sockaddr_in());
        let v6 = address.as_sockaddr_in6().zip(mask.as_sockaddr_in6());
        let (address, mask) = match (v4, v6) {
            (Some((address, mask)), _) => (IpAddr::V4(address.ip()), IpAddr::V4(mask.ip())),
            (_, Some((address, mask))) => (IpAddr::V6(address.ip()), IpAddr::V6(mask.ip())),
            _ => return None,
        };
        Some(HostAddress {
            ifname: entry.interface_name,
            address,
            mask,
        })
    };
    getifaddrs().map_or_else(|_| Vec::new(), |all| all.filter_map(listed).collect())
}

/// The interface's address in the network of `target`.
fn own_address(all: &[HostAddress], ifname: &str, target: IpAddr) -> Option<IpAddr> {
    let is_near = |entry: &&HostAddress| match (entry.address, target, entry.mask) {
        (IpAddr::V4(own), IpAddr::V4(target), IpAddr::V4(mask)) => {
            let [own, target, mask] = [own, target, mask].map(u32::from);
            (own ^ target) & mask == 0
        }
        (IpAddr::V6(own), IpAddr::V6(target), IpAddr::V6(mask)) => {
            let [own, target, mask] = [own, target, mask].map(u128::from);
            (own ^ target) & mask == 0
        }
        _ => false,
    };
    let mut of_nic = all.iter().filter(|entry| entry.ifname == ifname);
    of_nic.find(is_near).map(|entry| entry.address)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Counts what it is told to, but nothing of one asker.
    #[derive(Default)]
    struct Fake {
        counts: BTreeMap<Mac, ProbeTarget>,
        admits: Vec<Mac>,
        refuses: Option<Mac>,
    }

    impl Counter for Fake {
        fn count(&mut self, answers: &Expected) -> Result<()> {
            anyhow::ensure!(self.refuses != Some(answers.asker), "no room");
            self.counts.insert(answers.asker, answers.target);
            Ok(())
        }

        fn count_no_more(&mut self, asker: Mac) -> Result<()> {
            self.counts.remove(&asker);
            Ok(())
        }

        fn admit(&mut self, asker: Mac, admit: bool) -> Result<()> {
            match admit {
                true => self.admits.push(asker),
                false => self.admits.retain(|admitted| *admitted != asker),
            }
            Ok(())
        }
    }

    fn expected(last: u8, target: &str) -> Expected {
        Expected {
            asker: Mac([2, 0, 0, 0, 0, last]),
            nic: last,
            target: target.parse().expect("a target"),
        }
    }

    #[test]
    fn what_cannot_be_counted_leaves_the_way_back() {
        let own = expected(1, "192.0.2.1").asker;
        let before = [expected(1, "192.0.2.1"), expected(2, "192.0.2.2")];
        let wanted = [expected(1, "192.0.2.9"), expected(3, "192.0.2.3")];
        let mut fake = Fake {
            refuses: Some(wanted[1].asker),
            ..Fake::default()
        };
        let mut counted = Vec::new();
        bring(&mut fake, &mut counted, &before, own).expect("room");
        assert_eq!(
            (&counted[..], &fake.admits[..]),
            (&before[..], &[before[1].asker][..])
        );
        let first = fake.counts.clone();
        assert!(bring(&mut fake, &mut counted, &wanted, own).is_err());
        assert_eq!(counted, wanted[..1]);
        bring(&mut fake, &mut counted, &before, own).expect("room");
        assert_eq!((fake.counts.clone(), &counted[..]), (first, &before[..]));
        assert_eq!(fake.admits, [before[1].asker]);
        bring(&mut fake, &mut counted, &[], own).expect("room");
        assert!(counted.is_empty() && fake.counts.is_empty() && fake.admits.is_empty());
    }

    #[test]
    fn a_nic_asks_by_its_address_in_the_network_of_the_target() {
        let address = |ifname: &str, address: &str, mask: &str| HostAddress {
            ifname: ifname.to_owned(),
            address: address.parse().expect("an address"),
            mask: mask.parse().expect("a mask"),
        };
        let all = [
            address("lo", "192.0.2.8", "255.255.255.0"),
            address("eth0", "10.0.0.1", "255.0.0.0"),
            address("eth0", "192.0.2.7", "255.255.255.0"),
            address("eth0", "fe80::7", "ffff:ffff:ffff:ffff::"),
        ];
        let of = |target: &str| own_address(&all, "eth0", target.parse().expect("an address"));
        assert_eq!(of("192.0.2.1"), Some(all[2].address));
        assert_eq!(of("fe80::1"), Some(all[3].address));
        assert_eq!(of("198.51.100.1"), None);
    }

    #[test]
    fn the_host_lists_its_loopback_address() {
        let target = "127.0.0.9".parse().expect("an address");
        assert!(own_address(&host_addresses(), "lo", target).is_some());
    }
}
