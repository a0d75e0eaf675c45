//! The captured ports of a prefix.

/// Port ranges that one prefix can hold.
pub const MAX_RANGES: usize = 16;

/// A range of ports, both ends included; empty when `first > last`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl PortRange {
    /// No port, as an exclusion leaves.
    pub const EMPTY: Self = Self { first: 1, last: 0 };
}

/// A set of ports: the ranges in use first, empty ones behind them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSet {
    /// The ranges.
    pub ranges: [PortRange; MAX_RANGES],
}

impl PortSet {
    /// No port, as an exclusion leaves.
    pub const EMPTY: Self = Self {
        ranges: [PortRange::EMPTY; MAX_RANGES],
    };

    /// Whether `port` is in the set.
    #[inline(always)]
    pub fn contains(&self, port: u32) -> bool {
        for range in &self.ranges {
            if range.first > range.last {
                return false;
            }
            if port >= range.first as u32 && port <= range.last as u32 {
                return true;
            }
        }
        false
    }
}
