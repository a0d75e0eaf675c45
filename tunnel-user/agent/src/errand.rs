//! One tunnel on its shard, from the dial to its end. The [connector](super::connector) decides; here
//! it is done.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tunnel_proto::close::CloseReason;

use super::plan::{Leads, Way, Wire};
use super::tunnel::{About, DialError, Dialled, End, Tunnel};
use super::worker::Worker;
use super::{konnectivity, quic};
use cpc_host::gate::Entered;
use cpc_host::report::report;
use cpc_observe::audit::events as audit;
use cpc_transport::quic::PathView;
use cpc_transport::quic::steering::Spread;

/// Has a shard dial, and serve what comes of it.
pub(super) struct Errand {
    /// Tells this tunnel from others.
    pub number: u64,
    /// Which way.
    pub way: Way,
    /// How the server is called that the way was resolved from.
    pub server: Option<Arc<str>>,
    /// Which of the tunnels at this address it is.
    pub spread: (Spread, u8),
    /// Who hears of it.
    pub events: mpsc::UnboundedSender<Event>,
    /// Its place on the shard.
    pub place: Entered,
}

/// What the connector hears of an errand.
pub(super) enum Event {
    /// A server has shown its certificate. The answer is whether to introduce ourselves.
    Reached(Way, u64, Arc<str>, oneshot::Sender<bool>),
    /// It came to nothing.
    Failed(Way, u64, String),
    /// We are welcome.
    Welcomed(Box<Welcomed>),
    /// The server fell silent, drains, or is heard again.
    Changed(u64),
    /// A tunnel that was kept is over.
    Ended(u64, End),
}

/// A fresh tunnel, for others to see and to end.
pub(super) struct Welcomed {
    /// Which one.
    pub number: u64,
    /// What it is.
    pub about: About,
    /// Where it leads.
    pub leads: Leads,
    /// Its path, where that can tell how it does.
    pub path: Option<Arc<PathView>>,
    /// What it is told.
    pub orders: mpsc::UnboundedSender<Order>,
    /// The answer: whether to keep it.
    pub keep: oneshot::Sender<bool>,
}

/// What a tunnel is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// End, with everything on it.
    Close(CloseReason),
    /// End with the last stream.
    Retire,
}

/// Runs errands until nobody has any.
pub(super) async fn run(worker: Worker, mut errands: mpsc::UnboundedReceiver<Errand>) {
    let worker = Rc::new(worker);
    while let Some(errand) = errands.recv().await {
        let worker = worker.clone();
        tokio::task::spawn_local(async move { errand.run(&worker).await });
    }
}

impl Errand {
    async fn run(self, worker: &Rc<Worker>) {
        let Self {
            number,
            way,
            events,
            place: _place,
            ..
        } = &self;
        // The connector outlives its errands, except at the very end.
        let tell = |event| drop(events.send(event));
        let dialled = match self.dial(worker).await {
            Ok(Some(dialled)) => dialled,
            Ok(None) => return,
            Err(error) => return tell(Event::Failed(*way, *number, report(&error))),
        };
        let tunnel = dialled.tunnel();
        let (orders, told) = mpsc::unbounded_channel();
        let (keep, kept) = oneshot::channel();
        tell(Event::Welcomed(Box::new(Welcomed {
            number: *number,
            about: tunnel.about().clone(),
            leads: dialled.leads(),
            path: tunnel.path(),
            orders,
            keep,
        })));
        if !kept.await.unwrap_or(false) {
            let reason = CloseReason::DuplicateServer;
            return dialled.decline(worker.clone(), reason).await;
        }
        let changed = || tell(Event::Changed(*number));
        let struck = struck(worker, tunnel.clone());
        let end = tokio::select! {
            end = dialled.serve(worker.clone(), changed) => end,
            end = obey(tunnel, told) => end,
            end = struck => end,
        };
        tell(Event::Ended(*number, end));
    }

    /// `None`: the connector does not want it any more.
    async fn dial(&self, worker: &Worker) -> Result<Option<Dialled>, DialError> {
        let Way { address, wire } = self.way;
        match (wire, &worker.material, &worker.konnectivity, &self.server) {
            (Wire::Quic, Some(material), _, _) => {
                let reached = quic::reach(material, &worker.setup, address, self.spread).await?;
                let (introduce, wanted) = oneshot::channel();
                let server = reached.identity.name.clone();
                let reached_it = Event::Reached(self.way, self.number, server, introduce);
                let _ = self.events.send(reached_it);
                if !wanted.await.unwrap_or(false) {
                    reached.decline(CloseReason::DuplicateServer).await;
                    return Ok(None);
                }
                Ok(Some(Dialled::Quic(reached.introduce(worker).await?)))
            }
            (Wire::Grpc, _, Some(client), Some(server)) => {
                let metrics = &worker.proxy_metrics.streams;
                let dialled = konnectivity::dial(client, self.way, server, metrics).await?;
                Ok(Some(Dialled::Grpc(dialled)))
            }
            _ => Err(DialError::NotConfigured),
        }
    }
}

/// Ends a tunnel to a server that counts no more.
async fn struck(worker: &Worker, tunnel: Tunnel) -> End {
    let (Some(material), Tunnel::Quic(quic)) = (&worker.material, &tunnel) else {
        return std::future::pending().await;
    };
    let revoked = material.revocations().strike(&quic.peer()).await;
    audit::cut("tunnel", quic.about.way.address, &revoked);
    let reason = CloseReason::IdentityRefused;
    tunnel.close(reason);
    End::new(reason, revoked)
}

/// Does what a tunnel is told, for ever: its end is its own to tell.
async fn obey(tunnel: Tunnel, mut told: mpsc::UnboundedReceiver<Order>) -> End {
    while let Some(order) = told.recv().await {
        match order {
            Order::Close(reason) => tunnel.close_when_heard(reason).await,
            Order::Retire => drop(tokio::task::spawn_local(tunnel.clone().retire())),
        }
    }
    std::future::pending().await
}
