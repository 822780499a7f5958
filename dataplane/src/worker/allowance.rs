//! How many frames a guest's ring may give in one turn.

/// Frames taken from one queue in one turn.
pub(super) const BURST: usize = 64;

/// Frames taken from all the guests' rings of a share in one turn, as long as each that has a burst gets one. A ring that has the turn to
/// itself may give so many: each destination is visited and each index written once a burst, so a frame of a long one costs less. What speaks
/// against it is that all others wait meanwhile. (Linux's vhost-net leaves a ring after 256 frames or 512 KiB.)
pub(super) const LONG_BURST: usize = 192;

/// Mean bytes of a frame up to which a burst may be long: longer ones take long enough, and have little to gain.
const LONG_BURST_MEAN: u64 = 2048;

/// What waited in a ring at the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Backlog {
    /// Less than a burst.
    #[default]
    Small,
    /// A burst or more, of frames that take long.
    LongFrames,
    /// A burst or more, of short frames.
    ShortFrames,
}

impl Backlog {
    /// After so many frames of so many bytes together were taken.
    #[inline]
    pub(super) fn of(frames: usize, bytes: u64) -> Backlog {
        if frames < BURST {
            Backlog::Small
        } else if bytes > LONG_BURST_MEAN * frames as u64 {
            Backlog::LongFrames
        } else {
            Backlog::ShortFrames
        }
    }
}

/// What a worker's queues had in one turn, and what rings may give in the next.
#[derive(Debug)]
pub(super) struct Allowance {
    /// Of a ring with frames enough.
    most: usize,
    /// Rings with a burst or more, in this turn.
    rings: usize,
    /// A NIC queue had a full burst in this turn: what it receives is lost if it has to wait, what a guest sends is not.
    nic_is_busy: bool,
}

impl Allowance {
    pub(super) fn new() -> Allowance {
        Allowance {
            most: BURST,
            rings: 0,
            nic_is_busy: false,
        }
    }

    /// Frames that a ring may give now.
    #[inline]
    pub(super) fn of(&self, backlog: Backlog) -> usize {
        match backlog {
            Backlog::ShortFrames => self.most,
            Backlog::Small | Backlog::LongFrames => BURST,
        }
    }

    /// A ring was looked at.
    #[inline]
    pub(super) fn note_ring(&mut self, backlog: Backlog) {
        self.rings += usize::from(backlog != Backlog::Small);
    }

    /// A NIC queue was looked at, and gave so many frames.
    #[inline]
    pub(super) fn note_nic(&mut self, frames: usize) {
        self.nic_is_busy |= frames >= BURST;
    }

    /// Every queue was looked at.
    #[inline]
    pub(super) fn end_turn(&mut self) {
        self.most = match self.rings {
            _ if self.nic_is_busy => BURST,
            0 | 1 => LONG_BURST,
            2 => LONG_BURST / 2,
            _ => BURST,
        };
        (self.rings, self.nic_is_busy) = (0, false);
    }
}

const _: () = assert!(LONG_BURST / 3 == BURST);

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Backlog = Backlog::ShortFrames;

    /// What a ring of short frames may give after a turn in which rings and NIC queues had this.
    fn after(rings: &[Backlog], nics: &[usize]) -> usize {
        let mut allowance = Allowance::new();
        rings.iter().for_each(|backlog| allowance.note_ring(*backlog));
        nics.iter().for_each(|frames| allowance.note_nic(*frames));
        allowance.end_turn();
        allowance.of(SHORT)
    }

    #[test]
    fn the_rings_that_have_frames_enough_share_the_turn() {
        assert_eq!(after(&[SHORT], &[]), 192);
        assert_eq!(after(&[SHORT, Backlog::Small], &[]), 192);
        assert_eq!(after(&[SHORT, Backlog::LongFrames], &[]), 96);
        assert_eq!(after(&[SHORT; 3], &[]), 64);
        assert_eq!(after(&[SHORT; 40], &[]), 64);
    }

    #[test]
    fn what_nics_receive_does_not_wait_for_long_bursts() {
        assert_eq!(after(&[SHORT], &[0, 63]), 192);
        assert_eq!(after(&[SHORT], &[0, 64]), 64);
    }

    #[test]
    fn a_turn_forgets_the_one_before() {
        let mut allowance = Allowance::new();
        assert_eq!(allowance.of(SHORT), 64);
        (0..5).for_each(|_| allowance.note_ring(SHORT));
        allowance.note_nic(64);
        allowance.end_turn();
        allowance.note_ring(SHORT);
        allowance.end_turn();
        assert_eq!(allowance.of(SHORT), 192);
    }

    #[test]
    fn long_bursts_are_for_who_has_many_short_frames() {
        for (frames, bytes, backlog, most) in [
            (0, 0, Backlog::Small, 64),
            (63, 63 * 60, Backlog::Small, 64),
            (64, 64 * 60, Backlog::ShortFrames, 192),
            (100, 100 * 1518, Backlog::ShortFrames, 192),
            (192, 192 * 2048, Backlog::ShortFrames, 192),
            (64, 64 * 2049, Backlog::LongFrames, 64),
            (64, 64 * 9014, Backlog::LongFrames, 64),
        ] {
            assert_eq!(
                Backlog::of(frames, bytes),
                backlog,
                "{frames} frames, {bytes} bytes"
            );
            let mut allowance = Allowance::new();
            allowance.note_ring(backlog);
            allowance.end_turn();
            assert_eq!(allowance.of(backlog), most, "{frames} frames, {bytes} bytes");
        }
    }
}
