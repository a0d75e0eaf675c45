//! The two sides of a tunnel in a laboratory with one server and one worker.

use anyhow::Result;

use crate::lab::Lab;
use crate::lab::daemon::Daemon;

/// Side of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The server on the control plane.
    Server,
    /// The agent on the worker.
    Agent,
}

impl Side {
    /// Returns the name of this side.
    pub fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
        }
    }

    /// Returns the process of this side.
    ///
    /// # Errors
    ///
    /// The worker has no agent.
    pub fn daemon(self, lab: &mut Lab) -> Result<&mut Daemon> {
        match self {
            Self::Server => Ok(&mut lab.control_plane.servers[0].daemon),
            Self::Agent => lab.workers[0].agent(),
        }
    }
}
