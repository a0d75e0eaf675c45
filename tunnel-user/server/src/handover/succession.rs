//! The two ends of a handover: this process takes over, and is succeeded.

use std::io;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tunnel_proto::session::InstanceId;

use super::collected::{Collected, Restored, restore};
use super::kept;
use super::stop::{go_on, serve_again, stop};
use crate::error::ServerError;
use crate::shard::Common;
use cpc_handover::{HandoverError, Parcel, Predecessor, Service};
use cpc_host::lifecycle::Phase;

/// Role of this process in a handover.
pub(crate) const ROLE: &str = "server";

/// Takes over what `predecessor` has served, in its name.
///
/// # Errors
/// [`ServerError::Handover`]: the predecessor goes on.
pub(crate) fn take_over(
    predecessor: Predecessor,
    common: &mut Common,
) -> Result<Vec<Restored>, ServerError> {
    let began = Instant::now();
    let (instance, restored) = predecessor.take(|state, sockets| {
        let instance = <[u8; 16]>::try_from(&state.instance[..]);
        let instance = instance.map_err(|_| HandoverError::Malformed("instance"))?;
        let process = (InstanceId(instance), state.incarnation.saturating_add(1));
        Ok((process, restore(common, state, sockets)))
    })?;
    (common.instance, common.incarnation) = instance;
    let took_ms = began.elapsed().as_millis();
    tracing::info!(connections = restored.len(), took_ms, "taken over");
    Ok(restored)
}

/// A server at work, for a successor.
pub(crate) struct Served {
    pub common: Common,
    pub collection: mpsc::UnboundedReceiver<Collected>,
}

impl Service for Served {
    fn phase(&self) -> watch::Receiver<Phase> {
        self.common.phase.clone()
    }

    async fn stop(&mut self) -> io::Result<Parcel> {
        let state = stop(&self.common, &mut self.collection).await?;
        // The sockets have one user.
        self.common.keeper.discard();
        Ok(state)
    }

    async fn go_on(&mut self, stopped: Option<Parcel>) -> Result<(), HandoverError> {
        self.common.keeper.open(&kept::process(&self.common));
        serve_again(&self.common).await;
        if let Some(state) = stopped {
            let (state, sockets) = state.open()?;
            go_on(&self.common, restore(&self.common, state, sockets));
        }
        Ok(())
    }
}
