//! What the programs must know of the attachment they run for.

use crate::Endpoint;

/// Longest name of an attachment, in bytes.
pub const NAME_LENGTH: usize = 32;

/// Bits of [`Attachment::flags`].
///
/// In this [`SCHEMA`](crate::SCHEMA) the bit of value 2 stays clear: it switches the shortcut of earlier
/// versions on, whose program may still be in the cgroup.
pub mod flags {
    /// While the connector is dead or stuck, connections take the ordinary route.
    pub const FAIL_OPEN: u32 = 1;
}

/// One attachment, under its number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Cookie of the network namespace whose sockets are redirected; all others are left alone.
    pub netns: u64,
    /// Whose routes decide.
    pub tenant: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Where IPv4 connections go. The port is [`crate::Heartbeat`]'s, which says where the connector
    /// listens now; port 0 here means that the attachment has no such listener.
    pub listener4: Endpoint,
    /// The same for IPv6.
    pub listener6: Endpoint,
    /// The name it was configured under, filled up with zeroes.
    pub name: [u8; NAME_LENGTH],
}
