//! What of the host is too small for the job: said once at start, with the remedy.

use std::sync::Once;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::descriptors;

use crate::report::report;

/// A connection takes one file descriptor, and a burst of them should not end at the soft limit.
const WANTED_FILES: u64 = 65_536;

/// Raises the soft limit of open files to the hard one, and sets a spare descriptor aside.
pub fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(error = report(&error), "limit of open files not raised");
    }
    descriptors::set_spare_aside();
}

/// How many of `wanted` connections there may be at once, of `most` that there are descriptors for;
/// complains when those are too few.
pub fn fit_connections(wanted: usize, most: usize) -> usize {
    if most < wanted {
        let needed = (wanted as u64 * 5 / 4 + 1024).min(WANTED_FILES);
        tracing::warn!(
            limit = descriptors::limit(),
            "few open files are allowed for {wanted} connections: {most} are taken at once; set \
             LimitNOFILE={needed} in the service's unit, or lower limits.connections"
        );
    }
    wanted.min(most)
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
