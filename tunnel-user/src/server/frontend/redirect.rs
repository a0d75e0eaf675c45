//! The redirect's end in user space: accepts what the kernel has redirected, learns the origin,
//! dials. The client's first bytes travel with the request.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tracing::Instrument;
use tunnel_proto::preface::Destination;

use super::{accept_failed, failed, overloaded, serve};
use crate::redirect::{Flows, Heartbeat};
use crate::server::dial::{connection_id, dial};
use crate::server::early::{Early, EarlyBytes};
use crate::server::shard::Shard;
use crate::telemetry::access::Record;
use crate::telemetry::metrics::FrontendKind;
use crate::tls::TrustDomain;

/// One attachment, as its listener knows it.
pub(crate) struct Attachment {
    /// Its name.
    pub name: String,
    /// Whose sockets are redirected.
    pub tenant: TrustDomain,
    /// Where origins are looked up.
    pub flows: RefCell<Flows>,
}

/// Twice a second, well below the 3 s after which the kernel takes us for stuck.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Tells the kernel for ever that the thread that accepts is alive.
pub(crate) async fn beat(mut heartbeat: Heartbeat) {
    let mut tick = tokio::time::interval(HEARTBEAT);
    loop {
        tick.tick().await;
        if let Err(error) = heartbeat.beat() {
            tracing::error!(%error, "the kernel can't be told that we are alive");
        }
    }
}

/// Accepts for ever.
pub(crate) async fn accept(shard: Rc<Shard>, attachment: Rc<Attachment>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((socket, client)) => {
                let (shard, attachment) = (shard.clone(), attachment.clone());
                tokio::task::spawn_local(async move {
                    connection(shard, &attachment, socket, client).await;
                });
            }
            Err(error) => accept_failed(&attachment.name, &error).await,
        }
    }
}

async fn connection(
    shard: Rc<Shard>,
    attachment: &Attachment,
    socket: TcpStream,
    client: SocketAddr,
) {
    let Some(destination) = origin(&shard, attachment, &socket, client) else {
        return;
    };
    let destination = Destination::new(destination.ip(), destination.port());
    let mut record = Record::new(connection_id(), FrontendKind::Redirect, destination);
    record.client = Some(client.to_string());
    let Some(_admitted) = shard.admit() else {
        failed(&shard, &record, &overloaded(&shard));
        return;
    };
    let early = EarlyBytes::new(Early::Send, Bytes::new());
    let span = record.span();
    let served = async {
        match dial(&shard, &mut record, &attachment.tenant, &socket, early).await {
            Ok(dialled) => {
                record.reached(&shard.metrics.dials);
                serve(&shard, record, socket, dialled).await;
            }
            // The local handshake is done, so a reset is all that the client can be told.
            Err(error) => failed(&shard, &record, &error),
        }
    };
    served.instrument(span).await;
}

/// Where the client had wanted to go; `None` where it is to be reset.
fn origin(
    shard: &Shard,
    attachment: &Attachment,
    socket: &TcpStream,
    client: SocketAddr,
) -> Option<SocketAddr> {
    let listener = socket.local_addr().ok()?;
    match attachment.flows.borrow_mut().take_origin(client, listener) {
        // On kernels that can't refuse by errno: counted there already.
        Ok(Some(origin)) if origin.refused.is_some() => return None,
        Ok(Some(origin)) => return Some(origin.destination),
        Ok(None) => tracing::warn!(
            attachment = attachment.name, %client,
            "connection without an origin is reset: nobody may connect here directly"
        ),
        Err(error) => tracing::error!(
            attachment = attachment.name, %client, %error, "origin not found, connection is reset"
        ),
    }
    shard.metrics.origins_missing.inc();
    None
}
