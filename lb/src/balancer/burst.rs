//! The frames of a burst, parsed into memory that is used again and again.

use std::ops::Deref;

use super::Observed;
use crate::parse::{Parsed, parse_into};

/// Frames collected for [`super::Balancer::steer`] or [`super::Balancer::observe`]: a slice of [`Observed`] that
/// frames are parsed into in place, which costs half of parsing and then copying.
#[derive(Debug, Default)]
pub struct Burst {
    /// As many as there ever were at once; those behind `len` are of earlier bursts.
    frames: Vec<Observed>,
    len: usize,
}

impl Burst {
    /// An empty burst with room for `frames`; beyond, it grows once.
    #[must_use]
    pub fn with_capacity(frames: usize) -> Burst {
        Burst {
            frames: vec![Observed::EMPTY; frames],
            len: 0,
        }
    }

    /// Parses and adds a frame of `frame_len` bytes (without virtio header and FCS) that begins with `head`: all of it, or at
    /// least the first 256 bytes. With `timestamps`, those of TCP are read as well.
    #[inline]
    pub fn push(&mut self, head: &[u8], frame_len: u32, timestamps: bool) -> &Parsed {
        if self.len == self.frames.len() {
            self.frames.push(Observed::EMPTY);
        }
        let slot = &mut self.frames[self.len];
        self.len += 1;
        slot.frame_len = frame_len;
        parse_into(head, &mut slot.parsed);
        slot.timestamps = if timestamps {
            slot.parsed.timestamps(head)
        } else {
            [0; 2]
        };
        &slot.parsed
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl Deref for Burst {
    type Target = [Observed];

    #[inline]
    fn deref(&self) -> &[Observed] {
        &self.frames[..self.len]
    }
}
