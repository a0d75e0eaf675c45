//! The head of any stream that a server opens.

use bytes::{BufMut, BytesMut};

use super::request::{MAX_BODY, StreamKind};
use super::{DialRequest, PrefaceError, ResumeRequest};
use crate::varint::VarInt;

/// The head of a stream that the server opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamHead {
    /// A dial.
    Dial(DialRequest),
    /// The stream carries the notices of all sessions of the tunnel.
    Notices,
    /// A session goes on.
    Resume(ResumeRequest),
}

impl StreamHead {
    /// Appends the head.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Dial(request) => request.encode(out),
            Self::Notices => {
                VarInt::from(StreamKind::Notices.code()).encode(out);
                out.put_u8(0);
            }
            Self::Resume(request) => request.encode(out),
        }
    }

    /// Reads a head from the start of `buf`, and returns it with the number of its bytes. `None`: more
    /// bytes are needed.
    ///
    /// # Errors
    /// [`PrefaceError`], as soon as the bytes at hand can't become a valid head.
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, PrefaceError> {
        let Some((kind, kind_size)) = VarInt::decode(buf) else {
            return Ok(None);
        };
        let kind = StreamKind::from_code(kind.into_inner())?;
        let Some((length, length_size)) = VarInt::decode(&buf[kind_size..]) else {
            return Ok(None);
        };
        let length = length.into_inner();
        if length > MAX_BODY {
            return Err(PrefaceError::RequestTooLong(length));
        }
        let start = kind_size + length_size;
        let end = start + length as usize;
        let Some(body) = buf.get(start..end) else {
            return Ok(None);
        };
        let head = match kind {
            StreamKind::Tcp => Self::Dial(DialRequest::decode_body(body)?),
            StreamKind::Notices => Self::Notices,
            StreamKind::Resume => Self::Resume(ResumeRequest::decode_body(body)?),
        };
        Ok(Some((head, end)))
    }
}
