//! Who probes whom: what the operator asked for, and what NICs, programs and the health thread are told of it.

use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use tracing::warn;
use vnic_dataplane::probe::{Asker, ProbeTarget};
use vnic_lb::mac::Mac;
use vnic_lb::nics::NicIndex;

use super::Daemon;
use super::drive::Drive;
use super::health::{Command, ProbePlan};
use super::nic::{NicRuntime, Phase};
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
        let report = NicProbeReport {
            id: id.to_owned(),
            probe: text(target),
            before: text(std::mem::replace(&mut nic.config.probe, target)),
        };
        self.arm_probes();
        let cause = report.probe.as_deref().unwrap_or("off");
        self.journal.note(Some(id), "probe", cause);
        Reply::report(&report)
    }

    /// Brings what is probed to what is asked for, and to the addresses that the NICs have now. Costs nothing while nobody probes.
    pub(super) fn arm_probes(&mut self) {
        let idle = |nic: &NicRuntime| nic.config.probe.is_none() && nic.probing.is_none();
        let expects_nothing = |drive: &Drive| drive.expected.is_empty();
        let mut drives = self.nics.iter().filter_map(|nic| nic.drive.as_ref());
        if self.nics.iter().all(idle) && drives.all(expects_nothing) {
            return;
        }
        self.expect_answers();
        for nic in &mut self.nics {
            let plan = nic.probe_plan();
            if matches!(nic.phase, Phase::Driven) && nic.probing != plan {
                nic.probing = plan;
                self.health.tell(Command::Probe(nic.index(), plan));
            }
        }
    }

    /// Has the NICs let in and count the answers to all that is asked.
    pub(super) fn expect_answers(&mut self) {
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
        for nic in &mut self.nics {
            let own = nic.mac();
            let Some(drive) = &mut nic.drive else { continue };
            if let Err(error) = drive.expect(&expected, own) {
                warn!(nic = nic.config.id, "cannot take answers to probes: {error:#}");
            }
        }
    }
}

impl NicRuntime {
    /// Whom it is to probe, with the addresses that it has now.
    pub(super) fn probe_plan(&self) -> Option<ProbePlan> {
        let target = self.config.probe?;
        let address = own_address(&self.interface.name, target.address());
        let mac = self.mac();
        Some(ProbePlan {
            target,
            asker: Asker { mac, address },
        })
    }
}

impl Drive {
    /// Has the program count these answers and no others, and the NIC let them in: in a lag they come by any NIC.
    fn expect(&mut self, expected: &[Expected], own: Mac) -> anyhow::Result<()> {
        let over: Vec<Expected> = self
            .expected
            .extract_if(.., |old| !expected.contains(old))
            .collect();
        for old in over {
            self.program.expect_no_answers(old.asker)?;
            if old.asker != own {
                self.admit_answers(old.asker, false)?;
            }
        }
        for new in expected {
            if self.expected.contains(new) {
                continue;
            }
            self.program.expect_answers(new.asker, new.nic, new.target)?;
            if new.asker != own {
                self.admit_answers(new.asker, true)?;
            }
            self.expected.push(*new);
        }
        Ok(())
    }
}

/// The interface's address in the network of `target`.
fn own_address(ifname: &str, target: IpAddr) -> Option<IpAddr> {
    let all = getifaddrs().ok()?;
    let mut of_nic = all.filter(|address| address.interface_name == ifname);
    of_nic.find_map(|entry| {
        let (address, mask) = (entry.address?, entry.netmask?);
        if let (IpAddr::V4(target), Some(address), Some(mask)) =
            (target, address.as_sockaddr_in(), mask.as_sockaddr_in())
        {
            let [own, target, mask] = [address.ip(), target, mask.ip()].map(u32::from);
            return ((own ^ target) & mask == 0).then(|| IpAddr::V4(address.ip()));
        }
        if let (IpAddr::V6(target), Some(address), Some(mask)) =
            (target, address.as_sockaddr_in6(), mask.as_sockaddr_in6())
        {
            let [own, target, mask] = [address.ip(), target, mask.ip()].map(u128::from);
            return ((own ^ target) & mask == 0).then(|| IpAddr::V6(address.ip()));
        }
        None
    })
}
