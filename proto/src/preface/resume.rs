//! The head of a stream that continues a session, and the answer.

use bytes::{Buf, BufMut, BytesMut};

use super::PrefaceError;
use super::request::{MAX_BODY, StreamKind};
use crate::resumption::{Confirmation, SessionKey};
use crate::varint::VarInt;

/// The head of a stream that the server opened: continue this session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeRequest {
    /// The session, and its number on this tunnel.
    pub key: SessionKey,
    /// State of the server's end.
    pub state: Confirmation,
}

/// The agent's answer to a [`ResumeRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeResponse {
    /// State of the agent's end. The bytes of either side follow from there on.
    Resumed(Confirmation),
    /// The agent has no such session.
    Unknown,
    /// Another tunnel still carries the session: ask again.
    Busy,
}

impl ResumeRequest {
    /// Appends the request.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        self.key.encode(&mut body);
        self.state.encode(&mut body);
        VarInt::from(StreamKind::Resume.code()).encode(out);
        // 35 bytes at most.
        VarInt::from(body.len() as u16).encode(out);
        out.put_slice(&body);
    }

    /// Reads the body of a request.
    pub(super) fn decode_body(mut body: &[u8]) -> Result<Self, PrefaceError> {
        let key = SessionKey::take(&mut body).ok_or(PrefaceError::Truncated)?;
        let state = Confirmation::decode(body).map_err(PrefaceError::Flags)?;
        let (state, _) = state.ok_or(PrefaceError::Truncated)?;
        Ok(Self { key, state })
    }
}

const RESUMED: u8 = 0;
const UNKNOWN: u8 = 1;
const BUSY: u8 = 2;

impl ResumeResponse {
    /// Appends the response.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        match self {
            Self::Resumed(state) => {
                body.put_u8(RESUMED);
                state.encode(&mut body);
            }
            Self::Unknown => body.put_u8(UNKNOWN),
            Self::Busy => body.put_u8(BUSY),
        }
        // 18 bytes at most.
        VarInt::from(body.len() as u16).encode(out);
        out.put_slice(&body);
    }

    /// Reads a response from the head of `buf`, and returns it with the number of its bytes. `None`: more
    /// bytes are needed. A code that this release does not know counts as [`Self::Unknown`].
    ///
    /// # Errors
    /// [`PrefaceError`], as soon as the bytes at hand can't become a valid response.
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, PrefaceError> {
        let Some((length, start)) = VarInt::decode(buf) else {
            return Ok(None);
        };
        let length = length.into_inner();
        if length > MAX_BODY {
            return Err(PrefaceError::RequestTooLong(length));
        }
        let end = start + length as usize;
        let Some(mut body) = buf.get(start..end) else {
            return Ok(None);
        };
        let response = match body.try_get_u8()? {
            RESUMED => {
                let state = Confirmation::decode(body).map_err(PrefaceError::Flags)?;
                let (state, _) = state.ok_or(PrefaceError::Truncated)?;
                Self::Resumed(state)
            }
            BUSY => Self::Busy,
            _ => Self::Unknown,
        };
        Ok(Some((response, end)))
    }
}
