//! Looks up the agents that a dial may ask.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tunnel_proto::preface::Host;

use crate::routes::{LinkInfo, RouteError};
use crate::shard::Shard;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;

/// The time after a server's start within which its agents reconnect.
const RECONNECT_GRACE: Duration = Duration::from_secs(3);

/// Polling interval while a dial waits for agents to reconnect.
const RECONNECT_POLL: Duration = Duration::from_millis(20);

/// Looks up the links that serve `host`. A server that has just started waits for its agents to
/// reconnect, until `deadline` at the latest: a connection that waited in the backlog of a listener
/// is not refused for their absence.
///
/// # Errors
/// [`RouteError`]: no link serves `host`.
pub(super) async fn look_up(
    shard: &Shard,
    tenant: &TrustDomain,
    host: &Host,
    deadline: Instant,
) -> Result<Vec<Arc<LinkInfo>>, RouteError> {
    loop {
        let found = shard.control.routes().candidates(tenant, host);
        let held = shard.control.held_until(tenant).map(Instant::from_std);
        let until = held.unwrap_or(shard.started + RECONNECT_GRACE);
        if found.is_ok()
            || Instant::now() >= until.min(deadline)
            || *shard.phase.borrow() != Phase::Running
            || shard.handover.is_collecting()
        {
            return found;
        }
        sleep(RECONNECT_POLL).await;
    }
}
