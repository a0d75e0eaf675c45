//! What runs on a shard: its endpoint, its accept loops, and their end.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::rc::Rc;
use std::time::Duration;

use quinn::Endpoint;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;

use super::attachments::Accepting;
use super::bind::{TlsBound, UnixBound};
use super::frontend::listener::{self, Protocol, Service};
use super::frontend::redirect;
use super::link;
use super::link::konnectivity::{Agents, Door};
use super::shard::{Common, Shard};
use super::{ServerError, Tunnel};
use crate::datapath::socket::prepare_listener;
use crate::process::host;
use crate::process::lifecycle::{self, Pulse};
use crate::tls::TrustDomain;
use crate::transport::{endpoint, error_code};

/// How often a draining shard looks whether its connections have ended.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// How long goodbyes may take.
const GOODBYE: Duration = Duration::from_millis(500);

/// What a shard is started with.
pub(super) struct Start {
    /// What every shard knows.
    pub common: Common,
    /// The tunnel and its socket.
    pub tunnel: Option<(Tunnel, UdpSocket)>,
    /// Attachments of the redirect.
    pub accepting: Vec<Accepting>,
    /// Frontends on Unix sockets.
    pub unix: Vec<UnixBound>,
    /// Frontends on TCP with TLS.
    pub tls: Vec<TlsBound>,
    /// Where agents of Konnectivity come in.
    pub agents: Option<(TcpListener, Door)>,
    /// Our sign of life.
    pub pulse: Pulse,
}

/// Where a shard's tunnel listens, or why it did not start.
pub(super) type Started = Result<Option<SocketAddr>, ServerError>;

/// Runs a shard from start to end; `started` is told where it listens.
pub(super) async fn run(start: Start, started: oneshot::Sender<Started>) {
    let phase = start.common.phase.clone();
    tokio::task::spawn_local(start.pulse.clone().beat());
    let Open {
        shard,
        endpoint,
        agents,
    } = match open(start) {
        Ok(opened) => opened,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let listening = endpoint.as_ref().map(Endpoint::local_addr).transpose();
    let _ = started.send(listening.map_err(ServerError::Io));
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
    shard.close_links(reason);
    if let Some(endpoint) = endpoint {
        endpoint.close(error_code(reason), reason.label().as_bytes());
        // For the goodbyes; agents that are away get a stateless reset from whoever comes next.
        let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
    }
    if let Some(agents) = agents {
        let _ = timeout(GOODBYE, agents.leave()).await;
    }
}

/// What runs on a shard and must be told of its end.
struct Open {
    shard: Rc<Shard>,
    endpoint: Option<Endpoint>,
    agents: Option<Rc<Agents>>,
}

fn open(start: Start) -> Result<Open, ServerError> {
    let shard = Shard::new(0, start.common);
    let mut endpoint = None;
    if let Some((tunnel, udp)) = start.tunnel {
        let opened = endpoint::server(udp, &tunnel.material, &tunnel.secret, 0)?;
        host::complain(&opened.complaints);
        tokio::task::spawn_local(link::accept(shard.clone(), opened.endpoint.clone()));
        endpoint = Some(opened.endpoint);
    }
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
    for UnixBound {
        listener,
        tenant,
        protocol,
    } in start.unix
    {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let service = service(&shard, tenant, protocol);
        until_stopping(&shard, listener::accept_unix(service, listener));
    }
    for TlsBound {
        listener,
        tenant,
        protocol,
        tls,
    } in start.tls
    {
        protocol.prepare(&listener)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let service = service(&shard, tenant, protocol);
        until_stopping(&shard, listener::accept_tls(service, listener, tls));
    }
    let mut agents = None;
    if let Some((listener, door)) = start.agents {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let door = agents.insert(Agents::new(shard.clone(), door));
        until_stopping(&shard, door.clone().accept(listener));
    }
    Ok(Open {
        shard,
        endpoint,
        agents,
    })
}

fn service(shard: &Rc<Shard>, tenant: TrustDomain, protocol: Protocol) -> Rc<Service> {
    Rc::new(Service {
        shard: shard.clone(),
        tenant,
        protocol,
    })
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
