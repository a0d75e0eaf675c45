//! One connection of a client, as the keeper sees it.

use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use socket2::Socket;

use crate::error::KeeperError;
use crate::owner::Owner;
use crate::sets::SetId;

/// Maximum number of connections.
pub(crate) const MAX_CONNECTIONS: usize = 16;

/// Time for a connection without a set to say something.
pub(crate) const IDLE: Duration = Duration::from_secs(10);

/// Time for which a `Take` waits for an owner to be dead.
pub(crate) const DYING: Duration = Duration::from_secs(2);

/// Time without progress for a process that is being given a set.
pub(crate) const STALL: Duration = Duration::from_secs(5);

/// Number of a connection; a later one has a higher one.
pub(crate) type ConnectionId = u64;

/// A client.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: Socket,
    pub(crate) phase: Phase,
    /// The process, until it owns a set.
    pub(crate) owner: Option<Result<Owner, KeeperError>>,
    /// Sets that the client was given, and has not confirmed.
    pub(crate) given: Vec<SetId>,
}

/// State of a connection.
#[derive(Debug)]
pub(crate) enum Phase {
    /// The client is yet to ask for something.
    Asking {
        /// End of the keeper's patience.
        until: Instant,
    },
    /// The client owns a set.
    Owning(SetId),
    /// The client has discarded its set.
    Discarded,
    /// The client waits for an answer to `Take`.
    Waiting {
        /// Role of the set.
        role: String,
        /// Time of the answer `Nothing`.
        until: Instant,
    },
    /// The client is being given a set.
    Giving {
        /// The set.
        set: SetId,
        /// Number of the next socket; absent before `Left`.
        next: Option<u32>,
        /// End of the keeper's patience.
        until: Instant,
    },
}

impl Phase {
    /// Returns a phase in which the client asks.
    pub(crate) fn asking(now: Instant) -> Self {
        Self::Asking { until: now + IDLE }
    }

    /// Returns the time at which the keeper acts of itself.
    pub(crate) fn until(&self) -> Option<Instant> {
        match self {
            Self::Owning(_) | Self::Discarded => None,
            Self::Asking { until } | Self::Waiting { until, .. } | Self::Giving { until, .. } => {
                Some(*until)
            }
        }
    }

    /// Returns whether the keeper reads requests.
    pub(crate) fn reads(&self) -> bool {
        !matches!(self, Self::Waiting { .. } | Self::Giving { .. })
    }

    /// Returns the events for which the keeper waits. The end of the peer is always one.
    pub(crate) fn events(&self) -> PollFlags {
        match self {
            Self::Waiting { .. } => PollFlags::empty(),
            Self::Giving { .. } => PollFlags::POLLOUT,
            _ => PollFlags::POLLIN,
        }
    }
}
