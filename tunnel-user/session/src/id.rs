//! The secret that names a session.

use std::fmt;

/// The name of a session, 128 random bits. It is a capability: a peer that knows it may resume the
/// session, so no log line and no error shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// Wraps random bytes.
    pub fn new(random: [u8; 16]) -> Self {
        Self(random)
    }

    /// Returns the bytes for the wire.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(..)")
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
