//! What of the host is too small for the job: said once at start, with the remedy.

use std::sync::Once;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A connection takes one file descriptor, and a burst of them should not end at the soft limit.
const WANTED_FILES: u64 = 65_536;

/// Raises the soft limit of open files to the hard one, and complains when that is low for
/// `connections` at once.
pub fn raise_file_limit(connections: usize) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(%error, "limit of open files not raised");
    }
    let needed = (connections as u64 + 1024).min(WANTED_FILES);
    if hard < needed {
        tracing::warn!(
            limit = hard,
            "few open files are allowed for {connections} connections; set LimitNOFILE={needed} \
             in the service's unit, or lower limits.connections"
        );
    }
}

/// Writes complaints about a tunnel's socket. Once a process: they hold for every socket on this
/// host, and an agent opens one for each dial.
pub fn complain(complaints: &[String]) {
    static SAID: Once = Once::new();
    if !complaints.is_empty() {
        SAID.call_once(|| {
            for complaint in complaints {
                tracing::warn!("{complaint}");
            }
        });
    }
}
