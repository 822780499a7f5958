//! Unicast MAC to port: small, immutable, one or two cache lines a lookup.

use vnic_lb::mac::Mac;

use super::{MAX_PORTS, PortIndex};

/// Four times the ports, so that a probe ends after one or two steps.
const SLOTS: usize = MAX_PORTS * 4;

/// An immutable map from MAC to port, rebuilt whenever a port's address becomes known.
#[derive(Debug)]
pub struct MacTable {
    /// MAC in the lower 48 bits, port above; 0 is empty (no port has the all-zero MAC).
    slots: [u64; SLOTS],
}

impl MacTable {
    /// A table of `entries`; of two equal MACs the first stays, and entries beyond [`MAX_PORTS`] are not taken.
    #[must_use]
    pub fn new(entries: impl IntoIterator<Item = (Mac, PortIndex)>) -> MacTable {
        let mut table = MacTable { slots: [0; SLOTS] };
        for (mac, port) in entries.into_iter().take(MAX_PORTS) {
            if mac.is_zero() {
                continue;
            }
            let at = table.probe(mac);
            if table.slots[at] == 0 {
                table.slots[at] = u64::from(port) << 48 | mac.to_u64();
            }
        }
        table
    }

    /// The port with this address.
    #[must_use]
    pub fn get(&self, mac: Mac) -> Option<PortIndex> {
        let slot = self.slots[self.probe(mac)];
        (slot != 0).then(|| slot.to_be_bytes()[1])
    }

    /// The slot that holds `mac`, or the empty one where it would go. Ends because the table is never more than a quarter full.
    fn probe(&self, mac: Mac) -> usize {
        let key = mac.to_u64();
        // Fibonacci hashing: the upper bits of the product are well mixed.
        let mut at = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % SLOTS;
        loop {
            let slot = self.slots[at];
            if slot == 0 || slot & 0xffff_ffff_ffff == key {
                return at;
            }
            at = (at + 1) % SLOTS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_set_of_ports_is_found_and_strangers_are_not() {
        let mac = |n: u8| Mac([0x52, 0x54, 0, 0, n, n ^ 0x5a]);
        let ports = u8::try_from(MAX_PORTS).unwrap();
        let table = MacTable::new((0..ports).map(|n| (mac(n), n)));
        for n in 0..ports {
            assert_eq!(table.get(mac(n)), Some(n));
        }
        for n in ports..=255 {
            assert_eq!(table.get(mac(n)), None);
        }
    }

    #[test]
    fn the_first_of_two_equal_addresses_stays() {
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        assert_eq!(MacTable::new([(mac, 3), (mac, 4)]).get(mac), Some(3));
        assert_eq!(MacTable::new([(Mac::default(), 3)]).get(Mac::default()), None);
    }
}
