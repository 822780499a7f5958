//! The ethtool family of generic netlink (kernel 5.6 and later): channels, offloads, pause frames.

use std::io;

use nix::sys::socket::SockProtocol;

use super::codec::{attributes, text_of, u32_of, u64_of};
use super::socket::{GENL_HEADER, Netlink, generic};

const FEATURES_GET: u8 = 11;
const CHANNELS_GET: u8 = 17;
const CHANNELS_SET: u8 = 18;
const PAUSE_GET: u8 = 21;
/// In every command: the interface.
const HEADER: u16 = 1;
const HEADER_DEV_INDEX: u16 = 1;
const HEADER_FLAGS: u16 = 3;
/// `ETHTOOL_FLAG_STATS`
const WITH_STATISTICS: u32 = 1 << 2;

const RX_MAX: u16 = 2;
const TX_MAX: u16 = 3;
const COMBINED_MAX: u16 = 5;
const RX_COUNT: u16 = 6;
const TX_COUNT: u16 = 7;
const COMBINED_COUNT: u16 = 9;

const PAUSE_STATS: u16 = 5;
const PAUSE_STAT_RX_FRAMES: u16 = 3;

const FEATURES_ACTIVE: u16 = 4;
const BITSET_BITS: u16 = 3;
const BIT_NAME: u16 = 2;

/// Channels of an interface (`ethtool -l`); 0 where it has none of a sort.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Channels {
    /// Receive-only channels in use.
    pub rx: u32,
    /// Transmit-only channels in use.
    pub tx: u32,
    /// Channels for both in use.
    pub combined: u32,
    /// Most of `rx`.
    pub rx_max: u32,
    /// Most of `tx`.
    pub tx_max: u32,
    /// Most of `combined`.
    pub combined_max: u32,
}

/// Asks drivers.
pub struct Ethtool {
    netlink: Netlink,
    family: u16,
}

impl Ethtool {
    /// # Errors
    /// ENOENT if the kernel was built without CONFIG_ETHTOOL_NETLINK; those of the socket.
    pub fn open() -> io::Result<Ethtool> {
        let mut netlink = Netlink::open(SockProtocol::NetlinkGeneric)?;
        let family = netlink.family("ethtool")?;
        Ok(Ethtool { netlink, family })
    }

    /// The channels of an interface; `None` if its driver has no such notion.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn channels(&mut self, ifindex: u32) -> io::Result<Option<Channels>> {
        let request =
            generic(self.family, CHANNELS_GET).nest(HEADER, &[(HEADER_DEV_INDEX, &ifindex.to_ne_bytes())]);
        let mut channels = Channels::default();
        let outcome = self.netlink.ask(&request, |message| {
            for (kind, value) in attributes(message.body.get(GENL_HEADER..).unwrap_or_default()) {
                let number = u32_of(value).unwrap_or(0);
                match kind {
                    RX_MAX => channels.rx_max = number,
                    TX_MAX => channels.tx_max = number,
                    COMBINED_MAX => channels.combined_max = number,
                    RX_COUNT => channels.rx = number,
                    TX_COUNT => channels.tx = number,
                    COMBINED_COUNT => channels.combined = number,
                    _ => {}
                }
            }
        });
        match outcome {
            Ok(()) => Ok(Some(channels)),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Changes what differs between `from`, what is, and `to`.
    ///
    /// # Errors
    /// Those of the driver: EINVAL, EBUSY, EPERM, ...
    pub fn set_channels(&mut self, ifindex: u32, from: &Channels, to: &Channels) -> io::Result<()> {
        let mut request =
            generic(self.family, CHANNELS_SET).nest(HEADER, &[(HEADER_DEV_INDEX, &ifindex.to_ne_bytes())]);
        for (kind, is, wanted) in [
            (RX_COUNT, from.rx, to.rx),
            (TX_COUNT, from.tx, to.tx),
            (COMBINED_COUNT, from.combined, to.combined),
        ] {
            if is != wanted {
                request = request.put(kind, &wanted.to_ne_bytes());
            }
        }
        self.netlink.ask(&request, |_| {})
    }

    /// Pause frames received so far (`ethtool -I -a`); `None` if the driver does not count them. May wait for the kernel's RTNL lock.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn pauses_received(&mut self, ifindex: u32) -> io::Result<Option<u64>> {
        let (index, flags) = (ifindex.to_ne_bytes(), WITH_STATISTICS.to_ne_bytes());
        let header: [(u16, &[u8]); 2] = [(HEADER_DEV_INDEX, &index), (HEADER_FLAGS, &flags)];
        let request = generic(self.family, PAUSE_GET).nest(HEADER, &header);
        let mut count = None;
        let outcome = self.netlink.ask(&request, |message| {
            let all = message.body.get(GENL_HEADER..).unwrap_or_default();
            let mut counts =
                inside(all, PAUSE_STATS).flat_map(|statistics| inside(statistics, PAUSE_STAT_RX_FRAMES));
            count = counts.next().and_then(u64_of);
        });
        match outcome {
            Err(error) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => Err(error),
            _ => Ok(count),
        }
    }

    /// The offloads that are on, by the kernel's names (`rx-gro-hw`, `rx-vlan-hw-parse`, ...).
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn active_features(&mut self, ifindex: u32) -> io::Result<Vec<String>> {
        let request =
            generic(self.family, FEATURES_GET).nest(HEADER, &[(HEADER_DEV_INDEX, &ifindex.to_ne_bytes())]);
        let mut names = Vec::new();
        self.netlink.ask(&request, |message| {
            let all = message.body.get(GENL_HEADER..).unwrap_or_default();
            // A bitset as a list: bits that are set, each with its name.
            names.extend(
                inside(all, FEATURES_ACTIVE)
                    .flat_map(|bitset| inside(bitset, BITSET_BITS))
                    .flat_map(attributes)
                    .flat_map(|(_, bit)| inside(bit, BIT_NAME))
                    .map(text_of),
            );
        })?;
        Ok(names)
    }
}

fn inside(bytes: &[u8], wanted: u16) -> impl Iterator<Item = &[u8]> {
    attributes(bytes)
        .filter(move |(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}
