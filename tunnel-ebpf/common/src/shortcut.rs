//! Bytes that go past TCP on loopback.

use crate::FlowKey;

/// Connections of all attachments that the shortcut can serve at a time. Others stay TCP's.
pub const MAX_SHORTCUTS: u32 = 32_768;

/// The most that may wait at the shortcut's end of one connection, in bytes.
pub const SHORTCUT_BYTES: u64 = 256 << 10;

/// Kept in the connecting socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its connection.
    pub key: FlowKey,
    /// Bytes that it has written, whichever way they took.
    pub written: u64,
    /// Whether its last write took the shortcut.
    pub on_shortcut: u64,
}
