//! One tunnel on its shard, from the dial to its end. The [connector](super::connector) decides, this
//! task executes.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tunnel_proto::close::CloseReason;

use super::plan::{ServerEndpoint, ServerInfo};
use super::tunnel::{DialError, Dialled, End, Tunnel, TunnelInfo};
use super::worker::Worker;
use super::{konnectivity, quic};
use cpc_config::TunnelKind;
use cpc_host::concurrency::Permit;
use cpc_host::report::report;
use cpc_observe::audit::events as audit;
use cpc_transport::quic::steering::Spread;
use cpc_transport::tunnel::Probe;

/// A task for a shard: to dial, and to serve the resulting tunnel.
pub(super) struct TunnelTask {
    /// Number of the tunnel.
    pub number: u64,
    /// Address and protocol.
    pub endpoint: ServerEndpoint,
    /// Server name that the way was resolved from.
    pub server: Option<Arc<str>>,
    /// Number of the tunnel among those at this address.
    pub spread: (Spread, u8),
    /// Receiver of the events.
    pub events: mpsc::UnboundedSender<Event>,
    /// Permit on the shard.
    pub place: Permit,
}

/// Event of a task, for the connector.
pub(super) enum Event {
    /// A server has shown its certificate. The answer tells whether to send Hello.
    Reached(ServerEndpoint, u64, Arc<str>, oneshot::Sender<bool>),
    /// The dial failed.
    Failed(ServerEndpoint, u64, String),
    /// The server has welcomed the agent.
    Welcomed(Box<Welcomed>),
    /// The server fell silent, drains, or is heard again.
    Changed(u64),
    /// A kept tunnel has ended.
    Ended(u64, End),
}

/// A fresh tunnel, with handles for the connector.
pub(super) struct Welcomed {
    /// Number of the tunnel.
    pub number: u64,
    /// Description of the tunnel.
    pub info: TunnelInfo,
    /// Server that the tunnel leads to.
    pub server_info: ServerInfo,
    /// Probe of the path, where the protocol measures it.
    pub probe: Option<Probe>,
    /// Sender of orders.
    pub commands: mpsc::UnboundedSender<TunnelCommand>,
    /// Sender of the decision whether to keep the tunnel.
    pub keep: oneshot::Sender<bool>,
}

/// Command for a tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) enum TunnelCommand {
    /// End at once, with everything on the tunnel.
    Close(CloseReason),
    /// End with the last stream.
    Retire,
}

/// Runs tasks until their sender is gone.
pub(super) async fn run(worker: Worker, mut tasks: mpsc::UnboundedReceiver<TunnelTask>) {
    let worker = Rc::new(worker);
    while let Some(task) = tasks.recv().await {
        let worker = worker.clone();
        tokio::task::spawn_local(async move { task.run(&worker).await });
    }
}

impl TunnelTask {
    async fn run(self, worker: &Rc<Worker>) {
        let Self {
            number,
            endpoint,
            events,
            place: _place,
            ..
        } = &self;
        // The connector outlives its tasks, except at the very end.
        let tell = |event| drop(events.send(event));
        let dialled = match self.dial(worker).await {
            Ok(Some(dialled)) => dialled,
            Ok(None) => return,
            Err(error) => return tell(Event::Failed(*endpoint, *number, report(&error))),
        };
        let tunnel = dialled.tunnel();
        let (commands, told) = mpsc::unbounded_channel();
        let (keep, kept) = oneshot::channel();
        tell(Event::Welcomed(Box::new(Welcomed {
            number: *number,
            info: tunnel.info().clone(),
            server_info: dialled.server_info(),
            probe: tunnel.probe(),
            commands,
            keep,
        })));
        if !kept.await.unwrap_or(false) {
            let reason = CloseReason::DuplicateServer;
            return dialled.decline(worker.clone(), reason).await;
        }
        let changed = || tell(Event::Changed(*number));
        let revoked = revoked(worker, tunnel.clone());
        let end = tokio::select! {
            end = dialled.serve(worker.clone(), changed) => end,
            end = run_commands(tunnel, told) => end,
            end = revoked => end,
        };
        tell(Event::Ended(*number, end));
    }

    /// Dials. Returns `None` if the connector does not want the tunnel any more.
    async fn dial(&self, worker: &Worker) -> Result<Option<Dialled>, DialError> {
        let ServerEndpoint { address, kind } = self.endpoint;
        match (kind, &worker.material, &worker.konnectivity, &self.server) {
            (TunnelKind::Quic, Some(material), _, _) => {
                let reached = quic::reach(material, &worker.setup, address, self.spread).await?;
                let (introduce, wanted) = oneshot::channel();
                let server = reached.identity.name.clone();
                let reached_it = Event::Reached(self.endpoint, self.number, server, introduce);
                let _ = self.events.send(reached_it);
                if !wanted.await.unwrap_or(false) {
                    reached.decline(CloseReason::DuplicateServer).await;
                    return Ok(None);
                }
                Ok(Some(Dialled::Quic(reached.introduce(worker).await?)))
            }
            (TunnelKind::Konnectivity, _, Some(client), Some(server)) => {
                let metrics = &worker.proxy_metrics.streams;
                let dialled = konnectivity::dial(client, self.endpoint, server, metrics).await?;
                Ok(Some(Dialled::Grpc(dialled)))
            }
            _ => Err(DialError::NotConfigured),
        }
    }
}

/// Ends a tunnel to a revoked server.
async fn revoked(worker: &Worker, tunnel: Tunnel) -> End {
    let (Some(material), Tunnel::Quic(quic)) = (&worker.material, &tunnel) else {
        return std::future::pending().await;
    };
    let revoked = material.revocations().on_revocation(&quic.peer()).await;
    audit::cut("tunnel", quic.info.endpoint.address, &revoked);
    let reason = CloseReason::IdentityRefused;
    tunnel.close(reason);
    End::new(reason, revoked)
}

/// Executes orders without end: the tunnel itself reports its end.
async fn run_commands(tunnel: Tunnel, mut told: mpsc::UnboundedReceiver<TunnelCommand>) -> End {
    while let Some(order) = told.recv().await {
        match order {
            TunnelCommand::Close(reason) => tunnel.close_when_heard(reason).await,
            TunnelCommand::Retire => drop(tokio::task::spawn_local(tunnel.clone().retire())),
        }
    }
    std::future::pending().await
}
