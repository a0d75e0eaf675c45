//! The two ends of a handover: this process takes over, and is succeeded.

use tokio::sync::mpsc;
use tunnel_proto::session::InstanceId;

use super::collected::{Collected, Restored, restore};
use super::kept;
use super::stop::{go_on, serve_again, stop};
use crate::error::ServerError;
use crate::shard::Common;
use cpc_handover::{Endpoint, HandoverError, Parcel, Predecessor, Successor, store};
use cpc_host::environment::Restarts;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::report::report;

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
    let (instance, restored) = predecessor.take(|state, sockets| {
        let instance = <[u8; 16]>::try_from(&state.instance[..]);
        let instance = instance.map_err(|_| HandoverError::Malformed("instance"))?;
        let process = (InstanceId(instance), state.incarnation.saturating_add(1));
        Ok((process, restore(common, state, sockets)))
    })?;
    (common.instance, common.incarnation) = instance;
    tracing::info!(connections = restored.len(), "taken over");
    Ok(restored)
}

/// The means to be succeeded.
pub(crate) struct Succession {
    pub common: Common,
    pub collection: mpsc::UnboundedReceiver<Collected>,
    /// Socket at which successors ask.
    pub endpoint: Option<Endpoint>,
    /// Requests to leave everything with the service manager.
    pub restarts: Restarts,
    /// The listeners, and sockets of an earlier process that nothing here uses: the service manager may.
    pub inherited: Inherited,
}

impl Succession {
    /// Returns once another process serves, or is about to. A process that drains has no successor.
    pub(crate) async fn run(&mut self) {
        loop {
            let outcome = tokio::select! {
                successor = next(&self.endpoint) => self.hand_over(successor).await,
                () = self.restarts.next() => self.leave().await,
                () = lifecycle::stopping(self.common.phase.clone()) => {
                    self.inherited.forget_listeners();
                    self.endpoint = None;
                    return std::future::pending().await;
                }
            };
            match outcome {
                Ok(()) => return,
                Err(error) => tracing::error!(
                    error = report(&error),
                    "nothing is handed over: this process goes on"
                ),
            }
        }
    }

    async fn hand_over(&mut self, successor: Successor) -> Result<(), HandoverError> {
        tracing::info!(version = successor.version, "a successor asks to take over");
        successor.prepare(self.inherited.listeners()?).await?;
        if *self.common.phase.borrow() != Phase::Running {
            return Err(HandoverError::Stopping);
        }
        let state = self.stop().await?;
        match successor.give(state).await {
            Ok(()) => {
                tracing::info!("the successor has taken over: this process ends");
                Ok(())
            }
            Err((error, state)) => {
                self.go_on(state).await?;
                Err(error)
            }
        }
    }

    /// Leaves everything with the service manager, for the next process.
    async fn leave(&mut self) -> Result<(), HandoverError> {
        if !store::is_there() {
            return Err(HandoverError::NoStore);
        }
        let state = self.stop().await?;
        let left = self.inherited.listeners().map_err(HandoverError::from);
        match left.and_then(|listeners| store::leave(listeners, &state)) {
            Ok(()) => {
                tracing::info!("everything is left for the next process: this one ends");
                Ok(())
            }
            Err(error) => {
                self.go_on(Some(state)).await?;
                Err(error)
            }
        }
    }

    async fn stop(&mut self) -> Result<Parcel, HandoverError> {
        match stop(&self.common, &mut self.collection).await {
            Ok(state) => {
                // The sockets have one user.
                self.common.keeper.discard();
                Ok(state)
            }
            Err(error) => {
                // Without the connections: there is no memory for them.
                self.go_on(None).await?;
                Err(error.into())
            }
        }
    }

    /// Goes on with what was stopped.
    async fn go_on(&self, state: Option<Parcel>) -> Result<(), HandoverError> {
        self.common.keeper.open(&kept::process(&self.common));
        serve_again(&self.common).await;
        if let Some(state) = state {
            let (state, sockets) = state.open()?;
            go_on(&self.common, restore(&self.common, state, sockets));
        }
        Ok(())
    }
}

async fn next(endpoint: &Option<Endpoint>) -> Successor {
    match endpoint {
        Some(endpoint) => endpoint.next().await,
        None => std::future::pending().await,
    }
}
