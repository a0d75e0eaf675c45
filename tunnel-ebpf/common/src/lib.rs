//! Keys and values of the maps that the kernel programs share with user space.
//!
//! Everything here is `#[repr(C)]` without implicit padding: the kernel compares keys byte by
//! byte, and user space reads what another version's program may have written. A change of any
//! layout is a new [`SCHEMA`]; maps of different schemas live in different directories.
//!
//! Addresses are 16 bytes in network order, IPv4 in its v4-mapped form (RFC 4291 section
//! 2.5.5.2); ports are in host order, widened to 32 bits so that no padding appears.
#![no_std]

mod address;
mod attachment;
mod capture;
mod counter;
mod flow;
mod heartbeat;
mod prefix;
mod route;
#[cfg(feature = "user")]
mod user;

pub use address::{Address, Endpoint};
pub use attachment::{Attachment, NAME_LENGTH, flags};
pub use capture::{MAX_RANGES, PortRange, PortSet};
pub use counter::{Counter, counter_index};
pub use flow::{Flow, FlowKey, Origin};
pub use heartbeat::Heartbeat;
pub use prefix::{Family, PREFIX_BITS, Prefix};
pub use route::Verdict;

/// Version of the layouts in this crate; part of the directory in which the maps are pinned.
pub const SCHEMA: u32 = 2;

/// Attachments at a time, over all processes that share a pin directory.
pub const MAX_ATTACHMENTS: u32 = 64;

/// Prefixes of all capture sets together.
pub const MAX_CAPTURES: u32 = 16_384;

/// Routes of all tenants together.
pub const MAX_ROUTES: u32 = 65_536;

/// Redirected connections that wait to be accepted, over all attachments; the oldest go first.
pub const MAX_FLOWS: u32 = 32_768;

/// Age in nanoseconds (`CLOCK_MONOTONIC`) at which a heartbeat means a stuck connector.
pub const HEARTBEAT_STALE_NS: u64 = 3_000_000_000;
