//! Checks of the host at start: each complaint names a limit that is too small, and the remedy.

use std::sync::Once;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::descriptors;

use crate::report::report;

/// Wanted limit of open files. A connection takes one descriptor, and a burst of them should not end at
/// the soft limit.
const WANTED_FILES: u64 = 65_536;

/// Raises the soft limit of open files to the hard one, and opens the spare descriptor.
pub fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(error = report(&error), "limit of open files not raised");
    }
    descriptors::set_spare_aside();
}

/// Returns how many of `wanted` connections fit into the `most` that there are descriptors for, and
/// logs a warning if those are too few.
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

/// Logs complaints about the socket of a tunnel, once per process. They hold for every socket on this
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
