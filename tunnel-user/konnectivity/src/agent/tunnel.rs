//! One tunnel to a proxy-server: serves its requests.

use std::cell::Cell;
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use tokio::sync::Notify;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::session::{Asked, Session};
use super::stream::halves;
use crate::grpc::{PacketReceiver, PacketSender, StreamEnd};
use crate::metrics::{Direction, ProxyAgentMetrics, Segment};
use cpc_agent::extension::{
    EstablishedTunnel, GOODBYE, LOOK_INTERVAL, ServerInfo, ServerTunnel, TunnelEnd, TunnelInfo,
    Worker, serve_dial,
};
use cpc_host::lifecycle::Phase;

/// An established tunnel.
#[derive(Debug)]
struct Tunnel {
    info: TunnelInfo,
    session: Rc<Session>,
    closing: Cell<Option<CloseReason>>,
    close: Notify,
}

/// An established tunnel that is not served yet, with the server's report.
pub(super) struct Established {
    worker: Rc<Worker>,
    metrics: ProxyAgentMetrics,
    tunnel: Rc<Tunnel>,
    /// Number of servers.
    server_count: u32,
    sender: PacketSender,
    receiver: PacketReceiver,
}

impl Established {
    /// Creates the tunnel of a fresh stream. `halves` tells whether the server supports half-close.
    pub(super) fn new(
        (worker, metrics): (Rc<Worker>, ProxyAgentMetrics),
        info: TunnelInfo,
        server_count: u32,
        halves: bool,
        (sender, receiver): (PacketSender, PacketReceiver),
    ) -> Self {
        let tally = metrics.streams.tally(Segment::FromAgent);
        let tunnel = Rc::new(Tunnel {
            info,
            session: Session::new(tally, halves),
            closing: Cell::new(None),
            close: Notify::new(),
        });
        Self {
            worker,
            metrics,
            tunnel,
            server_count,
            sender,
            receiver,
        }
    }

    /// Serves the tunnel until it ends.
    async fn run(self) -> TunnelEnd {
        let Self {
            worker,
            metrics,
            tunnel,
            sender,
            mut receiver,
            ..
        } = self;
        let session = &tunnel.session;
        let mut phase = worker.phase();
        let received = metrics.streams.tally(Segment::ToAgent);
        let outbox = session.outbox().clone();
        let driven = tokio::task::spawn_local(async move { outbox.drive(sender).await });
        let end = loop {
            let blocked = session.is_blocked();
            tokio::select! {
                end = session.outbox().ended() => {
                    metrics.server_failed(Direction::ToServer);
                    metrics.streams.error(Segment::FromAgent, end.code().name(), None);
                    break TunnelEnd::new(end.reason(), end);
                }
                packet = receiver.next(), if !blocked => match packet {
                    Ok(Some(packet)) => {
                        received.packet(&packet);
                        if let Some(Asked { request, stream }) = session.handle(packet) {
                            let (worker, info) = (worker.clone(), tunnel.info.clone());
                            let halves = halves(session, stream);
                            let served = serve_dial(worker, info, request, halves);
                            tokio::task::spawn_local(served);
                        }
                    }
                    Ok(None) => {
                        let why = "the server ended the call";
                        break TunnelEnd::new(CloseReason::LinkLost, why);
                    }
                    Err(end) => {
                        metrics.server_failed(Direction::FromServer);
                        metrics.streams.error(Segment::ToAgent, end.code().name(), None);
                        break TunnelEnd::new(end.reason(), end);
                    }
                },
                () = session.released(), if blocked => {}
                reason = tunnel.closing() => break TunnelEnd::new(reason, StreamEnd::Closed),
                Ok(()) = phase.changed() => {
                    if let Phase::Draining(_) = *phase.borrow_and_update() {
                        session.drain();
                    }
                }
            }
        };
        session.end(end.reason);
        // Nothing to wait for where the stream has ended.
        let goodbye = async {
            let _ = driven.await;
            while let Ok(Some(_)) = receiver.next().await {}
        };
        let _ = timeout(GOODBYE, goodbye).await;
        // A server that gives no credit would hold on to what is left.
        session.outbox().close(StreamEnd::Closed);
        end
    }
}

impl EstablishedTunnel for Established {
    fn tunnel(&self) -> Rc<dyn ServerTunnel> {
        self.tunnel.clone()
    }

    fn server(&self) -> ServerInfo {
        ServerInfo {
            server: self.tunnel.info.server_id.clone(),
            instance: None,
            server_count: self.server_count,
        }
    }

    /// The server may have chosen the tunnel already: its requests until it knows are served.
    fn decline(self: Box<Self>, _reason: CloseReason) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            tokio::task::spawn_local(self.tunnel.clone().retire());
            self.run().await;
        })
    }

    fn serve(self: Box<Self>, _changed: Box<dyn Fn()>) -> LocalBoxFuture<'static, TunnelEnd> {
        Box::pin(self.run())
    }
}

impl ServerTunnel for Tunnel {
    fn info(&self) -> &TunnelInfo {
        &self.info
    }

    /// Ends the tunnel at once. Data that targets have sent by now still leaves.
    fn close(&self, reason: CloseReason) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move { self.end(reason) })
    }

    /// Asks the server to prefer other agents, and serves its requests until it does.
    fn retire(self: Rc<Self>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            self.info.stats.set_draining();
            self.session.drain();
            loop {
                tokio::time::sleep(LOOK_INTERVAL).await;
                if self.session.is_empty() {
                    break;
                }
            }
            self.end(CloseReason::Replaced);
        })
    }
}

impl Tunnel {
    fn end(&self, reason: CloseReason) {
        self.closing.set(Some(reason));
        self.close.notify_one();
    }

    async fn closing(&self) -> CloseReason {
        loop {
            if let Some(reason) = self.closing.get() {
                return reason;
            }
            self.close.notified().await;
        }
    }
}
