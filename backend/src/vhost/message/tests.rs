//! Decoding and encoding, without a socket.

use std::fs::File;

use super::*;

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [code, flags, size]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .chain(payload.iter().copied())
        .collect()
}

fn decode(code: u32, payload: &[u8], fds: usize) -> Result<Request, Fault> {
    let fds = (0..fds)
        .map(|_| File::open("/dev/null").unwrap().into())
        .collect();
    Message::decode(&message(code, 1, payload), fds).map(|message| message.request)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

#[test]
fn headers_are_checked() {
    let flags = |flags| Message::decode(&message(1, flags, &[]), Vec::new());
    assert!(!flags(0x1).unwrap().need_reply);
    assert!(flags(0x9).unwrap().need_reply);
    assert!(matches!(flags(0x0), Err(Fault::Version { version: 0, .. })));
    assert!(matches!(flags(0x2), Err(Fault::Version { version: 2, .. })));
    assert!(matches!(flags(0x3), Err(Fault::Version { version: 3, .. })));
    assert!(
        matches!(flags(0x5), Err(Fault::Flags { flags: 5, .. })),
        "a reply is no request"
    );
    assert!(matches!(flags(0x8000_0001), Err(Fault::Flags { .. })));
    assert!(matches!(
        Message::decode(&[0; 11], Vec::new()),
        Err(Fault::ClosedMidMessage { received: 11 })
    ));
    let mut cut = message(2, 1, &[0; 8]);
    cut.pop();
    assert!(matches!(
        Message::decode(&cut, Vec::new()),
        Err(Fault::Size { size: 7, .. })
    ));
}

#[test]
fn sizes_and_fds_are_checked_for_every_request() {
    // (request, payload, fds that are right, fds that are wrong)
    let table = [words(&[1]), words(&[0, 4096, 0, 0])].concat();
    let region = words(&[0, 0, 4096, 0, 0]);
    let cases: [(u32, Vec<u8>, usize, usize); 17] = [
        (1, vec![], 0, 1),
        (2, words(&[0]), 0, 1),
        (3, vec![], 0, 1),
        (4, vec![], 0, 1),
        (5, table, 1, 2),
        (8, state(0, 0), 0, 1),
        (9, words(&[0; 5]), 0, 1),
        (10, state(0, 0), 0, 1),
        (11, state(0, 0), 0, 1),
        (15, vec![], 0, 1),
        (16, words(&[0]), 0, 1),
        (17, vec![], 0, 1),
        (18, state(0, 0), 0, 1),
        (19, words(&[0]), 0, 1),
        (36, vec![], 0, 1),
        (37, region.clone(), 1, 0),
        (38, region, 0, 2),
    ];
    for (code, payload, right, wrong) in cases {
        assert!(
            !matches!(decode(code, &payload, right).unwrap(), Request::Unsupported),
            "{code}"
        );
        assert!(
            matches!(decode(code, &payload, wrong), Err(Fault::Fds { .. })),
            "{code}"
        );
        let longer = [&payload[..], &[0]].concat();
        let fault = decode(code, &longer, right).unwrap_err();
        assert!(
            matches!(fault, Fault::Size { .. } | Fault::Malformed { .. }),
            "{code}"
        );
        if let Some((_, shorter)) = payload.split_last() {
            let fault = decode(code, shorter, right).unwrap_err();
            assert!(
                matches!(fault, Fault::Size { .. } | Fault::Malformed { .. }),
                "{code}"
            );
        }
    }
    for code in [0, 6, 7, 20, 24, 31, 33, 45, u32::MAX] {
        assert!(matches!(
            decode(code, &[7; MAX_PAYLOAD], MAX_FDS).unwrap(),
            Request::Unsupported
        ));
        assert!(matches!(
            decode(code, &[7; MAX_PAYLOAD + 1], 0),
            Err(Fault::Size { .. })
        ));
    }
}

#[test]
fn a_memory_table_has_as_many_regions_and_fds_as_it_says() {
    let table = |said: u64, regions: usize| {
        let mut table = words(&[said]);
        table.extend((0..regions).flat_map(|i| words(&[i as u64 * 4096, 4096, 1 << 40, 8192])));
        table
    };
    for count in 1..=8 {
        let Request::SetMemTable(regions) = decode(5, &table(count as u64, count), count).unwrap() else {
            panic!()
        };
        assert_eq!(regions.len(), count);
        let last = &regions[count - 1];
        assert_eq!(last.guest_addr, (count as u64 - 1) * 4096);
        assert_eq!(
            (last.size, last.user_addr, last.mmap_offset),
            (4096, 1 << 40, 8192)
        );
    }
    assert!(
        matches!(decode(5, &table(0, 0), 0), Err(Fault::Size { .. })),
        "no regions at all"
    );
    assert!(matches!(decode(5, &table(9, 9), 8), Err(Fault::Size { .. })));
    assert!(matches!(decode(5, &table(2, 1), 1), Err(Fault::Malformed { .. })));
    assert!(matches!(
        decode(5, &table(0xffff_ffff, 2), 2),
        Err(Fault::Malformed { .. })
    ));
    assert!(matches!(
        decode(5, &table(2, 2), 1),
        Err(Fault::Fds { fds: 1, min: 2, .. })
    ));
}

#[test]
fn ring_fds_follow_bit_8_and_the_index_is_8_bits_wide() {
    for code in [12, 13, 14] {
        let number = |value: u64, fds| decode(code, &value.to_ne_bytes(), fds);
        assert!(matches!(
            number(0x1ff, 0).unwrap(),
            Request::SetVringKick { ring: 255, fd: None }
                | Request::SetVringCall { ring: 255, fd: None }
                | Request::SetVringErr { ring: 255, fd: None }
        ));
        assert!(matches!(number(0x100, 1), Err(Fault::Fds { fds: 1, max: 0, .. })));
        assert!(matches!(number(0, 0), Err(Fault::Fds { fds: 0, min: 1, .. })));
        assert!(matches!(
            number(0x300, 0),
            Err(Fault::Malformed { value: 0x300, .. })
        ));
        assert!(matches!(number(1 << 32, 1), Err(Fault::Malformed { .. })));
        assert!(
            matches!(number(0, 1), Err(Fault::NotAnEventFd { .. })),
            "/dev/null is no eventfd"
        );
    }
}

#[test]
fn fields_are_where_the_specification_puts_them() {
    let addr = [state(3, 1), words(&[0x10, 0x20, 0x30, 0x40])].concat();
    let Request::SetVringAddr {
        ring: 3,
        flags: 1,
        addrs,
    } = decode(9, &addr, 0).unwrap()
    else {
        panic!()
    };
    assert_eq!(
        addrs,
        RingAddrs {
            desc: 0x10,
            used: 0x20,
            avail: 0x30
        }
    );
    let region = words(&[0, 0x1000, 0x2000, 0x3000, 0x4000]);
    let Request::AddMemReg(added) = decode(37, &region, 1).unwrap() else {
        panic!()
    };
    let fields = [added.guest_addr, added.size, added.user_addr, added.mmap_offset];
    assert_eq!(fields, [0x1000, 0x2000, 0x3000, 0x4000]);
    assert!(matches!(
        decode(38, &region, 1).unwrap(),
        Request::RemMemReg {
            guest_addr: 0x1000,
            size: 0x2000,
            user_addr: 0x3000
        }
    ));
    assert!(matches!(
        decode(8, &state(7, 9), 0).unwrap(),
        Request::SetVringNum { ring: 7, size: 9 }
    ));
    assert!(matches!(
        decode(19, &[0x52, 0x54, 0, 1, 2, 3, 0xaa, 0xbb], 0).unwrap(),
        Request::SendRarp(Mac([0x52, 0x54, 0, 1, 2, 3]))
    ));
}

#[test]
fn replies_carry_exactly_version_and_reply_flag() {
    let bytes = Reply::vring_state(Code(11), 3, 0xffff).encode();
    assert_eq!(bytes[..], message(11, 5, &state(3, 0xffff))[..]);
    let bytes = Reply::number(Code(1), u64::MAX - 1).encode();
    assert_eq!(bytes[..], message(1, 5, &words(&[u64::MAX - 1]))[..]);
}
