//! Looks up the agents that a dial may ask.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tunnel_proto::preface::Host;

use crate::routes::{LinkInfo, RouteError};
use crate::shard::Shard;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;

/// Agents are back so soon after a server's start.
const HOMECOMING: Duration = Duration::from_secs(3);

/// How often is looked whether they are.
const HOMECOMING_POLL: Duration = Duration::from_millis(20);

/// Who serves `host`. A server that has just started waits for its agents to come back: what waited
/// for it in the backlog of a listener is not to be refused for their absence.
pub(super) async fn candidates(
    shard: &Shard,
    tenant: &TrustDomain,
    host: &Host,
    deadline: Instant,
) -> Result<Vec<Arc<LinkInfo>>, RouteError> {
    let until = deadline.min(shard.started + HOMECOMING);
    loop {
        let found = shard.control.routes().candidates(tenant, host);
        if found.is_ok() || Instant::now() >= until || *shard.phase.borrow() != Phase::Running {
            return found;
        }
        sleep(HOMECOMING_POLL).await;
    }
}
