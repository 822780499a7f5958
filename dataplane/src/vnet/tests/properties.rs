//! What holds of any frames, chains and buffers, and of garbage.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::virtq::testing::{AVAIL_FLAG, USED_FLAG};

/// A frame's length, where its chain is cut, and from which buffer on the chain is indirect.
fn sent() -> impl Strategy<Value = (usize, Vec<usize>, Option<usize>)> {
    let len = prop_oneof![0usize..100, 0usize..2000, 0usize..17000];
    (
        len,
        prop::collection::vec(0usize..3000, 0..4),
        prop::option::of(0usize..5),
    )
}

/// A kind of ring and a size for it with room for 45 descriptors.
fn ring_kind() -> impl Strategy<Value = (Kind, u16)> {
    prop_oneof![
        Just((Kind::Split, 64)),
        (45u16..=64).prop_map(|size| (Kind::Packed, size)),
    ]
}

/// A packed ring's descriptor: address, length, id and flags, with all the flags that mean something.
fn packed_garbage() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let available = prop::sample::select(vec![0, AVAIL_FLAG, USED_FLAG, AVAIL_FLAG | USED_FLAG]);
    (
        0u64..MEMORY_END + 64,
        0u32..5000,
        any::<u16>(),
        0u16..8,
        available,
    )
        .prop_map(|(addr, len, id, flags, available)| (addr.max(0x8_0000), len, id, flags | available))
}

/// A receive buffer: the chain's id, and address and length of each of its parts.
type Buffer = (u16, Vec<(u64, u32, bool)>);

/// Looks at what a driver got of a burst of `frames`: each that fits into what is `offered` (oldest first) behind its header, in as
/// few buffers as it takes, and nothing else. Returns what the burst must have told; used buffers are taken out of `offered`.
fn received(
    driver: &mut Driver,
    offered: &mut VecDeque<Buffer>,
    frames: &[Vec<u8>],
) -> Result<GuestRxBurst, TestCaseError> {
    let room_of = |buffer: &Buffer| buffer.1.iter().map(|part| part.1 as usize).sum::<usize>();
    let mut burst = GuestRxBurst::default();
    let mut used = driver.used().into_iter();
    for (at, frame) in frames.iter().enumerate() {
        let need = PLAIN.len() + frame.len();
        let (mut room, mut count) = (0, 0);
        for buffer in offered
            .iter()
            .take(if driver.spec.mergeable { usize::MAX } else { 1 })
        {
            count += 1;
            room += room_of(buffer);
            if room >= need {
                break;
            }
        }
        if room < need {
            if !driver.spec.mergeable && count == 1 {
                burst.too_long += 1;
                continue;
            }
            break;
        }
        let (mut got, mut left) = (Vec::new(), need);
        for buffer in offered.drain(..count) {
            let here = left.min(room_of(&buffer));
            prop_assert_eq!(used.next(), Some((buffer.0, u32::try_from(here).unwrap())));
            let parts = buffer.1.iter();
            got.extend(
                parts
                    .flat_map(|part| driver.read(part.0, part.1 as usize))
                    .take(here),
            );
            left -= here;
        }
        let mut whole = PLAIN.to_vec();
        whole[10] = u8::try_from(count).unwrap();
        whole.extend(frame);
        prop_assert!(got == whole, "frame {} of {} bytes differs", at, frame.len());
        burst.delivered += 1;
        burst.bytes += frame.len() as u64;
    }
    prop_assert_eq!(used.next(), None);
    Ok(burst)
}

