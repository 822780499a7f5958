//! Offloads of a NIC that stand between its wire and AF_XDP, put out of the way and back.
//!
//! A NIC that takes VLAN tags out of received frames does so before the XDP program runs: the tag is then in a descriptor that
//! AF_XDP does not show. A NIC that filters VLANs drops those that nobody on the host has joined. Sending needs nothing: a frame on an
//! AF_XDP ring has its tag in its bytes, and no NIC touches that.

use std::io;

use tracing::warn;
use vnic_dataplane::xsk::ethtool::{Ethtool, Feature};

/// Takes tags out of received frames: customer tags, service tags (`rxvlan` and `rx-vlan-stag-hw-parse` of ethtool(8)).
const STRIPPING: [&str; 2] = ["rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"];
/// Drops frames of VLANs that were not joined.
const FILTERS: [&str; 2] = ["rx-vlan-filter", "rx-vlan-stag-filter"];

/// Drivers whose frames may come from a kernel that left the checksum to a device: the other end of a veth or a TAP, or (virtio_net
/// in a VM) the host's own.
const LOCAL_SENDERS: [&str; 3] = ["veth", "tun", "virtio_net"];

/// Why a NIC's offloads cannot be put out of the way.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text says what it and its fields are")]
pub enum OffloadError {
    #[error("NIC {ifname}: cannot ask for its offloads: {source}")]
    Unknown { ifname: String, source: io::Error },
    #[error(
        "NIC {ifname}: its driver always takes VLAN tags off before XDP ({feature} is [fixed]), so that ports with `vlan` or \
         `trunk` would never see theirs: use another NIC (`attach=skb` does not help), or leave `vlan` and `trunk` out"
    )]
    AlwaysStrips { ifname: String, feature: &'static str },
    #[error("NIC {ifname}: cannot switch {feature} off: {source}; try `ethtool -K {ifname} {feature} off`")]
    NotSwitched {
        ifname: String,
        feature: &'static str,
        source: io::Error,
    },
}

/// What was put out of the way on a NIC. Dropping it puts everything back as it was.
pub struct Offloads {
    ifname: String,
    ethtool: Ethtool,
    switched_off: Vec<&'static str>,
    /// The NIC drops VLANs that were not joined, and cannot be told not to: only promiscuous mode opens it.
    pub filters_vlans: bool,
    /// Frames from this NIC may have partial checksums.
    pub partial_checksums: bool,
}

/// What to do about a feature that should be off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    SwitchOff,
    Fixed,
}

fn judge(feature: Option<Feature>) -> Verdict {
    match feature {
        Some(Feature {
            active: true,
            changeable: true,
        }) => Verdict::SwitchOff,
        Some(Feature {
            active: true,
            changeable: false,
        }) => Verdict::Fixed,
        _ => Verdict::Fine,
    }
}

impl Offloads {
    /// Puts out of the way what can be; `needs_tags` says that some port has `vlan` or `trunk`, which makes what is left an error
    /// and not a warning.
    ///
    /// # Errors
    ///
    /// See [`OffloadError`]. What was changed before is put back.
    pub fn prepare(ifname: &str, needs_tags: bool) -> Result<Offloads, OffloadError> {
        let unknown = |source| OffloadError::Unknown {
            ifname: ifname.to_owned(),
            source,
        };
        let ethtool = Ethtool::open(ifname).map_err(unknown)?;
        // Without a driver's name (the interface does not say) there is no reason to suspect a local sender.
        let driver = ethtool.driver().unwrap_or_default();
        let mut offloads = Offloads {
            ifname: ifname.to_owned(),
            ethtool,
            switched_off: Vec::new(),
            filters_vlans: false,
            partial_checksums: LOCAL_SENDERS.contains(&driver.as_str()),
        };
        for feature in STRIPPING {
            let state = offloads.ethtool.feature(feature).map_err(unknown)?;
            match judge(state) {
                Verdict::Fine => {}
                Verdict::SwitchOff => offloads.switch_off(feature)?,
                Verdict::Fixed if needs_tags => {
                    return Err(OffloadError::AlwaysStrips {
                        ifname: ifname.to_owned(),
                        feature,
                    });
                }
                Verdict::Fixed => warn!(
                    interface = ifname,
                    "{feature} is [fixed]: tagged frames reach the guests without their tags"
                ),
            }
        }
        for feature in FILTERS {
            let state = offloads.ethtool.feature(feature).map_err(unknown)?;
            match judge(state) {
                Verdict::Fine => {}
                Verdict::SwitchOff => offloads.switch_off(feature)?,
                Verdict::Fixed => offloads.filters_vlans = true,
            }
        }
        Ok(offloads)
    }

    fn switch_off(&mut self, feature: &'static str) -> Result<(), OffloadError> {
        match self.ethtool.set_feature(feature, false) {
            Ok(()) => {
                self.switched_off.push(feature);
                Ok(())
            }
            Err(source) => Err(OffloadError::NotSwitched {
                ifname: self.ifname.clone(),
                feature,
                source,
            }),
        }
    }
}

impl Drop for Offloads {
    fn drop(&mut self) {
        for feature in self.switched_off.drain(..) {
            match self.ethtool.set_feature(feature, true) {
                // An interface that is gone has nothing to be put back.
                Err(error) if error.raw_os_error() != Some(libc::ENODEV) => warn!(
                    interface = self.ifname,
                    "cannot switch {feature} on again: {error}; use `ethtool -K {} {feature} on`",
                    self.ifname
                ),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn run(program: &str, arguments: &[&str]) {
        let output = Command::new(program).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    }

    #[test]
    fn a_veth_strips_no_tags_while_it_is_driven() {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            run(
                "ip",
                &["link", "add", "left", "type", "veth", "peer", "name", "right"],
            );
            let strips = |ifname: &str| {
                let feature = Ethtool::open(ifname).unwrap().feature("rx-vlan-hw-parse");
                feature.unwrap().unwrap()
            };
            let on = Feature {
                active: true,
                changeable: true,
            };
            assert_eq!(strips("left"), on);
            let offloads = Offloads::prepare("left", true).unwrap();
            assert!(offloads.partial_checksums);
            assert!(!offloads.filters_vlans);
            assert!(!strips("left").active);
            assert_eq!(strips("right"), on, "nobody else's");
            drop(offloads);
            assert_eq!(strips("left"), on);
            // What was off before stays off afterwards.
            Ethtool::open("left")
                .unwrap()
                .set_feature("rx-vlan-hw-parse", false)
                .unwrap();
            drop(Offloads::prepare("left", true).unwrap());
            assert!(!strips("left").active);
            // An interface may go while it is driven.
            let offloads = Offloads::prepare("right", false).unwrap();
            run("ip", &["link", "delete", "left"]);
            drop(offloads);
            assert!(matches!(
                Offloads::prepare("right", false),
                Err(OffloadError::Unknown { .. })
            ));
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn what_is_fixed_is_not_touched() {
        let state = |active, changeable| Some(Feature { active, changeable });
        assert_eq!(judge(None), Verdict::Fine);
        assert_eq!(judge(state(false, true)), Verdict::Fine);
        assert_eq!(judge(state(false, false)), Verdict::Fine);
        assert_eq!(judge(state(true, true)), Verdict::SwitchOff);
        assert_eq!(judge(state(true, false)), Verdict::Fixed);
        let error = Ethtool::open("lo")
            .unwrap()
            .set_feature("loopback", false)
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }
}
