//! The effect of SIGHUP on the allow-list, the offer and the log filter.

use std::time::SystemTime;

use tokio::sync::watch;
use tunnel_proto::route::Claim;

use crate::offer;
use crate::policy::Policy;
use cpc_config::{AgentConfig, ConfigError};
use cpc_host::report::report;
use cpc_observe::audit::events as audit;
use cpc_observe::logging::LogHandle;
use cpc_observe::reload::ReloadMetrics;

/// The parts of an agent that a reload changes.
pub(super) struct Reload {
    pub policy: Policy,
    pub offers: watch::Sender<Vec<Claim>>,
    pub log: LogHandle,
    pub metrics: ReloadMetrics,
}

impl Reload {
    /// Puts a configuration in force, as far as it can change without a restart, and records the outcome.
    pub(super) fn run(&self, config: Result<AgentConfig, ConfigError>) {
        let is_in_force = match config {
            Ok(config) => {
                self.policy.configure(config.allow);
                self.offer(offer::claims(&config.serve)) & self.log.reload(&config.log.filter)
            }
            Err(error) => {
                tracing::warn!(
                    error = report(&error),
                    "configuration not reloaded, the old one stays"
                );
                audit::changed("configuration", Err(&error));
                false
            }
        };
        self.metrics.note(is_in_force, SystemTime::now());
    }

    /// Offers `claims`. Returns `false` if they are wrong: the old ones stay.
    fn offer(&self, claims: Result<Vec<Claim>, ConfigError>) -> bool {
        match claims {
            Ok(claims) => {
                self.offers.send_replace(claims);
                tracing::info!("allow-list and offer reloaded");
                audit::changed("allow-list and offer", Ok(()));
                true
            }
            Err(error) => {
                tracing::warn!(
                    error = report(&error),
                    "allow-list reloaded, offer not: the old one stays"
                );
                audit::changed("allow-list", Ok(()));
                audit::changed("offer", Err(&error));
                false
            }
        }
    }
}
