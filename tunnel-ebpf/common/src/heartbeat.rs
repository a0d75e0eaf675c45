//! The connector's sign of life, under the number of its attachment.

/// Time of the connector's last beat, and the ports of its listeners.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 before the first beat and after the last.
    pub at: u64,
    /// Port of the IPv4 listener in host order; 0 without one.
    pub port4: u32,
    /// Port of the IPv6 listener in host order; 0 without one.
    pub port6: u32,
}

impl Heartbeat {
    /// No connector.
    pub const NONE: Self = Self {
        at: 0,
        port4: 0,
        port6: 0,
    };
}
