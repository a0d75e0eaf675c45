//! QUIC's variable-length integer (RFC 9000, section 16): 62 bits in 1, 2, 4 or 8 bytes, the two
//! highest bits of the first byte telling which.
//!
//! Encoding uses the shortest form; decoding takes any.

use bytes::BufMut;
use thiserror::Error;

/// An integer of at most 62 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VarInt(u64);

/// The value needs more than 62 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0} does not fit a variable-length integer: it must be below 2^62")]
pub struct VarIntTooLarge(pub u64);

impl VarInt {
    /// The largest value: 2^62 - 1.
    pub const MAX: Self = Self((1 << 62) - 1);

    /// Returns the value.
    #[must_use]
    pub fn into_inner(self) -> u64 {
        self.0
    }

    /// Appends the shortest encoding: 1, 2, 4 or 8 bytes.
    pub fn encode(self, out: &mut impl BufMut) {
        let (tag, size) = match self.0 {
            0..0x40 => (0b00, 1),
            0x40..0x4000 => (0b01, 2),
            0x4000..0x4000_0000 => (0b10, 4),
            _ => (0b11, 8),
        };
        out.put_uint(self.0 | (tag << (8 * size - 2)), size);
    }

    /// Reads an integer from the head of `buf`, and returns it with the number of its bytes.
    /// `None`: the integer is longer than `buf`.
    #[must_use]
    pub fn decode(buf: &[u8]) -> Option<(Self, usize)> {
        let first = *buf.first()?;
        let size = 1 << (first >> 6);
        let rest = buf.get(1..size)?;
        let value = rest.iter().fold(u64::from(first & 0x3f), |value, byte| {
            value << 8 | u64::from(*byte)
        });
        Some((Self(value), size))
    }
}

impl From<u8> for VarInt {
    fn from(value: u8) -> Self {
        Self(value.into())
    }
}

impl From<u16> for VarInt {
    fn from(value: u16) -> Self {
        Self(value.into())
    }
}

impl From<u32> for VarInt {
    fn from(value: u32) -> Self {
        Self(value.into())
    }
}

impl TryFrom<u64> for VarInt {
    type Error = VarIntTooLarge;

    fn try_from(value: u64) -> Result<Self, VarIntTooLarge> {
        if value <= Self::MAX.0 {
            Ok(Self(value))
        } else {
            Err(VarIntTooLarge(value))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        VarInt::try_from(value).unwrap().encode(&mut out);
        out
    }

    /// The examples of RFC 9000, appendix A.1.
    #[test]
    fn agrees_with_the_rfc() {
        let examples: [(u64, &[u8]); 4] = [
            (
                151_288_809_941_952_652,
                &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c],
            ),
            (494_878_333, &[0x9d, 0x7f, 0x3e, 0x7d]),
            (15_293, &[0x7b, 0xbd]),
            (37, &[0x25]),
        ];
        for (value, bytes) in examples {
            assert_eq!(encoded(value), bytes);
            assert_eq!(VarInt::decode(bytes), Some((VarInt(value), bytes.len())));
        }
        assert_eq!(
            VarInt::decode(&[0x40, 0x25]),
            Some((VarInt(37), 2)),
            "longer than needed"
        );
    }

    #[test]
    fn the_shortest_form_is_chosen_at_each_border() {
        for (value, size) in [
            (0, 1),
            (0x3f, 1),
            (0x40, 2),
            (0x3fff, 2),
            (0x4000, 4),
            (0x3fff_ffff, 4),
            (0x4000_0000, 8),
            (VarInt::MAX.0, 8),
        ] {
            assert_eq!(encoded(value).len(), size, "{value:#x}");
        }
        assert_eq!(VarInt::try_from(1_u64 << 62), Err(VarIntTooLarge(1 << 62)));
    }

    proptest! {
        #[test]
        fn round_trip(value in 0..=VarInt::MAX.0, tail: Vec<u8>) {
            let mut bytes = encoded(value);
            let size = bytes.len();
            bytes.extend(tail);
            prop_assert_eq!(VarInt::decode(&bytes), Some((VarInt(value), size)));
            prop_assert_eq!(VarInt::decode(&bytes[..size - 1]), None);
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..10)) {
            if let Some((value, size)) = VarInt::decode(&bytes) {
                prop_assert!(size <= bytes.len());
                prop_assert!(value <= VarInt::MAX);
            }
        }
    }
}
