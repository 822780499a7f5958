//! VLAN and unicast MAC to port: small, immutable, two cache lines a lookup.

use vnic_lb::mac::Mac;

use super::{MAX_PORTS, PortIndex};

/// Four times the ports, so that a probe ends after one or two steps.
const SLOTS: usize = MAX_PORTS * 4;

/// The place of ports that are on several VLANs: who finds one there must ask it whether it takes the frame's.
pub(super) const ANY_VLAN: u16 = 0xfff;

/// An immutable map from (VLAN, MAC) to port, rebuilt whenever a port's address becomes known.
#[derive(Debug)]
pub struct MacTable {
    /// MAC in the lower 48 bits, VLAN above; 0 is empty (no port has the all-zero MAC).
    keys: [u64; SLOTS],
    ports: [PortIndex; SLOTS],
}

impl MacTable {
    /// A table of `entries`; of two equal ones the first stays, and entries beyond [`MAX_PORTS`] are not taken.
    #[must_use]
    pub fn new(entries: impl IntoIterator<Item = (u16, Mac, PortIndex)>) -> MacTable {
        let mut table = MacTable {
            keys: [0; SLOTS],
            ports: [0; SLOTS],
        };
        for (vlan, mac, port) in entries.into_iter().take(MAX_PORTS) {
            if mac.is_zero() {
                continue;
            }
            let key = key(vlan, mac);
            let at = table.probe(key);
            if table.keys[at] == 0 {
                table.keys[at] = key;
                table.ports[at] = port;
            }
        }
        table
    }

    /// The port with this address in this VLAN.
    #[must_use]
    pub fn get(&self, vlan: u16, mac: Mac) -> Option<PortIndex> {
        let at = self.probe(key(vlan, mac));
        (self.keys[at] != 0).then(|| self.ports[at])
    }

    /// The slot that holds `key`, or the empty one where it would go. Ends because the table is never more than a quarter full.
    fn probe(&self, key: u64) -> usize {
        // Fibonacci hashing: the upper bits of the product are well mixed.
        let mut at = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % SLOTS;
        loop {
            let slot = self.keys[at];
            if slot == 0 || slot == key {
                return at;
            }
            at = (at + 1) % SLOTS;
        }
    }
}

fn key(vlan: u16, mac: Mac) -> u64 {
    u64::from(vlan) << 48 | mac.to_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_set_of_ports_is_found_and_strangers_are_not() {
        let mac = |n: u8| Mac([0x52, 0x54, 0, 0, n, n ^ 0x5a]);
        let ports = u8::try_from(MAX_PORTS).unwrap();
        let table = MacTable::new((0..ports).map(|n| (ANY_VLAN, mac(n), n)));
        for n in 0..ports {
            assert_eq!(table.get(ANY_VLAN, mac(n)), Some(n));
            assert_eq!(table.get(5, mac(n)), None);
        }
        for n in ports..=255 {
            assert_eq!(table.get(ANY_VLAN, mac(n)), None);
        }
    }

    #[test]
    fn the_first_of_two_equal_addresses_stays() {
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let table = MacTable::new([(7, mac, 3), (7, mac, 4), (8, mac, 5)]);
        assert_eq!((table.get(7, mac), table.get(8, mac)), (Some(3), Some(5)));
        assert_eq!(
            MacTable::new([(0, Mac::default(), 3)]).get(0, Mac::default()),
            None
        );
    }
}
