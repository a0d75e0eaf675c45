//! `cpc log`.

use super::status::Admin;

/// Change the log filter of a running server or agent
///
/// Levels are error, warn, info, debug and trace, also by module: info,cpc::server=debug. The
/// access log is the module cpc::access.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The filter
    filter: String,
    #[command(flatten)]
    admin: Admin,
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        self.admin.put("/log", &self.filter)
    }
}
