//! The verdict of a route about a captured destination.

/// Whether connections to a prefix are served. No entry at all: there is no route.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A live agent serves it.
    Serve = 1,
    /// An agent serves the destination, but none is connected and alive.
    NoAgent = 2,
    /// Policy denies it.
    Denied = 3,
}

impl Verdict {
    /// The one with this number.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Serve),
            2 => Some(Self::NoAgent),
            3 => Some(Self::Denied),
            _ => None,
        }
    }
}
