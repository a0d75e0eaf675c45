//! Sessions that another process has saved.

use tunnel_proto::varint::VarInt;

/// A saved session that contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved session has an invalid {0}")]
pub struct InvalidState(pub(super) &'static str);

/// Whether a direction can have come so far. A higher offset could not be told to the other end.
pub(super) fn is_offset(saved: u64) -> bool {
    VarInt::try_from(saved).is_ok()
}
