//! The redirect's end in user space: accepts redirected connections, looks up their origins, dials. The
//! client's first bytes travel with the request.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::net::{TcpListener, TcpStream};
use tunnel_proto::preface::Destination;

use super::client::{AnswerFormat, Client};
use super::connection::admit;
use super::scope::Scope;
use crate::dial::{Dial, connection_id};
use crate::early::{Early, EarlyBytes};
use crate::handover::Handover;
use crate::permits::{ConnectionPermit, DialPermit};
use crate::shard::Shard;
use cpc_datapath::Socket;
use cpc_datapath::socket::Portable;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::report::report;
use cpc_observe::access::Record;
use cpc_observe::metrics::FrontendKind;
use cpc_redirect::{Flows, Heartbeat, Origin, RedirectError};

/// One attachment, as its listener knows it.
pub(crate) struct Attachment {
    /// Name of the attachment.
    pub name: String,
    /// Tenant and allow-list of the clients.
    pub scope: Arc<Scope>,
    /// Origins of the connections.
    pub origins: RefCell<Box<dyn Origins>>,
}

/// Origins of accepted connections: the kernel's flows, or those of a program that embeds the server.
pub trait Origins: Send {
    /// Takes the origin of the connection from `client` to `listener`: each can be taken once.
    ///
    /// # Errors
    /// The kernel's map can't be read.
    fn take_origin(
        &mut self,
        client: SocketAddr,
        listener: SocketAddr,
    ) -> Result<Option<Origin>, RedirectError>;
}

impl Origins for Flows {
    fn take_origin(
        &mut self,
        client: SocketAddr,
        listener: SocketAddr,
    ) -> Result<Option<Origin>, RedirectError> {
        Self::take_origin(self, client, listener)
    }
}

/// Interval of heartbeats, well below the 3 s after which the kernel takes the server for stuck.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// The heartbeat of the thread that accepts. Dropped, it reports that connections are not accepted any
/// more, unless the service manager keeps the listeners, or a successor has them: then connects may wait in
/// their backlog for the next process, for as long as the last beat counts.
pub(crate) struct HeartbeatGuard {
    /// `None` where no kernel program reads it.
    heartbeat: Option<Heartbeat>,
    listeners_kept: bool,
    handover: Handover,
}

impl HeartbeatGuard {
    /// Starts the heartbeat of listeners that are about to accept.
    pub(crate) fn new(
        heartbeat: Option<Heartbeat>,
        listeners_kept: bool,
        handover: Handover,
    ) -> Self {
        Self {
            heartbeat,
            listeners_kept,
            handover,
        }
    }

    async fn run(mut self) {
        let Some(heartbeat) = &mut self.heartbeat else {
            return std::future::pending().await;
        };
        let mut tick = tokio::time::interval(HEARTBEAT);
        loop {
            tick.tick().await;
            if let Err(error) = heartbeat.beat() {
                tracing::error!(
                    error = report(&error),
                    "the heartbeat can't be written to the kernel"
                );
            }
        }
    }
}

impl Drop for HeartbeatGuard {
    fn drop(&mut self) {
        if !self.listeners_kept
            && !self.handover.is_collecting()
            && let Some(heartbeat) = &mut self.heartbeat
            && let Err(error) = heartbeat.stop()
        {
            tracing::error!(
                error = report(&error),
                "the end of the heartbeat can't be written to the kernel"
            );
        }
    }
}

/// Accepts and beats until it is dropped: one never goes on without the other.
pub(crate) async fn run(
    shard: Rc<Shard>,
    attachment: Rc<Attachment>,
    listeners: Vec<TcpListener>,
    beating: HeartbeatGuard,
) {
    let accept = |listener| accept(shard.clone(), attachment.clone(), listener);
    let accepting = join_all(listeners.into_iter().map(accept));
    tokio::join!(beating.run(), accepting);
}

/// Accepts without end.
async fn accept(shard: Rc<Shard>, attachment: Rc<Attachment>, listener: TcpListener) {
    loop {
        match { &shard.handover }
            .accept(async || listener.accept().await)
            .await
        {
            Ok((socket, client)) => {
                take_in(&shard, &attachment, socket, client);
            }
            Err(error) => after_failed_accept(&listener, &attachment.name, &error, b"").await,
        }
    }
}

/// Starts to serve a client, or drops it, which resets it.
fn take_in(shard: &Rc<Shard>, attachment: &Attachment, socket: TcpStream, client: SocketAddr) {
    let Some(destination) = origin(shard, attachment, &socket, client) else {
        return;
    };
    let destination = Destination::new(destination.ip(), destination.port());
    let mut record = Record::new(connection_id(), FrontendKind::Redirect, destination);
    record.client = Some(client);
    let Ok(admitted) = admit(shard, &attachment.scope, &record) else {
        return;
    };
    match Socket::new(socket) {
        Ok(socket) => serve(shard, attachment, record, admitted, socket),
        Err(error) => tracing::warn!(error = report(&error), "connection is reset"),
    }
}

fn serve(
    shard: &Rc<Shard>,
    attachment: &Attachment,
    record: Record,
    (admitted, dial_permit): (ConnectionPermit, DialPermit),
    local: impl Portable,
) {
    let early = EarlyBytes::new(Early::Send, Bytes::new());
    let client = Client {
        dial: Dial::new(
            shard,
            record,
            &attachment.scope.tenant,
            (early, dial_permit),
        ),
        manner: AnswerFormat::Redirected,
        local,
        admitted,
        counted: None,
    };
    tokio::task::spawn_local(Box::new(client).serve(shard.clone()));
}

/// Returns the destination of the client; `None` where it must be reset.
fn origin(
    shard: &Shard,
    attachment: &Attachment,
    socket: &TcpStream,
    client: SocketAddr,
) -> Option<SocketAddr> {
    let listener = socket.local_addr().ok()?;
    match attachment
        .origins
        .borrow_mut()
        .take_origin(client, listener)
    {
        // On kernels that can't refuse by errno: counted there already.
        Ok(Some(origin)) if origin.refused.is_some() => return None,
        Ok(Some(origin)) => return Some(origin.destination),
        Ok(None) => tracing::warn!(
            attachment = attachment.name, %client,
            "connection without an origin is reset: this listener accepts redirected connections only"
        ),
        Err(error) => tracing::error!(
            attachment = attachment.name, %client, error = report(&error), "origin not found, connection is reset"
        ),
    }
    shard.metrics.origins_missing.inc();
    None
}
