//! What runs on a shard: its endpoint, its accept loops, and their end.

use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use quinn::Endpoint;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;

use super::ServerError;
use super::attachments::Accepting;
use super::bind::{TlsBound, UnixBound};
use super::frontend::{http_connect, redirect};
use super::link;
use super::shard::{Common, Shard};
use crate::datapath::socket::prepare_listener;
use crate::process::host;
use crate::process::lifecycle::{self, Pulse};
use crate::tls::Material;
use crate::transport::endpoint;
use crate::transport::secret::Secret;

/// How often a draining shard looks whether its connections have ended.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// How long goodbyes may take.
const GOODBYE: Duration = Duration::from_millis(500);

/// What a shard is started with.
pub(super) struct Start {
    /// What every shard knows.
    pub common: Common,
    /// Our certificate.
    pub material: Arc<Material>,
    /// Our secret.
    pub secret: Secret,
    /// The tunnel's socket.
    pub udp: UdpSocket,
    /// Attachments of the redirect.
    pub accepting: Vec<Accepting>,
    /// HTTP CONNECT on Unix sockets.
    pub unix: Vec<UnixBound>,
    /// HTTP CONNECT on TCP with TLS.
    pub tls: Vec<TlsBound>,
    /// Our sign of life.
    pub pulse: Pulse,
}

/// Runs a shard from start to end; `started` is told where it listens.
pub(super) async fn run(start: Start, started: oneshot::Sender<Result<SocketAddr, ServerError>>) {
    let phase = start.common.phase.clone();
    tokio::task::spawn_local(start.pulse.clone().beat());
    let (shard, endpoint) = match open(start) {
        Ok(opened) => opened,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(endpoint.local_addr().map_err(ServerError::Io));
    let idle = async {
        lifecycle::stopping(phase.clone()).await;
        while !shard.is_idle() {
            sleep(IDLE_POLL).await;
        }
    };
    let reason = tokio::select! {
        () = idle => CloseReason::Shutdown,
        () = lifecycle::ended(phase.clone()) => CloseReason::Drained,
    };
    shard.close_links(&endpoint, reason);
    // For the goodbyes; agents that are away get a stateless reset from whoever comes next.
    let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
}

fn open(start: Start) -> Result<(Rc<Shard>, Endpoint), ServerError> {
    let opened = endpoint::server(start.udp, &start.material, &start.secret, 0)?;
    host::complain(&opened.complaints);
    let shard = Shard::new(0, start.common);
    tokio::task::spawn_local(link::accept(shard.clone(), opened.endpoint.clone()));
    for Accepting {
        name,
        tenant,
        listeners,
        flows,
        heartbeat,
    } in start.accepting
    {
        let flows = flows.into();
        let attachment = Rc::new(redirect::Attachment {
            name,
            tenant,
            flows,
        });
        // Once it drains, what still comes may wait for a successor for as long as the last beat
        // counts, and is refused after that.
        until_stopping(&shard, redirect::beat(heartbeat));
        for listener in listeners {
            prepare_listener(&listener)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let accept = redirect::accept(shard.clone(), attachment.clone(), listener);
            until_stopping(&shard, accept);
        }
    }
    for UnixBound { listener, tenant } in start.unix {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        until_stopping(
            &shard,
            http_connect::accept_unix(shard.clone(), tenant, listener),
        );
    }
    for TlsBound {
        listener,
        tenant,
        tls,
    } in start.tls
    {
        prepare_listener(&listener)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        until_stopping(
            &shard,
            http_connect::accept_tls(shard.clone(), tenant, listener, tls),
        );
    }
    Ok((shard, opened.endpoint))
}

/// Runs an endless task until the process drains, and drops what it holds then, a listener first
/// of all.
fn until_stopping(shard: &Shard, task: impl Future<Output = ()> + 'static) {
    let phase = shard.phase.clone();
    tokio::task::spawn_local(async move {
        tokio::select! {
            () = task => {}
            () = lifecycle::stopping(phase) => {}
        }
    });
}
