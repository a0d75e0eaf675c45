//! Registration of a link, for links of every protocol: the shard and the control task learn of its arrival,
//! its state and its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tunnel_proto::close::CloseReason;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{InstanceId, Refusal};

use super::Link;
use crate::registry::Verdict;
use crate::routes::LinkInfo;
use crate::shard::Shard;
use cpc_identity::Identity;
use cpc_observe::audit::events as audit;

/// Maximum number of refused claims in one log line.
const SHOWN_CLAIMS: usize = 16;

/// Registers a link of process `instance`, which may know of a `predecessor` that has ended. Dials may come
/// before this returns. Returns `None` if the process is ending.
pub(crate) async fn register(
    shard: &Shard,
    info: &Arc<LinkInfo>,
    link: Link,
    process: (InstanceId, Option<InstanceId>),
    offer: Vec<Claim>,
) -> Option<Verdict> {
    // Before the routes are in force: a dial may come at once.
    shard.links.borrow_mut().insert(info.id, link);
    let verdict = shard.control.connect(info.clone(), process, offer).await?;
    report_refused(shard, &info.identity, &verdict.refused);
    Some(verdict)
}

/// Removes a link.
pub(crate) async fn unregister(shard: &Shard, info: &LinkInfo) {
    shard.links.borrow_mut().remove(&info.id);
    shard.control.disconnect(info.id).await;
}

/// Notes whether the agent has fallen silent.
pub(crate) fn set_silent(info: &LinkInfo, silent: bool) {
    info.silent.store(silent, Ordering::Relaxed);
    if silent {
        tracing::warn!(agent = %info.identity, "agent is silent, no new dials go to it");
        info.silenced.notify_waiters();
    } else {
        tracing::info!(agent = %info.identity, "agent is heard again");
    }
}

/// Notes that the agent drains. Returns whether that is new: an agent may report it repeatedly.
pub(crate) fn set_draining(info: &LinkInfo, reason: Option<CloseReason>) -> bool {
    let is_new = !info.draining.swap(true, Ordering::Relaxed);
    if is_new {
        let reason = reason.map(CloseReason::label);
        tracing::info!(agent = %info.identity, reason, "agent is draining");
    }
    is_new
}

/// Counts refused claims and logs them in one line: an agent may offer a thousand.
pub(crate) fn report_refused(shard: &Shard, identity: &Identity, refused: &[Refusal]) {
    let Some(first) = refused.first() else {
        return;
    };
    shard.metrics.claims_refused.inc_by(refused.len() as u64);
    audit::claims_refused(identity, refused);
    let claims: Vec<_> = refused
        .iter()
        .take(SHOWN_CLAIMS)
        .map(|r| r.claim.as_str())
        .collect();
    tracing::warn!(
        agent = %identity, refused = refused.len(), claims = claims.join(" "), why = %first.why,
        "claims refused; `cpc status` shows all"
    );
}
