//! The frames of a burst, parsed into memory that is used again and again, and the lookups of their sessions under way.

use std::ops::Deref;

use super::Observed;
use crate::parse::parse_into;
use crate::table::SessionTable;

/// Frames collected for [`super::Balancer::steer`] or [`super::Balancer::observe`]: a slice of [`Observed`] that
/// frames are parsed into in place, which costs half of parsing and then copying.
#[derive(Debug, Default)]
pub struct Burst {
    /// As many as there ever were at once; those behind `len` are of earlier bursts.
    frames: Vec<Observed>,
    len: usize,
    /// The lookups of so many of the first frames have begun.
    begun: usize,
}

impl Burst {
    /// An empty burst with room for `frames`; beyond, it grows once.
    #[must_use]
    pub fn with_capacity(frames: usize) -> Burst {
        Burst {
            frames: vec![Observed::EMPTY; frames],
            ..Burst::default()
        }
    }

    /// Parses and adds a frame of `frame_len` bytes (without virtio header and FCS) that begins with `head`: all of it, or at
    /// least the first 256 bytes. With `timestamps`, those of TCP are read as well.
    #[inline]
    pub fn push(&mut self, head: &[u8], frame_len: u32, timestamps: bool) -> &Observed {
        self.parse(head, frame_len, timestamps)
    }

    #[inline]
    fn parse(&mut self, head: &[u8], frame_len: u32, timestamps: bool) -> &mut Observed {
        let slot = self.next();
        slot.frame_len = frame_len;
        parse_into(head, &mut slot.parsed);
        slot.timestamps = if timestamps {
            slot.parsed.timestamps(head)
        } else {
            [0; 2]
        };
        slot
    }

    #[inline]
    fn next(&mut self) -> &mut Observed {
        if self.len == self.frames.len() {
            self.frames.push(Observed::EMPTY);
        }
        self.len += 1;
        &mut self.frames[self.len - 1]
    }

    /// Adds a frame that was parsed elsewhere.
    pub fn push_parsed(&mut self, frame: &Observed) {
        *self.next() = *frame;
    }

    /// Adds a frame as [`Burst::push`] does, and begins the lookup of its session.
    #[inline]
    pub(super) fn push_searched(
        &mut self,
        table: &SessionTable,
        head: &[u8],
        frame_len: u32,
        timestamps: bool,
    ) -> &Observed {
        let has_begun = self.begun == self.len;
        self.begun += usize::from(has_begun);
        let frame = self.parse(head, frame_len, timestamps);
        frame.search = table.begin(frame.parsed.key());
        frame
    }

    /// The frames, whose lookups have all begun.
    pub(super) fn searched(&mut self, table: &SessionTable) -> &[Observed] {
        let frames = &mut self.frames[..self.len];
        for frame in &mut frames[self.begun..] {
            frame.search = table.begin(frame.parsed.key());
        }
        // Another table may be next.
        self.begun = 0;
        frames
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.len = 0;
        self.begun = 0;
    }
}

impl Deref for Burst {
    type Target = [Observed];

    #[inline]
    fn deref(&self) -> &[Observed] {
        &self.frames[..self.len]
    }
}
