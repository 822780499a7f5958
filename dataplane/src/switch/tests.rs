use super::*;
use crate::fabric::vlan::tag_bytes;
use crate::fabric::{PortState, VlanMode, VlanSet};
use std::sync::Arc;

const FAR: Mac = Mac([2, 0, 0, 0, 0, 0xfe]);

fn mac(index: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, index])
}

fn port(index: u8, address: Option<Mac>, vlan: VlanMode) -> Port {
    let state = Arc::new(PortState::new(index, format!("p{index}"), 1, 1));
    Port::new(state, address, Vec::new()).on_vlans(vlan)
}

/// Two access ports of VLAN 100, one of 200, a trunk with 100 and 10 to 20, a transparent port; each with its own address.
fn fabric() -> Fabric {
    let modes = [
        VlanMode::Access(100),
        VlanMode::Access(100),
        VlanMode::Access(200),
        VlanMode::Trunk(VlanSet::new([100].into_iter().chain(10..=20))),
        VlanMode::Transparent,
    ];
    let ports = (0..)
        .zip(modes)
        .map(|(index, mode)| port(index, Some(mac(index)), mode));
    Fabric::new(1, ports.collect(), Vec::new(), 1)
}

fn head(tag: &[u8]) -> Vec<u8> {
    [&[0; 12][..], tag, &[0x08, 0x00, 0, 0]].concat()
}

const NOWHERE: FromGuest = FromGuest::Drop(DropReason::UnknownDestination);

#[test]
fn ports_meet_in_their_vlans_only() {
    let fabric = fabric();
    let reaches = |vlan: u16, from: usize, to: u8| from_guest(&fabric, &fabric.ports[from], vlan, mac(to));
    let found = |to: u8| FromGuest::Port(to);
    // From an access port of 100: the other one, the trunk, the transparent port; not VLAN 200.
    assert_eq!(
        [1, 2, 3, 4].map(|to| reaches(100, 0, to)),
        [found(1), NOWHERE, found(3), found(4)]
    );
    assert_eq!(reaches(100, 0, 0), FromGuest::Drop(DropReason::ToItself));
    // From that of 200: only the transparent one.
    assert_eq!(
        [0, 1, 3, 4].map(|to| reaches(200, 2, to)),
        [NOWHERE, NOWHERE, NOWHERE, found(4)]
    );
    // From the trunk: it depends on the tag.
    assert_eq!(
        [0, 2, 4].map(|to| reaches(100, 3, to)),
        [found(0), NOWHERE, found(4)]
    );
    assert_eq!(
        [0, 2, 4].map(|to| reaches(10, 3, to)),
        [NOWHERE, NOWHERE, found(4)]
    );
    // From the transparent port: everywhere, by the tag; without one nowhere.
    assert_eq!(
        [0, 2, 3].map(|to| reaches(200, 4, to)),
        [NOWHERE, found(2), NOWHERE]
    );
    assert_eq!(
        [0, 2, 3].map(|to| reaches(20, 4, to)),
        [NOWHERE, NOWHERE, found(3)]
    );
    assert_eq!([0, 2, 3].map(|to| reaches(NO_VLAN, 4, to)), [NOWHERE; 3]);
}

#[test]
fn a_guests_vlan_is_its_ports_or_its_tags() {
    let fabric = fabric();
    let of = |port: usize, tag: &[u8]| vlan_from_guest(&fabric, &fabric.ports[port], &head(tag));
    let refused = Err(DropReason::VlanNotAllowed);
    assert_eq!(of(0, &[]), Ok(100));
    assert_eq!(of(0, &tag_bytes(100)), refused, "its own tag, too");
    assert_eq!(of(0, &[0x88, 0xa8, 0, 100]), refused);
    assert_eq!(of(3, &[]), refused);
    assert_eq!(of(3, &tag_bytes(15)), Ok(15));
    assert_eq!(of(3, &tag_bytes(21)), refused);
    assert_eq!([of(4, &[]), of(4, &tag_bytes(21))], [Ok(0), Ok(21)]);
}

#[test]
fn frames_from_outside_reach_their_vlan_only() {
    let fabric = fabric();
    let wrong = FromNic::Drop(DropReason::VlanNotAllowed);
    let arrive = |vlan: u16, to: u8| from_nic(&fabric, vlan, mac(to), FAR);
    assert_eq!(vlan_from_nic(&fabric, &head(&tag_bytes(100))), 100);
    assert_eq!(vlan_from_nic(&fabric, &head(&[])), NO_VLAN);
    assert_eq!(arrive(100, 0), FromNic::Port(0));
    assert_eq!(
        [
            arrive(NO_VLAN, 0),
            arrive(200, 0),
            arrive(NO_VLAN, 3),
            arrive(21, 3)
        ],
        [wrong; 4]
    );
    assert_eq!([arrive(NO_VLAN, 4), arrive(7, 4)], [FromNic::Port(4); 2]);
    assert_eq!(arrive(100, 9), FromNic::Drop(DropReason::UnknownDestination));
    assert_eq!(from_nic(&fabric, 100, Mac::BROADCAST, FAR), FromNic::Group);
}

#[test]
fn one_address_in_two_vlans_is_two_stations() {
    let shared = mac(1);
    let ports = vec![
        port(0, Some(shared), VlanMode::Access(100)),
        port(1, Some(shared), VlanMode::Access(200)),
        port(2, None, VlanMode::Access(300)),
        port(3, None, VlanMode::Access(200)),
        port(4, None, VlanMode::Transparent),
    ];
    let fabric = Fabric::new(1, ports, Vec::new(), 1);
    let arrive = |vlan| from_nic(&fabric, vlan, shared, FAR);
    assert_eq!([arrive(100), arrive(200)], [FromNic::Port(0), FromNic::Port(1)]);
    let learns = |port: usize| check_source(&fabric, &fabric.ports[port], shared);
    let refused = Source::Refused(DropReason::MacRefused);
    assert_eq!(
        [learns(2), learns(3), learns(4)],
        [Source::Candidate, refused, refused]
    );
}

#[test]
fn nobody_looks_at_tags_while_no_port_minds() {
    let ports = (0..2)
        .map(|index| port(index, Some(mac(index)), VlanMode::Transparent))
        .collect();
    let fabric = Fabric::new(1, ports, Vec::new(), 1);
    let tagged = head(&tag_bytes(100));
    assert_eq!(vlan_from_guest(&fabric, &fabric.ports[0], &tagged), Ok(NO_VLAN));
    assert_eq!(vlan_from_nic(&fabric, &tagged), NO_VLAN);
    assert_eq!(
        from_guest(&fabric, &fabric.ports[0], NO_VLAN, mac(1)),
        FromGuest::Port(1)
    );
}
