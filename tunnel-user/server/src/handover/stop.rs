//! The end of service for a successor, and the way back where that fails.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tunnel_proto::handover::State;

use super::collected::{Collected, Restored};
use super::stage::Stage;
use crate::shard::{Common, Shard};
use cpc_handover::Parcel;
use cpc_host::report::report;

/// Maximum time for dials under way to end, and for young connections to be held.
const PAUSE: Duration = Duration::from_secs(2);

/// Maximum time for clients to send their request.
const REQUEST: Duration = Duration::from_millis(100);

/// Maximum time for connections to leave their tunnels.
const COLLECT: Duration = Duration::from_secs(1);

/// Interval of looks at the progress of both.
const LOOK: Duration = Duration::from_millis(2);

/// Stops serving, and returns everything that was served. Connections that can't be given away end.
///
/// # Errors
/// There is no memory for the state.
pub(crate) async fn stop(
    common: &Common,
    collection: &mut mpsc::UnboundedReceiver<Collected>,
) -> io::Result<Parcel> {
    let began = Instant::now();
    common.handover.set(Stage::Pausing);
    // Until the agents have come to the successor, the kernel refuses nothing.
    common.control.hold_routes();
    if timeout(PAUSE, paused(common)).await.is_err() {
        tracing::warn!("some connections can't be handed over yet, and end");
    }
    let paused = began.elapsed();
    common.handover.set(Stage::Collecting);
    common.control.hold_routes();
    common.peers.on_all(|shard| shard.leave_tunnels()).await;
    let mut collected = Vec::new();
    let complete = async {
        while common.connections.in_use() > clients(&collected) {
            tokio::select! {
                Some(one) = collection.recv() => collected.push(one),
                () = sleep(LOOK) => {}
            }
        }
        // Sessions without a client follow the end of their tunnel.
        while common
            .peers
            .on_all(|shard| shard.links.borrow().len())
            .await
            != 0
        {
            sleep(LOOK).await;
        }
    };
    let _ = timeout(COLLECT, complete).await;
    while let Ok(one) = collection.try_recv() {
        collected.push(one);
    }
    tracing::info!(
        connections = clients(&collected),
        sessions = collected.len(),
        paused_ms = paused.as_millis(),
        stopped_ms = (began.elapsed() - paused).as_millis(),
        "everything is stopped for the successor"
    );
    let mut state = Parcel::of(&State {
        instance: Bytes::copy_from_slice(&common.instance.0),
        connections: Vec::new(),
        incarnation: common.incarnation,
    })?;
    for one in collected {
        one.save(&mut state)?;
    }
    Ok(state)
}

fn clients(collected: &[Collected]) -> usize {
    collected.iter().filter(|one| one.client.is_some()).count()
}

/// Waits until no dial is under way and every connection survives the loss of its tunnel.
async fn paused(common: &Common) {
    let began = Instant::now();
    loop {
        let unsafe_ones = common.peers.on_all(|shard| shard.hold_all()).await;
        let waits = common.waiting.in_use() > 0 && began.elapsed() < REQUEST;
        if common.dials.in_use() == 0 && !waits && unsafe_ones == 0 {
            return;
        }
        sleep(LOOK).await;
    }
}

/// Goes on with `restored` connections: those of a predecessor, or this process's own.
pub(crate) fn go_on(common: &Common, restored: Vec<Restored>) {
    for (at, one) in restored.into_iter().enumerate() {
        common.peers.run_on(at, move |shard| one.go_on(shard));
    }
}

/// Serves again after a [`stop`]. Agents come back by themselves.
pub(crate) async fn serve_again(common: &Common) {
    let open = |shard: &Rc<Shard>| match shard.open_tunnels() {
        Ok(()) => 0,
        Err(error) => {
            let error = report(&error);
            tracing::error!(error, "a shard can't accept tunnels again");
            1
        }
    };
    common.peers.on_all(open).await;
    common.handover.set(Stage::Serving);
}
