//! The data part of the longest-prefix-match keys.

use crate::Address;

/// Address family of a prefix. It is part of the key, ahead of the address, so that `::/0` covers
/// IPv6 alone although IPv4 addresses are stored in v4-mapped form.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4, v4-mapped IPv6 included.
    V4 = 4,
    /// IPv6 without the v4-mapped addresses.
    V6 = 6,
}

/// Length in bits of a key that names one address: scope, family, address.
pub const PREFIX_BITS: u32 = 32 + 32 + 128;

/// A prefix within a scope: an attachment's number for captures, a tenant's for routes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// Attachment or tenant.
    pub scope: u32,
    /// Number of the [`Family`].
    pub family: u32,
    /// The network's address; bits behind the prefix length are zero.
    pub address: Address,
}

impl Prefix {
    /// The key that looks an address up.
    #[inline(always)]
    pub const fn of(scope: u32, address: Address) -> Self {
        let family = if address.is_mapped() {
            Family::V4
        } else {
            Family::V6
        };
        Self {
            scope,
            family: family as u32,
            address,
        }
    }
}
