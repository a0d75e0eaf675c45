//! The settings of an attachment, for the programs that run for it.

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

/// Settings of one attachment, under its number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Cookie of the network namespace whose sockets are redirected; the programs ignore all
    /// others.
    pub netns: u64,
    /// Tenant whose routes decide.
    pub tenant: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Destination of redirected IPv4 connections. The port is that of [`crate::Heartbeat`], which
    /// names the current listener; port 0 here means that the attachment has no such listener.
    pub listener4: Endpoint,
    /// The same for IPv6.
    pub listener6: Endpoint,
    /// The name it was configured under, filled up with zeroes.
    pub name: [u8; NAME_LENGTH],
}
