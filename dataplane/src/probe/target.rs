//! Whom to ask.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A station in a NIC's own network that answers probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeTarget {
    /// Asked for its link-layer address: ARP, or neighbour solicitation.
    Neighbour(IpAddr),
    /// Asked to echo (ICMP), once its link-layer address is known by ARP.
    Echo(Ipv4Addr),
}

/// Why a text is no [`ProbeTarget`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeTargetError {
    /// Not an address.
    #[error(
        "`{0}` is no target of probes: write the address of a station in the NIC's own network, as in 192.0.2.1 (ARP), \
         fe80::1 (neighbour solicitation) or icmp:192.0.2.1 (echo)"
    )]
    Malformed(String),
    /// Nobody could answer.
    #[error(
        "`{0}` is not the address of one other station: give that of a router or server in the NIC's own network"
    )]
    NotAStation(String),
    /// ICMPv6 echo is not offered.
    #[error("`icmp:` takes an IPv4 address: write {0} alone, which is asked by neighbour solicitation")]
    EchoV6(Ipv6Addr),
}

impl ProbeTarget {
    /// The station's address.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        match self {
            ProbeTarget::Neighbour(address) => address,
            ProbeTarget::Echo(address) => IpAddr::V4(address),
        }
    }

    /// IPv4 as ::ffff:a.b.c.d, as the XDP program has it.
    pub(crate) fn mapped(self) -> [u8; 16] {
        match self.address() {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        }
    }
}

impl FromStr for ProbeTarget {
    type Err = ProbeTargetError;

    fn from_str(text: &str) -> Result<ProbeTarget, ProbeTargetError> {
        let (echo, address) = match text.strip_prefix("icmp:") {
            Some(address) => (true, address),
            None => (false, text),
        };
        let address: IpAddr = address
            .parse()
            .map_err(|_| ProbeTargetError::Malformed(text.chars().take(64).collect()))?;
        let nobody = match address {
            IpAddr::V4(address) => address.is_broadcast() || address.octets()[0] == 0,
            IpAddr::V6(address) => address.to_ipv4_mapped().is_some(),
        };
        if nobody || address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(ProbeTargetError::NotAStation(text.to_owned()));
        }
        match (echo, address) {
            (true, IpAddr::V4(address)) => Ok(ProbeTarget::Echo(address)),
            (true, IpAddr::V6(address)) => Err(ProbeTargetError::EchoV6(address)),
            (false, address) => Ok(ProbeTarget::Neighbour(address)),
        }
    }
}

impl fmt::Display for ProbeTarget {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeTarget::Neighbour(address) => write!(out, "{address}"),
            ProbeTarget::Echo(address) => write!(out, "icmp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_targets() {
        for text in ["192.0.2.1", "fe80::1", "icmp:192.0.2.1"] {
            assert_eq!(text.parse::<ProbeTarget>().unwrap().to_string(), text);
        }
        for text in ["", "router", "192.0.2", "icmp:", "icmp6:fe80::1", "fe80::1%eth0"] {
            let error = text.parse::<ProbeTarget>().unwrap_err();
            assert!(matches!(error, ProbeTargetError::Malformed(_)), "{error}");
        }
        for text in [
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "ff02::1",
            "::ffff:1.2.3.4",
        ] {
            let error = text.parse::<ProbeTarget>().unwrap_err();
            assert!(matches!(error, ProbeTargetError::NotAStation(_)), "{error}");
        }
        assert!(matches!(
            "icmp:fe80::1".parse::<ProbeTarget>(),
            Err(ProbeTargetError::EchoV6(_))
        ));
    }
}
