//! Round trips measured in passing: what was sent, to be found again by its answer.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::MAX_NICS;
use crate::balancer::Observed;
use crate::key::Direction;
use crate::nics::NicIndex;
use crate::parse::tcp_flag;

/// Requests of a NIC that are waited for at a time.
const SLOTS: usize = 16;
/// An answer that takes longer will not come, in microseconds.
const PATIENCE_US: u32 = 1_000_000;

/// Requests on their way, each `tag:32 sent at:32`; sent at 0: it was answered.
///
/// A SYN is answered by the SYN-ACK, a SYN-ACK by the ACK, and a segment with a timestamp by the one that echoes it
/// (RFC 7323). Only the first segment with a value counts: the echo may have been under way before the later ones.
#[derive(Default)]
pub(crate) struct InFlight([[AtomicU64; SLOTS]; MAX_NICS]);

/// What a segment waits for, or answers.
#[derive(Clone, Copy)]
enum Token {
    Syn,
    SynAck,
    Timestamp(u32),
}

fn tag(hash: u64, direction: Direction, token: Token) -> u64 {
    let number = match token {
        Token::Syn => 1 << 32,
        Token::SynAck => 2 << 32,
        Token::Timestamp(value) => u64::from(value),
    };
    let way = u64::from(direction == Direction::AToB) << 34;
    let mixed = (hash ^ number ^ way).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32
}

impl InFlight {
    fn slot(&self, nic: NicIndex, hash: u64) -> &AtomicU64 {
        let [low, ..] = hash.to_le_bytes();
        &self.0[usize::from(nic) % MAX_NICS][usize::from(low) % SLOTS]
    }

    /// A segment leaves by a NIC; `hash` is its session's.
    pub(crate) fn sent(&self, nic: NicIndex, hash: u64, frame: &Observed, micros: u32) {
        let parsed = &frame.parsed;
        let syn = parsed.tcp_flags() & (tcp_flag::SYN | tcp_flag::ACK);
        let token = match (syn, frame.timestamps) {
            (tcp_flag::SYN, _) => Token::Syn,
            (tcp_flag::ACK | 0, [0, 0]) | (0, _) => return,
            (tcp_flag::ACK, [value, _]) => Token::Timestamp(value),
            _ => Token::SynAck,
        };
        let (slot, tag) = (self.slot(nic, hash), tag(hash, parsed.direction(), token));
        let stored = slot.load(Relaxed);
        let sent = low_half(stored);
        let waits = sent != 0 && micros.wrapping_sub(sent) < PATIENCE_US;
        if !waits && stored >> 32 != tag {
            slot.store(tag << 32 | u64::from(micros.max(1)), Relaxed);
        }
    }

    /// A segment has come; `hash` is its session's, which is pinned to `nic`. Returns the round trip in microseconds if it
    /// answers one that was waited for.
    pub(crate) fn received(&self, nic: NicIndex, hash: u64, frame: &Observed, micros: u32) -> Option<u32> {
        let slot = self.slot(nic, hash);
        let stored = slot.load(Relaxed);
        let sent = low_half(stored);
        if sent == 0 {
            return None;
        }
        let parsed = &frame.parsed;
        let syn = parsed.tcp_flags() & (tcp_flag::SYN | tcp_flag::ACK);
        let way = parsed.direction().reversed();
        let answers = |token| stored >> 32 == tag(hash, way, token);
        let found = match syn {
            tcp_flag::SYN | 0 => false,
            tcp_flag::ACK => {
                let [value, echo] = frame.timestamps;
                (value | echo != 0 && answers(Token::Timestamp(echo))) || answers(Token::SynAck)
            }
            _ => answers(Token::Syn),
        };
        let elapsed = micros.wrapping_sub(sent);
        if !found || elapsed >= PATIENCE_US {
            return None;
        }
        let answered = stored & !0xffff_ffff;
        // Two workers may see the answer and its repetition: one of them measures.
        slot.compare_exchange(stored, answered, Relaxed, Relaxed).ok()?;
        Some(elapsed)
    }
}

fn low_half(word: u64) -> u32 {
    let [.., a, b, c, d] = word.to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}
