//! What a frame does to its session: which timer runs, and when a session starts anew.

use crate::key::{Direction, proto};
use crate::parse::tcp_flag;

/// The timer that runs for a session; its state, as far as the balancer cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Timer {
    /// TCP: a SYN was seen, but no segment behind the handshake.
    TcpSyn,
    /// TCP: both ends have spoken, and data may flow.
    TcpEstablished,
    /// TCP: both ends have sent FIN.
    TcpClosing,
    /// TCP: an RST was seen. It may be forged, so the session lives on while frames come.
    TcpReset,
    /// UDP: one end has spoken.
    UdpOneWay,
    /// UDP: both ends have spoken.
    UdpTwoWay,
    /// ICMP and ICMPv6 echo.
    Icmp,
    /// SCTP, ESP, GRE.
    Other,
    /// The NIC of a fragmented datagram.
    Fragment,
    /// TCP: one end has sent more than a SYN, and the other one was not heard: a stranger's bare segments, a session that was there before
    /// the table knew it, or one whose other direction takes another way.
    TcpOneWay,
}

/// Timers by their number.
const TIMERS: [Timer; 10] = [
    Timer::TcpSyn,
    Timer::TcpEstablished,
    Timer::TcpClosing,
    Timer::TcpReset,
    Timer::UdpOneWay,
    Timer::UdpTwoWay,
    Timer::Icmp,
    Timer::Other,
    Timer::Fragment,
    Timer::TcpOneWay,
];

impl Timer {
    pub(crate) const fn number(self) -> u8 {
        self as u8
    }

    /// All timers.
    pub(crate) const fn all() -> [Timer; TIMERS.len()] {
        TIMERS
    }

    pub(crate) fn from_number(number: u8) -> Timer {
        TIMERS.get(usize::from(number)).copied().unwrap_or(Timer::Other)
    }
}

/// The part of a session's state that frames change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Which timer runs.
    pub timer: Timer,
    /// Ends that have spoken: a bit each, [`Direction::AToB`]'s and [`Direction::BToA`]'s.
    pub spoke: u8,
    /// Ends that have sent FIN.
    pub closed: u8,
}

const BOTH_ENDS: u8 = 3;

/// Whether a frame may open a session. An RST closes one, so it is not worth an entry.
pub(crate) const fn may_open(protocol: u8, tcp_flags: u8) -> bool {
    protocol != proto::TCP || tcp_flags & tcp_flag::RST == 0
}

const fn is_opening(tcp_flags: u8) -> bool {
    tcp_flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST) == tcp_flag::SYN
}

impl Progress {
    /// The state after a session's first frame.
    pub(crate) fn first(protocol: u8, tcp_flags: u8, direction: Direction) -> Progress {
        let timer = match protocol {
            proto::TCP if tcp_flags & tcp_flag::SYN != 0 => Timer::TcpSyn,
            // Mid-stream: the session was there before the table forgot it or the daemon started. Or it never was.
            proto::TCP if tcp_flags & tcp_flag::FIN == 0 => Timer::TcpOneWay,
            proto::TCP => Timer::TcpClosing,
            proto::UDP => Timer::UdpOneWay,
            proto::ICMP | proto::ICMPV6 => Timer::Icmp,
            _ => Timer::Other,
        };
        let closed = if tcp_flags & tcp_flag::FIN != 0 {
            direction.end_bit()
        } else {
            0
        };
        Progress {
            timer,
            spoke: direction.end_bit(),
            closed,
        }
    }

