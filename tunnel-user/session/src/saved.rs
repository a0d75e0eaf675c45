//! Sessions that another process has saved.

/// A saved session that contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved session has an invalid {0}")]
pub struct InvalidState(pub(super) &'static str);
