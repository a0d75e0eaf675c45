//! Faults of a keeper and of its clients.

use std::io;
use std::path::PathBuf;

/// Reason why a keeper can't serve, or why a client gets nothing from one.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The keeper can't have its socket at this path.
    #[error("the keeper has no socket at {path}: create its directory, writable for this user")]
    Bind {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        why: io::Error,
    },
    /// Another keeper has this socket.
    #[error("another keeper serves {0}: stop that one, or choose another path")]
    Busy(PathBuf),
    /// The file at the path is no socket.
    #[error("{0} is no socket: remove the file, or choose another path")]
    NotASocket(PathBuf),
    /// No keeper listens at this path.
    #[error("no keeper answers at {path}: start one, and then this process again")]
    Unreachable {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        why: io::Error,
    },
    /// The process at the other end runs as another user.
    #[error("the other process runs as user {0}: run keeper, servers and agents as one user")]
    Stranger(u32),
    /// The death of the process at the other end would not be noticed.
    #[error("the keeper can't see this process end: {0} (one PID namespace, Linux 5.3 or later)")]
    Unseen(io::Error),
    /// The keeper refuses.
    #[error("the keeper refuses: {0}")]
    Refused(String),
    /// The keeper ended, closed the connection, or did not answer in time.
    #[error("the keeper does not answer: {0}")]
    Io(io::Error),
    /// The keeper sent something else.
    #[error("the keeper sent a malformed message: {0}")]
    Malformed(&'static str),
    /// The message can't be read.
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
    /// There is no memory for the table.
    #[error("no memory for the table of kept sockets")]
    Table(#[source] io::Error),
    /// There is no thread for the connection to the keeper.
    #[error("no thread for the connection to the keeper")]
    Thread(#[source] io::Error),
    /// The keeper can't wait for its sockets any more.
    #[error("the keeper can't wait for its sockets")]
    Wait(#[source] io::Error),
}

impl From<io::Error> for KeeperError {
    fn from(why: io::Error) -> Self {
        Self::Io(why)
    }
}