    /// The state after one more frame; `None` if the frame opens a new session under the old one's key.
    pub(crate) fn after(self, tcp_flags: u8, direction: Direction) -> Option<Progress> {
        let end = direction.end_bit();
        let mut next = Progress {
            spoke: self.spoke | end,
            ..self
        };
        match self.timer {
            Timer::TcpClosing | Timer::TcpReset if is_opening(tcp_flags) => return None,
            Timer::TcpSyn
            | Timer::TcpOneWay
            | Timer::TcpEstablished
            | Timer::TcpClosing
            | Timer::TcpReset => {
                if tcp_flags & tcp_flag::FIN != 0 {
                    next.closed |= end;
                }
                let progress = tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::ACK;
                next.timer = match self.timer {
                    _ if tcp_flags & tcp_flag::RST != 0 => Timer::TcpReset,
                    Timer::TcpReset => Timer::TcpReset,
                    _ if next.closed == BOTH_ENDS => Timer::TcpClosing,
                    Timer::TcpSyn if progress && next.spoke != BOTH_ENDS => Timer::TcpOneWay,
                    Timer::TcpSyn if progress => Timer::TcpEstablished,
                    Timer::TcpOneWay if next.spoke == BOTH_ENDS => Timer::TcpEstablished,
                    timer => timer,
                };
            }
            Timer::UdpOneWay if next.spoke == BOTH_ENDS => next.timer = Timer::UdpTwoWay,
            _ => {}
        }
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Direction::{AToB, BToA};

    const SYN: u8 = tcp_flag::SYN;
    const SYN_ACK: u8 = tcp_flag::SYN | tcp_flag::ACK;
    const ACK: u8 = tcp_flag::ACK;
    const FIN: u8 = tcp_flag::FIN | tcp_flag::ACK;
    const RST: u8 = tcp_flag::RST;

    fn timer_after(frames: &[(u8, Direction)]) -> Timer {
        let (&(flags, direction), rest) = frames.split_first().unwrap();
        let first = Progress::first(proto::TCP, flags, direction);
        rest.iter()
            .fold(first, |state, &(flags, way)| state.after(flags, way).unwrap())
            .timer
    }

    #[test]
    fn a_tcp_session_runs_through_its_timers() {
        let frames = [
            (SYN, AToB),
            (SYN_ACK, BToA),
            (ACK, AToB),
            (FIN, AToB),
            (ACK, BToA),
            (FIN, BToA),
            (ACK, AToB),
        ];
        let timers: Vec<_> = (1..=frames.len())
            .map(|len| timer_after(&frames[..len]))
            .collect();
        let expected = [
            Timer::TcpSyn,
            Timer::TcpSyn,
            Timer::TcpEstablished,
            Timer::TcpEstablished,
            Timer::TcpEstablished,
            Timer::TcpClosing,
            Timer::TcpClosing,
        ];
        assert_eq!(timers, expected);
    }

    #[test]
    fn data_flows_once_both_ends_have_spoken() {
        // In mid-stream, and behind a handshake of which one half is seen.
        assert_eq!(timer_after(&[(ACK, AToB); 3]), Timer::TcpOneWay);
        assert_eq!(timer_after(&[(ACK, AToB), (ACK, BToA)]), Timer::TcpEstablished);
        assert_eq!(timer_after(&[(SYN, AToB), (ACK, AToB)]), Timer::TcpOneWay);
        assert_eq!(
            timer_after(&[(SYN, AToB), (ACK, AToB), (ACK, BToA)]),
            Timer::TcpEstablished
        );
        let timeouts = crate::limits::Timeouts::default();
        assert_eq!(timeouts.of(Timer::TcpOneWay), 30_000);
    }

    #[test]
    fn one_end_repeating_its_fin_does_not_close() {
        assert_eq!(
            timer_after(&[(ACK, AToB), (ACK, BToA), (FIN, AToB), (FIN, AToB)]),
            Timer::TcpEstablished
        );
    }

    #[test]
    fn a_reset_shortens_and_a_syn_opens_anew_only_then() {
        assert_eq!(
            timer_after(&[(ACK, AToB), (RST, BToA), (ACK, AToB)]),
            Timer::TcpReset
        );
        let established = Progress::first(proto::TCP, ACK, AToB);
        assert!(
            established.after(SYN, AToB).is_some(),
            "a stray SYN must not move a live session"
        );
        let reset = established.after(RST, BToA).unwrap();
        assert_eq!(reset.after(SYN, AToB), None);
        assert!(reset.after(SYN_ACK, BToA).is_some());
        assert!(!may_open(proto::TCP, RST) && may_open(proto::TCP, SYN) && may_open(proto::UDP, 0));
    }

    #[test]
    fn udp_lives_longer_once_both_ends_spoke() {
        let one = Progress::first(proto::UDP, 0, BToA);
        assert_eq!(one.after(0, BToA).unwrap().timer, Timer::UdpOneWay);
        assert_eq!(one.after(0, AToB).unwrap().timer, Timer::UdpTwoWay);
        let timeouts = crate::limits::Timeouts::default();
        assert_eq!(
            (timeouts.of(one.timer), timeouts.of(Timer::UdpTwoWay)),
            (30_000, 120_000)
        );
    }

    #[test]
    fn timer_numbers_round_trip() {
        assert!(
            TIMERS
                .iter()
                .all(|&timer| Timer::from_number(timer.number()) == timer)
        );
    }
}
