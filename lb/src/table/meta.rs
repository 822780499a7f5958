//! The state word of an entry.

use crate::key::Direction;
use crate::nics::NicIndex;
use crate::parse::tcp_flag;
use crate::state::{Progress, Timer};

/// One word that changes as a whole:
/// `signature:32 unused:6 watch:10 moved:1 target:3 closed:2 spoke:2 timer:4 moving:1 nic:3`.
/// The signature is half of the key's hash. In a bucket, the unused bits are the bucket's.
///
/// A session that is asked to move has `moving` set, which makes a NIC that does not exist of its [`Meta::pin`]: the frame
/// loop, which asks whether the pin is alive anyway, finds out without a question of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta(u64);

const TIMER_SHIFT: u32 = 4;
const SPOKE_SHIFT: u32 = 8;
const CLOSED_SHIFT: u32 = 10;
const TARGET_SHIFT: u32 = 12;
const WATCH_SHIFT: u32 = 16;
/// The first of the bits that a bucket keeps something of its own in.
pub(super) const BUCKET_SHIFT: u32 = 26;
pub(super) const SIGNATURE_SHIFT: u32 = 32;
const NIC_MASK: u64 = 0x7;
const MOVING: u64 = 0x8;
const TARGET_MASK: u64 = 0x7 << TARGET_SHIFT;
const MOVED: u64 = 0x8 << TARGET_SHIFT;
const WATCH_MASK: u64 = 0x3ff << WATCH_SHIFT;
const PROGRESS_MASK: u64 = 0xff << TIMER_SHIFT;
const SIGNATURE_MASK: u64 = !0 << SIGNATURE_SHIFT;

fn progress_bits(progress: Progress) -> u64 {
    u64::from(progress.timer.number() & 0xf) << TIMER_SHIFT
        | u64::from(progress.spoke & 3) << SPOKE_SHIFT
        | u64::from(progress.closed & 3) << CLOSED_SHIFT
}

impl Meta {
    /// The state of an entry made now. [`super::SessionTable::insert`] adds the key's signature.
    #[must_use]
    pub fn new(nic: NicIndex, progress: Progress) -> Meta {
        Meta(u64::from(nic) & NIC_MASK | progress_bits(progress))
    }

    pub(super) const fn from_word(word: u64) -> Meta {
        Meta(word)
    }

    pub(super) const fn word(self) -> u64 {
        self.0
    }

    pub(super) const fn signature(self) -> u64 {
        self.0 >> SIGNATURE_SHIFT
    }

    pub(super) const fn with_signature_of(self, other: Meta) -> Meta {
        Meta(self.0 & !SIGNATURE_MASK | other.0 & SIGNATURE_MASK)
    }

    pub(super) fn with_signature(self, signature: u32) -> Meta {
        Meta(self.0 & !SIGNATURE_MASK | u64::from(signature) << SIGNATURE_SHIFT)
    }

    /// The NIC that the session is pinned to.
    #[must_use]
    #[inline]
    pub const fn nic(self) -> NicIndex {
        self.low_byte(0) & 0x7
    }

    /// The NIC, or a number that is no NIC's if the session is asked to move.
    #[must_use]
    #[inline]
    pub const fn pin(self) -> NicIndex {
        self.low_byte(0) & 0xf
    }

    /// The same, moved to another NIC.
    #[must_use]
    pub fn with_nic(self, nic: NicIndex) -> Meta {
        Meta(self.0 & !(NIC_MASK | MOVING | TARGET_MASK) | MOVED | u64::from(nic) & NIC_MASK)
    }

    /// Whether the session has been on another NIC before.
    #[must_use]
    pub const fn has_moved(self) -> bool {
        self.0 & MOVED != 0
    }

    /// The NIC that the session is asked to move to when it pauses.
    #[must_use]
    pub const fn target(self) -> Option<NicIndex> {
        if self.0 & MOVING == 0 {
            return None;
        }
        Some(self.low_byte(TARGET_SHIFT) & 0x7)
    }

    /// The same, asked to move, or not any more.
    #[must_use]
    pub fn with_target(self, target: Option<NicIndex>) -> Meta {
        let rest = self.0 & !(MOVING | TARGET_MASK);
        Meta(target.map_or(rest, |nic| rest | MOVING | u64::from(nic & 0x7) << TARGET_SHIFT))
    }

    /// The number under which the session's bytes are counted apart; 0: they are not.
    #[must_use]
    pub fn watch(self) -> u16 {
        u16::try_from((self.0 & WATCH_MASK) >> WATCH_SHIFT).unwrap_or(0)
    }