/// Gives the guest two frames, or takes what it sends.
fn move_frames(ring: &mut Ring, cache: &mut ChunkCache, receive: bool) -> Result<(), RingError> {
    let (frames, result) = if receive {
        let frames = vec![
            make_frame(cache, &pattern(600, 1)),
            make_frame(cache, &pattern(60, 2)),
        ];
        let result = give_to_guest(ring, cache.memory(), &frames).map(|_| ());
        (frames, result)
    } else {
        let mut frames = Vec::new();
        let result = take_from_guest(ring, cache, &mut frames, 8).map(|_| ());
        (frames, result)
    };
    frames.into_iter().for_each(|frame| cache.free(frame));
    result
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn guest_tx_gives_what_was_sent(
        (kind, size) in ring_kind(),
        base in prop_oneof![Just(0u16), 65500u16..=65535, any::<u16>()],
        bursts in prop::collection::vec((prop::collection::vec(sent(), 1..10), any::<bool>()), 1..6),
    ) {
        let mut driver = Driver::of(kind, size, base);
        let mut ring = driver.ring();
        let mut cache = chunks(64);
        let mut seed = 0;
        for (burst, restart) in bursts {
            if restart {
                driver.spec.base = ring.base();
                ring = driver.ring();
            }
            let (mut heads, mut frames, mut expected) = (Vec::new(), Vec::new(), GuestTxBurst::default());
            for (len, cuts, indirect) in burst {
                seed += 1;
                let frame = pattern(len, seed);
                let whole = [&PLAIN[..], &frame].concat();
                let parts = cut(&whole, &cuts);
                heads.push((driver.send(&parts, indirect.filter(|&at| at < parts.len())), 0));
                expected.chains += 1;
                match len {
                    0..14 => expected.too_short += 1,
                    14..=LONGEST => {
                        frames.push([&frame[..], &[0; 60][len.min(60)..]].concat());
                        expected.bytes += len.max(60) as u64;
                    }
                    _ => expected.too_long += 1,
                }
            }
            prop_assert!(ring.has_available());
            let (burst, taken) = take(&mut ring, &mut cache);
            prop_assert_eq!(burst, expected);
            prop_assert!(taken == frames, "frames differ");
            prop_assert_eq!(driver.used(), heads);
            prop_assert_eq!(ring.base(), driver.settled_base());
            prop_assert!(!ring.has_available());
        }
        prop_assert_eq!(cache.memory().census().held, 0);
    }

    #[test]
    fn guest_rx_gets_what_was_given(
        (kind, size) in ring_kind(),
        base in prop_oneof![Just(0u16), 65500u16..=65535, any::<u16>()],
        mergeable: bool,
        rounds in prop::collection::vec((
            prop::collection::vec((prop::collection::vec(0u32..2000, 1..4), prop::option::of(0usize..4)), 0..12),
            prop::collection::vec(prop_oneof![60usize..1600, 60usize..9000], 1..8),
            any::<bool>(),
        ), 1..6),
    ) {
        let mut driver = Driver::of(kind, size, base);
        driver.spec.mergeable = mergeable;
        let mut ring = driver.ring();
        let mut cache = chunks(64);
        let mut offered = VecDeque::new();
        for (chains, lens, restart) in rounds {
            if restart {
                driver.spec.base = ring.base();
                ring = driver.ring();
            }
            for (buffers, indirect) in chains {
                // Descriptors are used in a circle, so no more chains than this may be out at once.
                if offered.len() < 15 {
                    let indirect = indirect.filter(|&at| at < buffers.len());
                    offered.push_back(driver.post(&buffers, indirect));
                }
            }
            let whole: Vec<_> = lens.iter().zip(0..).map(|(&len, seed)| pattern(len, seed)).collect();
            let frames: Vec<_> = whole.iter().map(|bytes| make_frame(&mut cache, bytes)).collect();
            let burst = give_to_guest(&mut ring, cache.memory(), &frames).unwrap();
            prop_assert_eq!(burst, received(&mut driver, &mut offered, &whole)?);
            prop_assert_eq!(ring.base(), driver.settled_base());
            prop_assert_eq!(ring.has_available(), !offered.is_empty());
            frames.into_iter().for_each(|frame| cache.free(frame));
        }
    }

    /// Straight from guest to guest: what comes out is what was sent, whatever the shapes of the chains on both sides.
    #[test]
    fn what_is_forwarded_is_what_was_sent(
        (from_kind, from_size) in ring_kind(),
        (to_kind, to_size) in ring_kind(),
        mergeable: bool,
        legacy_sender: bool,
        rounds in prop::collection::vec((
            prop::collection::vec(sent(), 1..8),
            prop::collection::vec((prop::collection::vec(0u32..2500, 1..4), prop::option::of(0usize..4)), 0..12),
        ), 1..5),
    ) {
        let legacy_sender = legacy_sender && from_kind == Kind::Split;
        let (mut sender, mut receiver) = (Driver::of(from_kind, from_size, 0), Driver::of(to_kind, to_size, 65_530));
        (sender.spec.version_1, sender.spec.mergeable) = (!legacy_sender, !legacy_sender);
        receiver.spec.mergeable = mergeable;
        let header = &PLAIN[..if legacy_sender { 10 } else { 12 }];
        let (mut from, mut to) = (sender.ring(), receiver.ring());
        let mut offered = VecDeque::new();
        let mut seed = 0;
        for (frames, buffers) in rounds {
            for (lens, indirect) in buffers {
                if offered.len() < 15 {
                    offered.push_back(receiver.post(&lens, indirect.filter(|&at| at < lens.len())));
                }
            }
            let mut expected = Vec::new();
            for (len, cuts, indirect) in frames {
                seed += 1;
                let frame = pattern(len, seed);
                let whole = [header, &frame].concat();
                let parts = cut(&whole, &cuts);
                sender.send(&parts, indirect.filter(|&at| at < parts.len()));
                if (14..=LONGEST).contains(&len) {
                    expected.push([&frame[..], &[0; 60][len.min(60)..]].concat());
                }
            }
            let mut looks = Vec::new();
            look(&mut from, 64, &mut looks).unwrap();
            let picks: Vec<_> = looks.iter().enumerate().filter(|(_, look)| look.flaw().is_none()).collect();
            prop_assert_eq!(picks.len(), expected.len());
            let burst = forward(&from, picks.iter().copied(), &mut to).unwrap();
            finish(&mut from);
            sender.used();
            prop_assert!(!from.has_available());
            prop_assert_eq!(burst, received(&mut receiver, &mut offered, &expected)?);
            prop_assert_eq!(to.has_available(), !offered.is_empty());
        }
    }

    /// Whatever the rings hold, nothing panics or hangs, and the memory behind the rings is all that is touched.
    #[test]
    fn garbage_is_survived(
        descs in prop::collection::vec((0u64..MEMORY_END + 64, 0u32..5000, 0u16..8, 0u16..10), 8),
        heads in prop::collection::vec(0u16..9, 1..12),
        receive: bool,
    ) {
        let mut driver = Driver::new(8, 65530);
        for (at, (addr, len, flags, next)) in (0..).zip(descs) {
            // Not onto the rings themselves, which would be the guest's own fault but not repeatable.
            driver.desc(at, addr.max(0x8_0000), len, flags, next);
        }
        let mut ring = driver.ring();
        let mut cache = chunks(64);
        for head in heads {
            driver.offer_head(head);
            let before = ring.base();
            let result = move_frames(&mut ring, &mut cache, receive);
            ring.notify();
            let completed = u16::try_from(driver.used().len()).unwrap();
            let before = u16::try_from(before).unwrap();
            prop_assert_eq!(ring.base(), u32::from(before.wrapping_add(completed)));
            if result.is_err() {
                break;
            }
        }
        prop_assert_eq!(cache.memory().census().held, 0);
    }

    /// The same for packed rings, with wrap counters that lie.
    #[test]
    fn packed_garbage_is_survived(
        base in prop_oneof![Just(0u16), 0u16..20],
        first in prop::collection::vec(packed_garbage(), 7),
        then in prop::collection::vec((0u16..7, packed_garbage()), 1..20),
        receive: bool,
    ) {
        let driver = Driver::of(Kind::Packed, 7, base);
        for (at, (addr, len, id, flags)) in (0..).zip(first) {
            driver.desc(at, addr, len, id, flags);
        }
        let mut ring = driver.ring();
        let mut cache = chunks(64);
        for (at, (addr, len, id, flags)) in then {
            let result = move_frames(&mut ring, &mut cache, receive);
            ring.notify();
            ring.arm();
            let (avail, used) = (ring.base() & 0xffff, ring.base() >> 16);
            prop_assert_eq!(avail, used, "all that was taken was used");
            prop_assert!(avail & 0x7fff < 7);
            if result.is_err() {
                break;
            }
            driver.desc(at, addr, len, id, flags);
        }
        prop_assert_eq!(cache.memory().census().held, 0);
    }
}
