//! The dial response of an agent.

use bytes::{BufMut, BytesMut};

use super::PrefaceError;
use crate::close::CloseReason;
use crate::varint::VarInt;

/// The longest detail of a response, in bytes.
pub const MAX_DETAIL: usize = 256;

/// The agent's answer to a [`DialRequest`](super::DialRequest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DialResponse {
    /// The target is connected; its bytes follow.
    Connected,
    /// There is no connection.
    Refused {
        /// Reason; its class decides whether another agent may be tried. `Finished`, whose code on
        /// the wire means connected, is sent as `Internal`.
        reason: CloseReason,
        /// Text for people, such as the operating system's error. [`MAX_DETAIL`] bytes at most; the
        /// rest is not sent. The text may hold any character: escape it before printing.
        detail: String,
    },
}

impl DialResponse {
    /// Appends the response.
    pub fn encode(&self, out: &mut BytesMut) {
        let (code, detail) = match self {
            Self::Connected => (VarInt::from(0_u8), ""),
            Self::Refused {
                reason: CloseReason::Finished,
                detail,
            } => (CloseReason::Internal.into(), cut(detail)),
            Self::Refused { reason, detail } => ((*reason).into(), cut(detail)),
        };
        code.encode(out);
        // MAX_DETAIL fits in 16 bits.
        VarInt::from(detail.len() as u16).encode(out);
        out.put_slice(detail.as_bytes());
    }

    /// Reads a response from the head of `buf`, and returns it with the number of its bytes.
    /// `None`: more bytes are needed.
    ///
    /// A code that this release does not know counts as [`CloseReason::DialFailed`], whatever its
    /// range: that is never tried again. A detail that is not UTF-8 is read as far as it is.
    ///
    /// # Errors
    /// [`PrefaceError::DetailTooLong`], before the detail has arrived.
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, PrefaceError> {
        let Some((code, code_size)) = VarInt::decode(buf) else {
            return Ok(None);
        };
        let Some((length, length_size)) = VarInt::decode(&buf[code_size..]) else {
            return Ok(None);
        };
        let length = length.into_inner();
        if length > MAX_DETAIL as u64 {
            return Err(PrefaceError::DetailTooLong(length));
        }
        let start = code_size + length_size;
        let end = start + length as usize;
        let Some(detail) = buf.get(start..end) else {
            return Ok(None);
        };

        let response = match code.into_inner() {
            0 => Self::Connected,
            code => Self::Refused {
                reason: CloseReason::from_code(code).unwrap_or(CloseReason::DialFailed),
                detail: cut(&String::from_utf8_lossy(detail)).to_owned(),
            },
        };
        Ok(Some((response, end)))
    }
}

/// Returns the head of `detail` that fits.
fn cut(detail: &str) -> &str {
    &detail[..detail.floor_char_boundary(MAX_DETAIL)]
}
