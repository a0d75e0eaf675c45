//! Where a redirected socket had wanted to go: first by its socket, then by its 4-tuple.

use crate::Endpoint;

/// Kept in the connecting socket for as long as that lives.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// What connect(2) was called with.
    pub destination: Endpoint,
    /// The attachment that redirected it.
    pub attachment: u32,
    /// Number of the [`crate::Counter`] it was refused under, or 0: the accepting side resets it.
    pub refused: u32,
}

/// A redirected connection as the accepting side sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// Cookie of the network namespace of both ends.
    pub netns: u64,
    /// The connecting side.
    pub client: Endpoint,
    /// The accepting side.
    pub listener: Endpoint,
}

/// What the accepting side finds under a [`FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// When the handshake was done (`CLOCK_MONOTONIC`, nanoseconds).
    pub established: u64,
    /// What connect(2) was called with.
    pub destination: Endpoint,
    /// As in [`Origin::refused`].
    pub refused: u32,
}
