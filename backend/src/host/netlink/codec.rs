//! Netlink messages: a header, a fixed part, and attributes (length, type, value; padded to 4 bytes), all in the machine's
//! byte order (linux/netlink.h).

/// `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`
const TYPE_MASK: u16 = 0x3fff;

/// A request under construction. Far smaller than what a length field can say.
pub(super) struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// `fixed` is what stands between the header and the attributes; its length is a multiple of 4.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Request {
        Request {
            kind,
            flags,
            body: fixed.to_vec(),
        }
    }

    /// Appends an attribute.
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Request {
        append(&mut self.body, kind, value);
        self
    }

    /// Appends an attribute that holds these attributes.
    pub(super) fn nest(mut self, kind: u16, inner: &[(u16, &[u8])]) -> Request {
        let mut bytes = Vec::new();
        for (kind, value) in inner {
            append(&mut bytes, *kind, value);
        }
        append(&mut self.body, kind | NESTED, &bytes);
        self
    }

    /// The bytes to send.
    pub(super) fn encode(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        bytes.extend(length.to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        // The kernel fills in the sender.
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(&self.body);
        bytes
    }
}

fn append(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// One message as it was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    /// What follows the header.
    pub(super) body: &'a [u8],
}

/// The messages of one datagram; ends at the first that is malformed.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let whole = bytes.get(..length).filter(|whole| whole.len() >= HEADER)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16_of(whole.get(4..6)?)?,
            sequence: u32_at(whole, 8)?,
            body: &whole[HEADER..],
        })
    })
}

/// Attributes and their values; ends at the first that is malformed.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_of(bytes.get(..2)?)?);
        let kind = u16_of(bytes.get(2..4)?)? & TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn u16_of(value: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(value.try_into().ok()?))
}

pub(super) fn u32_of(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

pub(super) fn u64_of(value: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(value.try_into().ok()?))
}

/// A text with or without its ending zero.
pub(super) fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    u32_of(bytes.get(at..at + 4)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_encoded_is_read_back() {
        let request = Request::new(18, 5, &[9; 4])
            .put(3, b"abc\0")
            .nest(7, &[(1, &[1, 2]), (2, &[])]);
        let mut bytes = request.encode(42);
        bytes.extend(Request::new(3, 0, &[]).encode(43));
        let all: Vec<Message<'_>> = messages(&bytes).collect();
        assert_eq!(
            all.iter().map(|m| (m.kind, m.sequence)).collect::<Vec<_>>(),
            [(18, 42), (3, 43)]
        );
        let outer: Vec<(u16, &[u8])> = attributes(&all[0].body[4..]).collect();
        assert_eq!(
            (outer[0], text_of(outer[0].1)),
            ((3, &b"abc\0"[..]), "abc".into())
        );
        let inner: Vec<(u16, &[u8])> = attributes(outer[1].1).collect();
        assert_eq!((outer[1].0, inner), (7, vec![(1, &[1u8, 2][..]), (2, &[][..])]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                prop_assert!(attributes(message.body).count() <= bytes.len());
            }
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }
    }
}
