//! The two ends of a handover: this process takes over, and is succeeded.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};
use tunnel_proto::handover::State;
use tunnel_proto::session::InstanceId;

use super::kept;
use super::saved::{restore, save};
use super::stage::Stage;
use crate::error::AgentError;
use crate::sessions::Parked;
use crate::worker::Worker;
use cpc_datapath::engine::packed;
use cpc_handover::{Endpoint, HandoverError, Parcel, Predecessor, Successor, store, understood};
use cpc_host::environment::Restarts;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::report::report;

/// Role of this process in a handover.
pub(crate) const ROLE: &str = "agent";

/// Maximum time for dials under way to end, and for young connections to be held.
const PAUSE: Duration = Duration::from_secs(2);

/// Maximum time for connections to leave their tunnels.
const LEAVE: Duration = Duration::from_secs(1);

/// Interval of looks at the progress of both.
const LOOK: Duration = Duration::from_millis(2);

/// Takes over what `predecessor` has served, in its name.
///
/// # Errors
/// [`AgentError::Handover`]: the predecessor goes on.
pub(crate) fn take_over(predecessor: Predecessor, worker: &mut Worker) -> Result<(), AgentError> {
    let (instance, restored) = predecessor.take(|state, sockets| {
        let instance = <[u8; 16]>::try_from(&state.instance[..]);
        let instance = instance.map_err(|_| HandoverError::Malformed("instance"))?;
        let process = (InstanceId(instance), state.incarnation.saturating_add(1));
        Ok((process, restore_all(worker, &state, sockets)))
    })?;
    (worker.instance, worker.incarnation) = instance;
    tracing::info!(connections = restored.len(), "taken over");
    worker.sessions.insert(restored);
    Ok(())
}

/// Restores all connections but those that this release does not understand. They end.
fn restore_all(worker: &Worker, state: &State, sockets: Vec<OwnedFd>) -> Vec<Parked> {
    let mut sockets: Vec<_> = sockets.into_iter().map(Some).collect();
    let saved = state.connections.iter();
    understood(saved.map(|one| {
        restore(worker, one, |socket| {
            let number = usize::try_from(socket.descriptor).unwrap_or(usize::MAX);
            let descriptor = sockets.get_mut(number).and_then(Option::take)?;
            Some(packed(TcpStream::from(descriptor), None))
        })
    }))
}

/// The means to be succeeded.
pub(crate) struct Succession {
    pub worker: Worker,
    /// Socket at which successors ask.
    pub endpoint: Option<Endpoint>,
    /// Requests to leave everything with the service manager.
    pub restarts: Restarts,
    /// The listeners, and sockets of an earlier process that nothing here uses.
    pub inherited: Inherited,
}

impl Succession {
    /// Returns once another process serves, or is about to. A process that drains has no successor.
    pub(crate) async fn run(&mut self) {
        loop {
            let outcome = tokio::select! {
                successor = next(&self.endpoint) => self.hand_over(successor).await,
                () = self.restarts.next() => self.leave().await,
                () = lifecycle::stopping(self.worker.phase()) => {
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
        if *self.worker.phase().borrow() != Phase::Running {
            return Err(HandoverError::Stopping);
        }
        let state = self.stop().await.or_else(|error| self.not_stopped(error))?;
        match successor.give(state).await {
            Ok(()) => {
                tracing::info!("the successor has taken over: this process ends");
                Ok(())
            }
            Err((error, state)) => {
                self.go_on(state)?;
                Err(error)
            }
        }
    }

    /// Leaves everything with the service manager, for the next process.
    async fn leave(&mut self) -> Result<(), HandoverError> {
        if !store::is_there() {
            return Err(HandoverError::NoStore);
        }
        let state = self.stop().await.or_else(|error| self.not_stopped(error))?;
        let left = self.inherited.listeners().map_err(HandoverError::from);
        match left.and_then(|listeners| store::leave(listeners, &state)) {
            Ok(()) => {
                tracing::info!("everything is left for the next process: this one ends");
                Ok(())
            }
            Err(error) => {
                self.go_on(Some(state))?;
                Err(error)
            }
        }
    }

    /// Stops serving, and returns everything that was served. Connections that can't be given away end.
    ///
    /// # Errors
    /// There is no memory for the state.
    async fn stop(&self) -> io::Result<Parcel> {
        let (handover, sessions) = (&self.worker.handover, &self.worker.sessions);
        let began = Instant::now();
        handover.set(Stage::Pausing);
        let ready = async {
            while !handover.is_ready() {
                sleep(LOOK).await;
            }
        };
        if timeout(PAUSE, ready).await.is_err() {
            tracing::warn!("some connections can't be handed over yet, and end");
        }
        let paused = began.elapsed();
        handover.set(Stage::Left);
        let left = async {
            while sessions.are_carried() {
                sleep(LOOK).await;
            }
        };
        let _ = timeout(LEAVE, left).await;
        // The sockets have one user.
        self.worker.keeper.discard();
        let parked = sessions.take_all();
        tracing::info!(
            sessions = parked.len(),
            paused_ms = paused.as_millis(),
            stopped_ms = (began.elapsed() - paused).as_millis(),
            "everything is stopped for the successor"
        );
        let mut state = Parcel::of(&State {
            instance: Bytes::copy_from_slice(&self.worker.instance.0),
            connections: Vec::new(),
            incarnation: self.worker.incarnation,
        })?;
        for one in parked {
            save(&self.worker, one, &mut state)?;
        }
        Ok(state)
    }

    /// Goes on without the connections: there is no memory for them.
    fn not_stopped(&self, error: io::Error) -> Result<Parcel, HandoverError> {
        self.go_on(None)?;
        Err(error.into())
    }

    /// Goes on with what was stopped.
    fn go_on(&self, state: Option<Parcel>) -> Result<(), HandoverError> {
        self.worker.keeper.open(&kept::process(&self.worker));
        let restored = state.map_or(Ok(Vec::new()), |state| {
            let (state, sockets) = state.open()?;
            Ok(restore_all(&self.worker, &state, sockets))
        });
        // Before a server asks for them.
        let restored = restored.map(|restored| self.worker.sessions.insert(restored));
        self.worker.handover.set(Stage::Serving);
        restored
    }
}

async fn next(endpoint: &Option<Endpoint>) -> Successor {
    match endpoint {
        Some(endpoint) => endpoint.next().await,
        None => std::future::pending().await,
    }
}
