//! Tunnels over QUIC: admission before the handshake, and the spread of newcomers over the shards.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::accept;
use crate::limits::Limit;
use crate::loads::ReservedLoad;
use crate::shard::Shard;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle::Phase;
use cpc_host::source_limiter::{HandshakePermit, Overload, Verdict};
use cpc_transport::quic::{Endpoint, Incoming};
use cpc_transport::tunnel::Connection;

/// Time for which a newcomer that was sent to another shard counts there: it comes within a round trip.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Maximum number of newcomers that count on other shards at once: first packets from forged addresses
/// are among them.
const MAX_ON_THEIR_WAY: usize = 1024;

/// Accepts tunnels without end.
pub(crate) async fn accept(shard: Rc<Shard>, endpoint: Endpoint) {
    let moving = ConcurrencyLimit::new(MAX_ON_THEIR_WAY);
    while let Some(incoming) = endpoint.accept().await {
        if *shard.phase.borrow() == Phase::Ended {
            // Agents look elsewhere, and here again for our successor.
            incoming.refuse();
            continue;
        }
        let remote = incoming.remote_address();
        match shard.handshakes.judge(remote.ip(), !incoming.may_retry()) {
            Verdict::Enter(place) => match elsewhere(&shard, &incoming, &moving) {
                Some(moved) => send_on(&shard, incoming, moved, Some(place)),
                None => {
                    place.charge(Instant::now());
                    // It has been asked to prove its address: as a rule because it was sent here.
                    if !incoming.may_retry() {
                        shard.loads.arrived(shard.index);
                    }
                    let counted = shard.loads.enter(shard.index);
                    let accepting = async { Ok(Connection::from(incoming.accept().await?)) };
                    let permits = (place, counted);
                    let served = accept::serve(shard.clone(), remote, accepting, permits);
                    tokio::task::spawn_local(served);
                }
            },
            // By a Retry (RFC 9000 section 8.1.2).
            Verdict::Prove => {
                shard.metrics.handshakes_retried.inc();
                match elsewhere(&shard, &incoming, &moving) {
                    Some(moved) => send_on(&shard, incoming, moved, None),
                    None => incoming.retry(number(shard.index)),
                }
            }
            Verdict::Refuse(why) => {
                if why == Overload::Full {
                    shard.metrics.limits.refuse(Limit::Handshakes.label());
                }
                shard.handshakes.failed(why.into());
                tracing::warn!(%remote, %why, "handshake refused");
                incoming.refuse();
            }
        }
    }
}

/// Counts a newcomer on another shard, where that has fewer tunnels than this one.
fn elsewhere(
    shard: &Shard,
    incoming: &Incoming,
    moving: &ConcurrencyLimit,
) -> Option<ReservedLoad> {
    let movable = incoming.may_retry() && !incoming.is_placed();
    let from = movable.then_some(shard.index)?;
    shard.loads.move_from(from, moving)
}

/// Sends a newcomer to another shard by a Retry. The next one counts it until it has come.
fn send_on(shard: &Shard, incoming: Incoming, moved: ReservedLoad, place: Option<HandshakePermit>) {
    shard.metrics.handshakes_moved.inc();
    incoming.retry(number(moved.shard()));
    tokio::task::spawn_local(async move {
        sleep(ON_ITS_WAY).await;
        drop((moved, place));
    });
}

/// Returns the number of a shard in connection ids.
fn number(shard: usize) -> u8 {
    // Below the bound on shards.
    shard as u8
}
