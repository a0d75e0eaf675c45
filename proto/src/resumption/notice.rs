//! Notices about the sessions of a tunnel, on the stream that they share.

use bytes::{BufMut, BytesMut};
use thiserror::Error;

use super::state::Confirmation;
use crate::varint::VarInt;

const UNKNOWN: u8 = 0;
const CONFIRM: u8 = 1;

/// A notice about one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// State of the sender's end.
    Confirm(VarInt, Confirmation),
    /// The sender has no session of that number: it has ended.
    Unknown(VarInt),
}

/// Bytes that are no notice of this release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoticeError {
    /// The kind is unknown.
    #[error("notice of kind {0} is unknown here")]
    Kind(u8),
    /// The flags of a confirmation are unknown.
    #[error("flags {0:#x} of a confirmation are unknown here")]
    Flags(u8),
}

impl Notice {
    /// Appends the notice, 28 bytes at most.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Confirm(number, confirmation) => {
                number.encode(out);
                out.put_u8(CONFIRM);
                confirmation.encode(out);
            }
            Self::Unknown(number) => {
                number.encode(out);
                out.put_u8(UNKNOWN);
            }
        }
    }

    /// Reads a notice from the head of `buf`, and returns it with the number of its bytes. `None`: more
    /// bytes are needed, fewer than 28 in all.
    ///
    /// # Errors
    /// [`NoticeError`]; nothing behind it can be read.
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, NoticeError> {
        let Some((number, start)) = VarInt::decode(buf) else {
            return Ok(None);
        };
        match buf.get(start) {
            None => Ok(None),
            Some(&UNKNOWN) => Ok(Some((Self::Unknown(number), start + 1))),
            Some(&CONFIRM) => {
                let decoded = Confirmation::decode(&buf[start + 1..]);
                let decoded = decoded.map_err(NoticeError::Flags)?;
                let notice = |(it, size)| (Self::Confirm(number, it), start + 1 + size);
                Ok(decoded.map(notice))
            }
            Some(&kind) => Err(NoticeError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::close::CloseReason;
    use crate::resumption::{Accepted, Status};

    fn confirmation() -> impl Strategy<Value = Confirmation> {
        let status = prop_oneof![
            Just(Status::Open),
            Just(Status::Settled),
            prop::sample::select(CloseReason::ALL).prop_map(Status::Aborted),
            Just(Status::Acknowledged),
        ];
        let accepted = (0..=VarInt::MAX.into_inner(), any::<bool>(), any::<bool>());
        (accepted, status, any::<bool>()).prop_map(
            |((written, is_finished, is_refused), status, is_safe)| Confirmation {
                accepted: Accepted {
                    written,
                    is_finished,
                    is_refused,
                },
                status,
                is_safe,
            },
        )
    }

    fn notice() -> impl Strategy<Value = Notice> {
        let number = (0..=VarInt::MAX.into_inner()).prop_map(|n| VarInt::try_from(n).unwrap());
        prop_oneof![
            (number.clone(), confirmation()).prop_map(|(n, it)| Notice::Confirm(n, it)),
            number.prop_map(Notice::Unknown),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(notice in notice(), tail: Vec<u8>) {
            let mut bytes = BytesMut::new();
            notice.encode(&mut bytes);
            let size = bytes.len();
            prop_assert!(size <= 28);
            for part in 0..size {
                prop_assert_eq!(Notice::decode(&bytes[..part]), Ok(None));
            }
            bytes.extend_from_slice(&tail);
            prop_assert_eq!(Notice::decode(&bytes), Ok(Some((notice, size))));
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(None) = Notice::decode(&bytes) {
                prop_assert!(bytes.len() < 28);
            }
        }
    }

    #[test]
    fn what_this_release_does_not_know_is_refused() {
        assert_eq!(Notice::decode(&[0, 2]), Err(NoticeError::Kind(2)));
        assert_eq!(Notice::decode(&[0, 1, 0, 32]), Err(NoticeError::Flags(32)));
    }
}
