//! The events that the programs count, for each attachment.

use crate::MAX_ATTACHMENTS;

/// Outcome of a connection attempt. The set is closed: its members are metric labels.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Sent to the listener.
    Redirected = 0,
    /// The handshake of a redirected connection with the listener is complete.
    Established = 1,
    /// Not in the capture set: takes the ordinary route.
    NotCaptured = 2,
    /// Captured, but the connector was dead or stuck and the attachment fails open.
    FailOpen = 3,
    /// Refused: no listener of the connector's is there.
    Dead = 4,
    /// Refused: the connector's heartbeat is stale.
    Stuck = 5,
    /// Refused: no route for the destination.
    NoRoute = 6,
    /// Refused: a route, but no live agent behind it.
    NoAgent = 7,
    /// Refused: denied by policy.
    Denied = 8,
    /// Refused: the kernel had no memory to remember the destination.
    NoMemory = 9,
}

impl Counter {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Redirected,
        Self::Established,
        Self::NotCaptured,
        Self::FailOpen,
        Self::Dead,
        Self::Stuck,
        Self::NoRoute,
        Self::NoAgent,
        Self::Denied,
        Self::NoMemory,
    ];

    /// Slots that an attachment's counters take: room for more without a new schema.
    pub const SLOTS: u32 = 16;

    /// Slots of all attachments.
    pub const ENTRIES: u32 = MAX_ATTACHMENTS * Self::SLOTS;

    /// The label it has in metrics and in the status.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::Established => "established",
            Self::NotCaptured => "not_captured",
            Self::FailOpen => "fail_open",
            Self::Dead => "refused_dead",
            Self::Stuck => "refused_stuck",
            Self::NoRoute => "refused_no_route",
            Self::NoAgent => "refused_no_agent",
            Self::Denied => "refused_denied",
            Self::NoMemory => "refused_no_memory",
        }
    }

    /// Returns the counter with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }
}

/// Returns the index of a counter of an attachment.
#[inline(always)]
pub const fn counter_index(attachment: u32, counter: Counter) -> u32 {
    attachment * Counter::SLOTS + counter as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (position, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, position);
            assert_eq!(Counter::from_number(position as u32), Some(counter));
            assert!((counter as u32) < Counter::SLOTS);
        }
        assert_eq!(Counter::from_number(Counter::ALL.len() as u32), None);
    }
}
