//! Waits until an agent that was asked is suspected and another one can be asked.

use std::future::pending;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tunnel_proto::preface::Host;

use super::plan::Alternatives;
use crate::routes::{LinkId, LinkInfo};
use crate::shard::Shard;
use cpc_identity::TrustDomain;

/// The time after which an agent is suspected if no packet of it has arrived since it was asked.
const UNHEARD: Duration = Duration::from_secs(1);

/// A request without an answer.
pub(super) struct Suspicion<'a> {
    /// The shard that asks.
    pub shard: &'a Shard,
    /// The link of the agent that was asked.
    pub link: &'a LinkInfo,
    /// The time of the request.
    pub asked_at: Instant,
    /// The time after which the agent is suspected in any case.
    pub patience: Option<Duration>,
    /// The tenant that asks.
    pub tenant: &'a TrustDomain,
    /// The host that is dialled.
    pub host: &'a Host,
    /// The links that the dial can still ask.
    pub alternatives: Option<Alternatives<LinkId>>,
}

impl Suspicion<'_> {
    /// Waits until the agent is suspected and the routes lead to an alternative. Patience starts with
    /// the first poll.
    pub(super) async fn wait(self) {
        let Some(alternatives) = &self.alternatives else {
            return pending().await;
        };
        self.agent_suspected().await;
        self.alternative(alternatives).await;
    }

    async fn agent_suspected(&self) {
        let path = || self.link.probe.path();
        let unheard = async {
            // An acknowledgement takes a round trip.
            sleep(UNHEARD.max(3 * path().rtt)).await;
            if path().since_packet < self.asked_at.elapsed() {
                pending().await
            }
        };
        let impatient = async {
            match self.patience {
                Some(patience) => sleep(patience).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.link.silenced.notified() => {}
            () = unheard => {}
            () = impatient => {}
        }
    }

    async fn alternative(&self, alternatives: &Alternatives<LinkId>) {
        let mut published = self.shard.control.published();
        loop {
            let routes = self.shard.control.routes();
            let found = routes.candidates(self.tenant, self.host);
            if { found.iter().flatten() }.any(|link| alternatives.contains(&link.id)) {
                return;
            }
            if published.changed().await.is_err() {
                // The control task has ended, and the process ends with it.
                pending().await
            }
        }
    }
}
