//! Checks of the host at start: each warning names a limit that is too small, and the remedy.

use std::sync::Once;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::descriptors;

use crate::report::report;

/// Recommended limit of open files. A connection takes one descriptor, and a burst of connections
/// should not end at the soft limit.
const RECOMMENDED_FILES: u64 = 65_536;

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

/// Returns the number of connections, at most `wanted`, for which `max` descriptors are enough.
/// Logs a warning if that is less than `wanted`.
pub fn fit_connections(wanted: usize, max: usize) -> usize {
    if max < wanted {
        let needed = (wanted as u64 * 5 / 4 + 1024).min(RECOMMENDED_FILES);
        tracing::warn!(
            limit = descriptors::limit(),
            "few open files are allowed for {wanted} connections: {max} are taken at once; set \
             LimitNOFILE={needed} in the service's unit, or lower limits.connections"
        );
    }
    wanted.min(max)
}

/// Logs warnings about the socket of a tunnel, once per process. They hold for every socket on this
/// host, and an agent opens one for each dial.
pub fn warn_once(warnings: &[String]) {
    static WARNED: Once = Once::new();
    if !warnings.is_empty() {
        WARNED.call_once(|| {
            for warning in warnings {
                tracing::warn!("{warning}");
            }
        });
    }
}
