//! Waits until an agent that was asked is in doubt and another one can be asked.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tunnel_proto::preface::Host;

use crate::routes::{LinkId, LinkInfo, MAX_CANDIDATES};
use crate::shard::Shard;
use cpc_identity::TrustDomain;

/// An agent that has not answered by then, and of which no packet has come since, may be gone.
const UNHEARD: Duration = Duration::from_secs(1);

/// Waits until an agent that has been asked may be gone: it falls silent, or nothing is heard of it. With
/// `patience` another one could be asked, and the dial waits no longer than that.
pub(super) async fn doubtful(info: &LinkInfo, asked: Instant, patience: Option<Duration>) {
    let unheard = async {
        let path = (info.probe.0)();
        // An acknowledgement takes a round trip.
        sleep(UNHEARD.max(3 * path.rtt)).await;
        if (info.probe.0)().since_packet < asked.elapsed() {
            std::future::pending().await
        }
    };
    let impatient = async {
        match patience {
            Some(patience) => sleep(patience).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = info.silenced.notified() => {}
        () = unheard => {}
        () = impatient => {}
    }
}

/// Whom else a dial may ask.
pub(super) struct Others<'a> {
    pub(super) tenant: &'a TrustDomain,
    pub(super) host: &'a Host,
    pub(super) asked: &'a [LinkId],
}

impl Others<'_> {
    /// Waits until there is one besides `link`.
    pub(super) async fn but(&self, shard: &Shard, link: LinkId) {
        if self.asked.len() + 1 >= MAX_CANDIDATES {
            return std::future::pending().await;
        }
        let mut published = shard.control.published();
        loop {
            let found = shard.control.routes().candidates(self.tenant, self.host);
            let mut found = found.iter().flatten();
            if found.any(|other| other.id != link && !self.asked.contains(&other.id)) {
                return;
            }
            if published.changed().await.is_err() {
                // The control task has ended, and so will everything else.
                std::future::pending().await
            }
        }
    }
}
