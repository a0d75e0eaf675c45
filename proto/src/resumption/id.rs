//! The secret that names a session.

use std::fmt;

use bytes::{Buf, BufMut, BytesMut, TryGetError};

use crate::varint::VarInt;

/// The name of a session, 128 random bits. It is a capability: a peer that knows it may resume the
/// session, so no log line and no error shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// Wraps random bytes.
    #[must_use]
    pub fn new(random: [u8; 16]) -> Self {
        Self(random)
    }

    /// Returns the random bytes, for a successor of the process.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Appends the id.
    pub(crate) fn encode(self, out: &mut BytesMut) {
        out.put_slice(&self.0);
    }

    /// Takes an id from the head of `buf`.
    pub(crate) fn take(buf: &mut &[u8]) -> Result<Self, TryGetError> {
        Ok(Self(buf.try_get_u128()?.to_be_bytes()))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(..)")
    }
}

/// A session as one tunnel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionKey {
    /// The session's name.
    pub id: SessionId,
    /// Number of the session on this tunnel, assigned by the server. No two sessions of a tunnel share one.
    pub number: VarInt,
}

impl SessionKey {
    /// Appends the key.
    pub(crate) fn encode(self, out: &mut BytesMut) {
        self.id.encode(out);
        self.number.encode(out);
    }

    /// Takes a key from the head of `buf`; `None` if it ends early.
    pub(crate) fn take(buf: &mut &[u8]) -> Option<Self> {
        let id = SessionId::take(buf).ok()?;
        let (number, size) = VarInt::decode(buf)?;
        buf.advance(size);
        Some(Self { id, number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_does_not_show_itself() {
        let id = SessionId::new([0xab; 16]);
        assert_eq!(format!("{id:?}"), "SessionId(..)");
    }
}
