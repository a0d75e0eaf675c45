//! Messages between the two ends of a session, beside the data.

use tunnel_proto::close::CloseReason;

use super::id::SessionId;

/// Progress of the direction towards an end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Number of bytes that the kernel of the end has accepted.
    pub written: u64,
    /// Whether the end of file has been passed on behind all bytes.
    pub is_finished: bool,
    /// Whether the local socket takes no more bytes, while the other direction goes on.
    pub is_refused: bool,
}

/// Progress of an end with the session as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// At least one direction goes on.
    #[default]
    Open,
    /// The end needs nothing more of the other one: both directions have ended, and the other end has
    /// confirmed everything.
    Settled,
    /// The end gave the session up. It remembers the session until the other end knows.
    Aborted(CloseReason),
    /// The end learned that the other one gave up, and has reset its socket.
    Acknowledged,
}

/// The state of one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Confirmation {
    /// Progress of the direction towards this end.
    pub accepted: Accepted,
    /// Progress of the whole.
    pub status: Status,
}

/// The state of one end, told on a tunnel that is to carry the session from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumption {
    /// Name of the session.
    pub id: SessionId,
    /// State of the end; `None` where the end does not know the session.
    pub state: Option<Confirmation>,
}
