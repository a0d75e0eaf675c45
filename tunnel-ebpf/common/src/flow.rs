//! The requested destination of a redirected socket: first by its socket, then by its 4-tuple.

use crate::Endpoint;

/// Origin of a socket, in the storage of the connecting socket for as long as that exists.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Destination of the connect(2).
    pub destination: Endpoint,
    /// The attachment that redirected it.
    pub attachment: u32,
    /// Number of the [`crate::Counter`] it was refused under, or 0: the accepting side resets it.
    pub refused: u32,
}

/// Redirected connection as the accepting side sees it.
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

/// Value that the accepting side finds under a [`FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Time of the end of the handshake (`CLOCK_MONOTONIC`, nanoseconds).
    pub established: u64,
    /// Destination of the connect(2).
    pub destination: Endpoint,
    /// Reason of a refusal, as in [`Origin::refused`].
    pub refused: u32,
}
