//! Where a frame goes: pure decisions over one [`Fabric`], no queue is touched here.

use vnic_lb::mac::Mac;

use crate::counters::DropReason;
use crate::fabric::vlan::{NO_VLAN, Tag};
use crate::fabric::{Fabric, Port, PortIndex};

/// Where a frame from a guest goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromGuest {
    /// To one local port, directly.
    Port(PortIndex),
    /// Out by a NIC that the session decides.
    Uplink,
    /// To every other local port of the VLAN and, once, to the designated NIC.
    Group,
    /// Nowhere.
    Drop(DropReason),
}

/// Where a frame from a NIC goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromNic {
    /// To one local port.
    Port(PortIndex),
    /// To every local port of the VLAN.
    Group,
    /// Nowhere.
    Drop(DropReason),
}

/// What to make of a frame's source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The port's own.
    Own,
    /// The port has none yet, and this one would do.
    Candidate,
    /// Refused.
    Refused(DropReason),
}

/// Destination and source of an Ethernet frame.
#[must_use]
pub fn addresses(head: &[u8]) -> Option<(Mac, Mac)> {
    let (dst, rest) = head.split_first_chunk::<6>()?;
    let src = rest.first_chunk::<6>()?;
    Some((Mac(*dst), Mac(*src)))
}

/// Checks the source address of a frame that `port` sends (anti-spoofing).
#[must_use]
pub fn check_source(fabric: &Fabric, port: &Port, src: Mac) -> Source {
    match port.mac {
        Some(own) if own == src => Source::Own,
        Some(_) => Source::Refused(DropReason::SpoofedSource),
        None if fabric.may_learn(port, src) => Source::Candidate,
        None => Source::Refused(DropReason::MacRefused),
    }
}

/// The VLAN of a frame that `port` sends and that begins with `head`; [`NO_VLAN`] while no port minds.
///
/// # Errors
///
/// Why the frame is dropped.
pub fn vlan_from_guest(fabric: &Fabric, port: &Port, head: &[u8]) -> Result<u16, DropReason> {
    if fabric.vlan_aware {
        port.vlan.ingress(Tag::of(head))
    } else {
        Ok(NO_VLAN)
    }
}

/// The VLAN of a frame from a NIC that begins with `head`; [`NO_VLAN`] while no port minds.
#[must_use]
pub fn vlan_from_nic(fabric: &Fabric, head: &[u8]) -> u16 {
    if fabric.vlan_aware {
        Tag::of(head).vlan()
    } else {
        NO_VLAN
    }
}

/// Decides for a frame whose source was accepted.
#[must_use]
pub fn from_guest(fabric: &Fabric, port: &Port, vlan: u16, dst: Mac) -> FromGuest {
    if dst.is_group() {
        if dst.is_link_local_control() {
            return FromGuest::Drop(DropReason::LinkLocalControl);
        }
        return FromGuest::Group;
    }
    match fabric.port_of(vlan, dst) {
        Some(destination) if destination == port.state.index => FromGuest::Drop(DropReason::ToItself),
        Some(destination) => FromGuest::Port(destination),
        None if fabric.nics.is_empty() => FromGuest::Drop(DropReason::UnknownDestination),
        None => FromGuest::Uplink,
    }
}

/// Decides for a frame that a NIC received. It never goes to another NIC.
#[must_use]
pub fn from_nic(fabric: &Fabric, vlan: u16, dst: Mac, src: Mac) -> FromNic {
    if let Some(owner) = fabric.port_of(vlan, src)
        && fabric.ports.get(usize::from(owner)).is_some_and(Port::is_running)
    {
        // Our own frame came back. While the port does not run, its VM may live elsewhere (migrated away) and be heard.
        return FromNic::Drop(DropReason::LoopedBack);
    }
    if dst.is_group() {
        if dst.is_link_local_control() {
            return FromNic::Drop(DropReason::LinkLocalControl);
        }
        return FromNic::Group;
    }
    match fabric.port_of(vlan, dst) {
        Some(port) => FromNic::Port(port),
        None if fabric.vlan_aware && fabric.ports.iter().any(|port| port.mac == Some(dst)) => {
            FromNic::Drop(DropReason::VlanNotAllowed)
        }
        None => FromNic::Drop(DropReason::UnknownDestination),
    }
}

#[cfg(test)]
mod tests;
