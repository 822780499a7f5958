//! How long sessions are kept, and how many: the settings that bound what strangers' frames can make the table hold.

use crate::Millis;
use crate::state::Timer;

/// Idle times after which entries are forgotten, in milliseconds. Expiry loses a pin and never breaks a connection. An entry
/// goes within a second or so behind its time; more than 24 days count as 24.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP: a SYN was seen, but no segment behind the handshake.
    pub tcp_syn_ms: Millis,
    /// TCP: more than a SYN was seen, of one end only.
    pub tcp_one_way_ms: Millis,
    /// TCP: both ends have spoken, and data may flow.
    pub tcp_established_ms: Millis,
    /// TCP: both ends have sent FIN.
    pub tcp_closing_ms: Millis,
    /// TCP: an RST was seen.
    pub tcp_reset_ms: Millis,
    /// UDP: one end has spoken.
    pub udp_one_way_ms: Millis,
    /// UDP: both ends have spoken.
    pub udp_two_way_ms: Millis,
    /// ICMP and ICMPv6 echo.
    pub icmp_ms: Millis,
    /// The NIC of a fragmented datagram.
    pub fragment_ms: Millis,
    /// SCTP, ESP, GRE.
    pub other_ms: Millis,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            tcp_syn_ms: 30_000,
            tcp_one_way_ms: 30_000,
            tcp_established_ms: 3_600_000,
            tcp_closing_ms: 30_000,
            tcp_reset_ms: 10_000,
            udp_one_way_ms: 30_000,
            udp_two_way_ms: 120_000,
            icmp_ms: 30_000,
            fragment_ms: 30_000,
            other_ms: 60_000,
        }
    }
}

impl Timeouts {
    /// Idle time that a timer allows.
    #[must_use]
    pub fn of(&self, timer: Timer) -> Millis {
        let idle_ms = match timer {
            Timer::TcpSyn => self.tcp_syn_ms,
            Timer::TcpOneWay => self.tcp_one_way_ms,
            Timer::TcpEstablished => self.tcp_established_ms,
            Timer::TcpClosing => self.tcp_closing_ms,
            Timer::TcpReset => self.tcp_reset_ms,
            Timer::UdpOneWay => self.udp_one_way_ms,
            Timer::UdpTwoWay => self.udp_two_way_ms,
            Timer::Icmp => self.icmp_ms,
            Timer::Fragment => self.fragment_ms,
            Timer::Other => self.other_ms,
        };
        // Beyond half the clock's range an idle time looks like a clock that is behind.
        idle_ms.min(Millis::MAX / 2 - 1)
    }
}

/// How many entries may come. Frames beyond go by their slot without a session and are counted; none is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLimits {
    /// TCP sessions that have not finished their handshake; never more than a quarter of the table. What a flood of SYNs can
    /// fill.
    pub half_open: u32,
    /// Sessions made in one second, by all workers together. 0 makes none: every frame goes by its slot.
    pub new_per_second: u32,
    /// Fragmented datagrams whose NIC is remembered; never more than a sixteenth of the table.
    pub fragments: u32,
}

impl Default for SessionLimits {
    fn default() -> SessionLimits {
        SessionLimits {
            half_open: 1 << 17,
            new_per_second: 1_000_000,
            fragments: 1 << 16,
        }
    }
}
