//! The end of service for a successor, as a server and an agent have it in common.

use tokio::sync::watch;

use super::endpoint::Endpoint;
use super::error::HandoverError;
use super::listeners::KeptListeners;
use super::parcel::Parcel;
use super::store;
use super::successor::Successor;
use cpc_host::environment::Restarts;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::report::report;

/// Service that can be handed over.
pub trait Service {
    /// Returns the phase of the process.
    fn phase(&self) -> watch::Receiver<Phase>;
    /// Stops serving, and returns everything that was served. Connections that can't be given away end.
    ///
    /// # Errors
    /// The state needs memory that is not there.
    fn stop(&mut self) -> impl Future<Output = std::io::Result<Parcel>>;
    /// Serves again, with `stopped` or without any connection.
    ///
    /// # Errors
    /// [`HandoverError`]: the process serves without the connections.
    fn go_on(&mut self, stopped: Option<Parcel>)
    -> impl Future<Output = Result<(), HandoverError>>;
}

/// Means to be succeeded.
pub struct Succession<S> {
    /// Service of the process.
    pub service: S,
    /// Socket at which successors ask.
    pub endpoint: Option<Endpoint>,
    /// Requests to leave everything with the service manager.
    pub restarts: Restarts,
    /// Listeners, and sockets of an earlier process that this one does not use: the service manager may.
    pub inherited: Inherited,
    /// Copies of the listeners in the keeper.
    pub listeners: KeptListeners,
}

impl<S: Service> Succession<S> {
    /// Returns once another process serves, or is about to. A process that drains has no successor.
    pub async fn run(&mut self) {
        loop {
            let outcome = tokio::select! {
                successor = next(&self.endpoint) => self.hand_over(successor).await,
                () = self.restarts.next() => self.leave().await,
                () = lifecycle::stopping(self.service.phase()) => {
                    self.listeners.discard();
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
        if *self.service.phase().borrow() != Phase::Running {
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

    /// Stops the service, or goes on without its connections. The listeners get another user.
    async fn stop(&mut self) -> Result<Parcel, HandoverError> {
        self.listeners.discard();
        match self.service.stop().await {
            Ok(state) => Ok(state),
            Err(error) => {
                self.go_on(None).await?;
                Err(error.into())
            }
        }
    }

    async fn go_on(&mut self, stopped: Option<Parcel>) -> Result<(), HandoverError> {
        self.listeners.keep(self.inherited.noted());
        self.service.go_on(stopped).await
    }
}

async fn next(endpoint: &Option<Endpoint>) -> Successor {
    match endpoint {
        Some(endpoint) => endpoint.next().await,
        None => std::future::pending().await,
    }
}
