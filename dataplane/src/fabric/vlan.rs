//! Which VLANs a port takes part in, and what that makes of the tags of its frames (IEEE 802.1Q customer tags, 0x8100).

use std::fmt;
use std::sync::Arc;

use vnic_lb::parse::ethertype;

use crate::counters::DropReason;

/// Bytes of a VLAN tag.
pub const TAG_LEN: usize = 4;

/// Bytes before the tag: the two addresses.
pub const TAG_OFFSET: usize = 12;

/// The highest VLAN id; 0 and 4095 name no VLAN (IEEE 802.1Q, 9.6).
pub const MAX_VLAN: u16 = 4094;

/// Where frames without a customer tag are: no VLAN at all.
pub const NO_VLAN: u16 = 0;

/// A set of VLAN ids. Cloning it shares it.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Arc<[u64; 64]>);

impl VlanSet {
    /// The set of these ids; ids that name no VLAN are left out.
    #[must_use]
    pub fn new(ids: impl IntoIterator<Item = u16>) -> VlanSet {
        let mut words = [0u64; 64];
        for id in ids.into_iter().filter(|id| (1..=MAX_VLAN).contains(id)) {
            words[usize::from(id / 64)] |= 1 << (id % 64);
        }
        VlanSet(Arc::new(words))
    }

    /// Whether `id` is in the set.
    #[must_use]
    pub fn contains(&self, id: u16) -> bool {
        self.0
            .get(usize::from(id / 64))
            .is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// The lowest id in the set that is not lower than `from`.
    #[must_use]
    pub fn first_from(&self, from: u16) -> Option<u16> {
        (from..=MAX_VLAN).find(|id| self.contains(*id))
    }
}

impl fmt::Display for VlanSet {
    /// As it is configured: `10-20+30`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ids = (1..=MAX_VLAN).filter(|id| self.contains(*id)).peekable();
        let mut separator = "";
        while let Some(first) = ids.next() {
            let mut last = first;
            while let Some(next) = ids.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(out, "{separator}{first}")?;
            } else {
                write!(out, "{separator}{first}-{last}")?;
            }
            separator = "+";
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// What a port is to VLANs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VlanMode {
    /// Every frame passes as it is, tagged or not: the guest is on all VLANs, and on none.
    #[default]
    Transparent,
    /// The guest knows of no tags: its frames are of this VLAN, and are tagged wherever else they go.
    Access(u16),
    /// Only frames with one of these tags pass, and keep them.
    Trunk(VlanSet),
}

/// The outermost tag of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// None, or the frame ends before it.
    Absent,
    /// A customer tag that only gives a priority (id 0), or has the reserved id 4095.
    Unnamed,
    /// A customer tag of this VLAN.
    Vlan(u16),
    /// A service tag: what is behind it are the customers' own affairs.
    Service,
}

impl Tag {
    /// The outermost tag of a frame that begins with `head`.
    #[must_use]
    pub fn of(head: &[u8]) -> Tag {
        let Some([type0, type1, rest @ ..]) = head.get(TAG_OFFSET..) else {
            return Tag::Absent;
        };
        match u16::from_be_bytes([*type0, *type1]) {
            ethertype::VLAN => {}
            ethertype::SERVICE_VLAN | ethertype::OLD_SERVICE_VLAN => return Tag::Service,
            _ => return Tag::Absent,
        }
        let Some([tci0, tci1]) = rest.first_chunk() else {
            return Tag::Unnamed;
        };
        match u16::from_be_bytes([*tci0, *tci1]) & 0xfff {
            id @ 1..=MAX_VLAN => Tag::Vlan(id),
            _ => Tag::Unnamed,
        }
    }

    /// The VLAN that a frame with this tag is in where nothing else decides; [`NO_VLAN`] without a customer tag.
    #[must_use]
    pub fn vlan(self) -> u16 {
        match self {
            Tag::Vlan(id) => id,
            Tag::Absent | Tag::Unnamed | Tag::Service => NO_VLAN,
        }
    }
}

impl VlanMode {
    /// The VLAN of a frame with this tag that the port's guest sends.
    ///
    /// # Errors
    ///
    /// [`DropReason::VlanNotAllowed`]: any tag on an access port; none, or one that is not listed, on a trunk.
    pub fn ingress(&self, tag: Tag) -> Result<u16, DropReason> {
        match (self, tag) {
            (VlanMode::Transparent, tag) => Ok(tag.vlan()),
            (VlanMode::Access(id), Tag::Absent) => Ok(*id),
            (VlanMode::Trunk(listed), Tag::Vlan(id)) if listed.contains(id) => Ok(id),
            _ => Err(DropReason::VlanNotAllowed),
        }
    }

    /// Whether frames of `vlan` may reach the port's guest.
    #[must_use]
    pub fn admits(&self, vlan: u16) -> bool {
        match self {
            VlanMode::Transparent => true,
            VlanMode::Access(id) => *id == vlan,
            VlanMode::Trunk(listed) => listed.contains(vlan),
        }
    }

