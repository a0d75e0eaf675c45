//! Faults of a handover.

use std::io;

/// Reason why a handover failed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The other process can't be reached, has ended, or did not answer in time.
    #[error("the other process: {0}")]
    Io(io::Error),
    /// The other process sent something else.
    #[error("the other process sent a malformed message: {0}")]
    Malformed(&'static str),
    /// The message can't be read.
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
    /// The running process refuses.
    #[error("the running process hands nothing over: {0}")]
    Refused(String),
    /// The configuration has no directory in which the processes could find each other.
    #[error("--replace needs state_dir: a running process has its socket there")]
    NoStateDir,
    /// There is no service manager that keeps descriptors.
    #[error(
        "no service manager keeps descriptors for this process (FileDescriptorStoreMax= in its unit)"
    )]
    NoStore,
    /// The successor can't start.
    #[error("the successor can't start: {0}")]
    Unprepared(String),
    /// The running process has begun to stop.
    #[error("this process is stopping")]
    Stopping,
    /// The keeper does not give what it holds.
    #[error(transparent)]
    Keeper(#[from] cpc_keeper::KeeperError),
    /// Another user's process.
    #[error("a process of user {0} asks: only the same user and root may")]
    Stranger(u32),
}

impl From<io::Error> for HandoverError {
    fn from(why: io::Error) -> Self {
        Self::Io(why)
    }
}