    /// The same, watched under a number (up to 1023), or not any more (0).
    #[must_use]
    pub fn with_watch(self, watch: u16) -> Meta {
        Meta(self.0 & !WATCH_MASK | u64::from(watch & 0x3ff) << WATCH_SHIFT)
    }

    /// What the session's frames have brought it to.
    #[must_use]
    pub fn progress(self) -> Progress {
        Progress {
            timer: Timer::from_number(self.low_byte(TIMER_SHIFT) & 0xf),
            spoke: self.low_byte(SPOKE_SHIFT) & 3,
            closed: self.low_byte(CLOSED_SHIFT) & 3,
        }
    }

    /// The same, further on.
    #[must_use]
    pub fn with_progress(self, progress: Progress) -> Meta {
        Meta(self.0 & !PROGRESS_MASK | progress_bits(progress))
    }

    /// The number of its timer, below 16.
    pub(super) fn timer_number(self) -> usize {
        usize::from(self.low_byte(TIMER_SHIFT) & 0xf)
    }

    /// Whether another frame with these flags from this end leaves the state as it is: nearly all frames do, so this is asked
    /// before [`Progress::after`], which answers the same for every frame.
    #[must_use]
    #[inline]
    pub(crate) fn is_settled(self, tcp_flags: u8, direction: Direction) -> bool {
        const CHANGING: u8 = tcp_flag::SYN | tcp_flag::FIN | tcp_flag::RST;
        const _: () = assert!(Timer::TcpSyn.number() == 0);
        let spoken = self.0 >> SPOKE_SHIFT & u64::from(direction.end_bit()) != 0;
        // Any segment may end the handshake.
        let handshake = self.0 >> TIMER_SHIFT & 0xf == 0;
        spoken && !handshake && tcp_flags & CHANGING == 0
    }

    const fn low_byte(self, shift: u32) -> u8 {
        (self.0 >> shift).to_le_bytes()[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_does_not_change() {
        let mut settled = 0;
        for (timer, spoke, closed) in
            (0..16u8).flat_map(|timer| (0..16u8).map(move |ends| (timer, ends & 3, ends >> 2)))
        {
            let progress = Progress {
                timer: Timer::from_number(timer),
                spoke,
                closed,
            };
            // Once both ends have closed, or spoken, the timer is never one of those.
            let reachable = !(closed == 3 && progress.timer == Timer::TcpEstablished
                || spoke == 3 && matches!(progress.timer, Timer::UdpOneWay | Timer::TcpOneWay)
                || closed == 3 && progress.timer == Timer::TcpOneWay);
            for flags in (0..=u8::MAX).filter(|_| reachable) {
                for direction in [Direction::AToB, Direction::BToA] {
                    if Meta::new(0, progress).is_settled(flags, direction) {
                        assert_eq!(
                            progress.after(flags, direction),
                            Some(progress),
                            "flags {flags:#x}"
                        );
                        settled += 1;
                    }
                }
            }
        }
        assert!(settled > 1000);
    }

    #[test]
    fn parts_do_not_disturb_each_other() {
        let progress = Progress {
            timer: Timer::UdpTwoWay,
            spoke: 3,
            closed: 1,
        };
        let meta = Meta::new(7, progress).with_signature(u32::MAX);
        assert_eq!(
            (meta.nic(), meta.progress(), meta.signature()),
            (7, progress, u64::from(u32::MAX))
        );
        let next = Progress {
            timer: Timer::TcpSyn,
            spoke: 1,
            closed: 0,
        };
        let asked = meta.with_watch(1023).with_target(Some(5)).with_progress(progress);
        assert_eq!((asked.nic(), asked.pin(), asked.target()), (7, 15, Some(5)));
        assert_eq!(
            (asked.watch(), asked.has_moved(), asked.signature()),
            (1023, false, u64::from(u32::MAX))
        );
        assert_eq!(asked.with_target(None).with_watch(0), meta);
        let gone = asked.with_nic(5);
        assert_eq!(
            (gone.nic(), gone.pin(), gone.target(), gone.watch()),
            (5, 5, None, 1023)
        );
        assert!(gone.has_moved());
        let moved = meta.with_nic(2).with_progress(next);
        assert_eq!(
            (moved.nic(), moved.progress(), moved.signature()),
            (2, next, u64::from(u32::MAX))
        );
        assert_eq!(
            asked.word() >> BUCKET_SHIFT & 0x3f,
            0,
            "these bits are the bucket's"
        );
        assert_eq!(
            Meta::default().with_signature_of(asked).signature(),
            u64::from(u32::MAX)
        );
    }
}
