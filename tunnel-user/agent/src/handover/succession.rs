//! The two ends of a handover: this process takes over, and is succeeded.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
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
use cpc_handover::{HandoverError, Parcel, Predecessor, Service, understood};
use cpc_host::lifecycle::Phase;

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
    let began = Instant::now();
    let (instance, restored) = predecessor.take(|state, sockets| {
        let instance = <[u8; 16]>::try_from(&state.instance[..]);
        let instance = instance.map_err(|_| HandoverError::Malformed("instance"))?;
        let process = (InstanceId(instance), state.incarnation.saturating_add(1));
        Ok((process, restore_all(worker, &state, sockets)))
    })?;
    (worker.instance, worker.incarnation) = instance;
    let took_ms = began.elapsed().as_millis();
    tracing::info!(connections = restored.len(), took_ms, "taken over");
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

/// An agent at work, for a successor.
pub(crate) struct Served(pub Worker);

impl Service for Served {
    fn phase(&self) -> watch::Receiver<Phase> {
        self.0.phase()
    }

    async fn stop(&mut self) -> io::Result<Parcel> {
        let (handover, sessions) = (&self.0.handover, &self.0.sessions);
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
        self.0.keeper.discard();
        let parked = sessions.take_all();
        tracing::info!(
            sessions = parked.len(),
            paused_ms = paused.as_millis(),
            stopped_ms = (began.elapsed() - paused).as_millis(),
            "everything is stopped for the successor"
        );
        let mut state = Parcel::of(&State {
            instance: Bytes::copy_from_slice(&self.0.instance.0),
            connections: Vec::new(),
            incarnation: self.0.incarnation,
        })?;
        for one in parked {
            save(&self.0, one, &mut state)?;
        }
        Ok(state)
    }

    async fn go_on(&mut self, stopped: Option<Parcel>) -> Result<(), HandoverError> {
        let worker = &self.0;
        worker.keeper.open(&kept::process(worker));
        let restored = stopped.map_or(Ok(Vec::new()), |state| {
            let (state, sockets) = state.open()?;
            Ok(restore_all(worker, &state, sockets))
        });
        // Before a server asks for them.
        let restored = restored.map(|restored| worker.sessions.insert(restored));
        worker.handover.set(Stage::Serving);
        restored
    }
}