    /// Whether the guest's frames have no tag while they have one everywhere else.
    #[must_use]
    pub fn is_access(&self) -> bool {
        matches!(self, VlanMode::Access(_))
    }

    /// Whether a port of this mode and one of the other may have the same address: access ports of different VLANs, which never
    /// meet.
    #[must_use]
    pub fn is_apart_from(&self, other: &VlanMode) -> bool {
        matches!((self, other), (VlanMode::Access(one), VlanMode::Access(another)) if one != another)
    }

    /// The port's place in the address table: its own VLAN, or [`super::mac_table::ANY_VLAN`].
    pub(super) fn table_vlan(&self) -> u16 {
        match self {
            VlanMode::Access(id) => *id,
            VlanMode::Transparent | VlanMode::Trunk(_) => super::mac_table::ANY_VLAN,
        }
    }
}

/// The tag of a VLAN, without a priority.
#[must_use]
pub fn tag_bytes(vlan: u16) -> [u8; TAG_LEN] {
    let [type0, type1] = ethertype::VLAN.to_be_bytes();
    let [id0, id1] = (vlan & 0xfff).to_be_bytes();
    [type0, type1, id0, id1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(tag: [u8; 4]) -> Vec<u8> {
        [&[2u8; 12][..], &tag, &[0x08, 0x00]].concat()
    }

    #[test]
    fn tags_are_read_as_what_they_are() {
        assert_eq!(Tag::of(&tagged(tag_bytes(100))), Tag::Vlan(100));
        assert_eq!(
            Tag::of(&tagged([0x81, 0x00, 0xe0, 0x64])),
            Tag::Vlan(100),
            "a priority besides"
        );
        assert_eq!(Tag::of(&tagged(tag_bytes(4094))), Tag::Vlan(4094));
        for unnamed in [[0x81, 0, 0, 0], [0x81, 0, 0xe0, 0], [0x81, 0, 0x0f, 0xff]] {
            assert_eq!(Tag::of(&tagged(unnamed)), Tag::Unnamed);
        }
        for service in [[0x88, 0xa8, 0, 100], [0x91, 0x00, 0, 100]] {
            assert_eq!(Tag::of(&tagged(service)), Tag::Service);
        }
        assert_eq!(Tag::of(&tagged([0x08, 0x00, 0x45, 0])), Tag::Absent);
        let cut = tagged(tag_bytes(100));
        assert_eq!(Tag::of(&cut[..15]), Tag::Unnamed);
        assert_eq!(Tag::of(&cut[..13]), Tag::Absent);
        assert_eq!(Tag::of(&[]), Tag::Absent);
    }

    #[test]
    fn each_mode_takes_its_own() {
        let trunk = VlanMode::Trunk(VlanSet::new([10, 11, 4094, 0, 4095]));
        let all = [
            Tag::Absent,
            Tag::Unnamed,
            Tag::Service,
            Tag::Vlan(10),
            Tag::Vlan(100),
        ];
        let refused = Err(DropReason::VlanNotAllowed);
        assert_eq!(
            all.map(|tag| VlanMode::Transparent.ingress(tag)),
            [Ok(0), Ok(0), Ok(0), Ok(10), Ok(100)]
        );
        assert_eq!(
            all.map(|tag| VlanMode::Access(100).ingress(tag)),
            [Ok(100), refused, refused, refused, refused]
        );
        assert_eq!(
            all.map(|tag| trunk.ingress(tag)),
            [refused, refused, refused, Ok(10), refused]
        );
        for (mode, admitted) in [
            (&VlanMode::Transparent, [true; 4]),
            (&VlanMode::Access(100), [false, false, true, false]),
            (&trunk, [false, true, false, true]),
        ] {
            assert_eq!(
                [NO_VLAN, 10, 100, 4094].map(|vlan| mode.admits(vlan)),
                admitted,
                "{mode:?}"
            );
        }
    }

    #[test]
    fn only_access_ports_of_different_vlans_are_apart() {
        let (one, another) = (VlanMode::Access(1), VlanMode::Access(2));
        assert!(one.is_apart_from(&another));
        assert!(!one.is_apart_from(&one.clone()));
        assert!(!one.is_apart_from(&VlanMode::Transparent));
        assert!(!VlanMode::Trunk(VlanSet::new([9])).is_apart_from(&one));
    }

    #[test]
    fn sets_are_written_as_they_are_configured() {
        let shown = |ids: &[u16]| VlanSet::new(ids.iter().copied()).to_string();
        assert_eq!(shown(&[]), "");
        assert_eq!(shown(&[30, 10, 11, 12, 20, 4094]), "10-12+20+30+4094");
        assert_eq!(VlanSet::new(1..=MAX_VLAN).to_string(), "1-4094");
        assert!(!VlanSet::new(0..=u16::MAX).contains(u16::MAX));
        let set = VlanSet::new([10, 4094]);
        assert_eq!(
            [0, 10, 11, 4095].map(|from| set.first_from(from)),
            [Some(10), Some(10), Some(4094), None]
        );
    }
}
