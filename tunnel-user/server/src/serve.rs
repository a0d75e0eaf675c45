//! The tasks of a shard: its endpoint, its accept loops, and their end.

use std::net::{TcpListener, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;

use super::attachments::Accepting;
use super::bind::{TlsBound, UnixBound};
use super::extension::{AgentProtocol, AgentServer, ShardHandle};
use super::frontend::listener::{self, Service};
use super::frontend::redirect;
use super::shard::{Common, Inbox, Shard};
use super::{ServerError, Tunnel};
use cpc_datapath::socket::prepare_listener;
use cpc_host::lifecycle;
use cpc_transport::quic::error_code;

/// Time for the last packets of a shard's tunnels.
const GOODBYE: Duration = Duration::from_millis(500);

/// Interval between removals of unused destinations from the breaker.
const EXPIRE: Duration = Duration::from_secs(60);

/// Parameters of a starting shard.
pub(super) struct Start {
    /// Index of the shard.
    pub index: usize,
    /// State that all shards share.
    pub common: Common,
    /// Queue of tasks from other shards.
    pub inbox: Inbox,
    /// The tunnel and its socket.
    pub tunnel: Option<(Tunnel, UdpSocket)>,
    /// Listeners of this shard.
    pub listeners: Listeners,
    /// Protocol of the extension's agents.
    pub agents: Option<Arc<dyn AgentProtocol>>,
}

/// Listeners, each of which belongs to one shard.
#[derive(Default)]
pub(super) struct Listeners {
    /// Attachments of the redirect.
    pub accepting: Vec<Accepting>,
    /// Frontends on Unix sockets.
    pub unix: Vec<UnixBound>,
    /// Frontends on TCP with TLS.
    pub tls: Vec<TlsBound>,
    /// Listener of the extension's agents.
    pub agents: Option<TcpListener>,
}

impl Listeners {
    /// Distributes the listeners to `shards`.
    pub(super) fn deal(self, shards: usize) -> Vec<Self> {
        let mut dealt: Vec<_> = (0..shards).map(|_| Self::default()).collect();
        let mut turn = (0..shards).cycle();
        let mut next = || turn.next().unwrap_or_default();
        for accepting in self.accepting {
            dealt[next()].accepting.push(accepting);
        }
        for unix in self.unix {
            dealt[next()].unix.push(unix);
        }
        for tls in self.tls {
            dealt[next()].tls.push(tls);
        }
        dealt[next()].agents = self.agents;
        dealt
    }
}

/// Runs a shard from start to end. `started` receives the result of the start.
pub(super) async fn run(start: Start, started: oneshot::Sender<Result<(), ServerError>>) {
    let phase = start.common.phase.clone();
    let Open { shard, agents } = match open(start) {
        Ok(opened) => opened,
        Err(error) => return drop(started.send(Err(error))),
    };
    let _ = started.send(Ok(()));
    lifecycle::ended(phase).await;
    let reason = match shard.connections.is_closed() {
        true => CloseReason::Shutdown,
        // Some were still open at the deadline.
        false => CloseReason::Drained,
    };
    shard.close_links(reason);
    if let Some(endpoint) = shard.endpoint.take() {
        endpoint.close(error_code(reason), reason.label().as_bytes());
        // For the goodbyes; absent agents get a stateless reset from the next process.
        let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
    }
    if let Some(agents) = agents {
        let _ = timeout(GOODBYE, agents.leave()).await;
    }
}

/// Objects on a shard that must be closed at its end.
struct Open {
    shard: Rc<Shard>,
    agents: Option<Rc<dyn AgentServer>>,
}

fn open(start: Start) -> Result<Open, ServerError> {
    let shard = Shard::new(start.index, start.common, start.tunnel);
    tokio::task::spawn_local(shard.clone().listen(start.inbox));
    let expiring = shard.clone();
    tokio::task::spawn_local(async move {
        loop {
            sleep(EXPIRE).await;
            if !expiring.breaker.borrow().is_empty() {
                expiring.change_breaker(|breaker| breaker.expire(Instant::now()));
            }
        }
    });
    shard.open_tunnels()?;
    for Accepting {
        name,
        scope,
        listeners,
        origins,
        heartbeat,
        listeners_kept,
    } in start.listeners.accepting
    {
        let origins = origins.into();
        let attachment = Rc::new(redirect::Attachment {
            name,
            scope,
            origins,
        });
        let mut prepared = Vec::new();
        for listener in listeners {
            prepare_listener(&listener)?;
            prepared.push(tokio::net::TcpListener::from_std(listener)?);
        }
        let handover = shard.handover.clone();
        let beating = redirect::HeartbeatGuard::new(heartbeat, listeners_kept, handover);
        let serve = redirect::run(shard.clone(), attachment, prepared, beating);
        until_last_call(&shard, serve);
    }
    for UnixBound {
        listener,
        file,
        scope,
        protocol,
    } in start.listeners.unix
    {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let service = Service { scope, protocol };
        let accept = listener::accept_unix(shard.clone(), service, listener, file);
        until_last_call(&shard, accept);
    }
    for TlsBound {
        listener,
        scope,
        protocol,
        tls,
    } in start.listeners.tls
    {
        protocol.prepare(&listener)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let service = Service { scope, protocol };
        let accept = listener::accept_tls(shard.clone(), service, listener, tls);
        until_last_call(&shard, accept);
    }
    let agents = start.agents;
    let agents = agents.map(|protocol| protocol.on_shard(ShardHandle::new(&shard)));
    if let Some(agents) = &agents {
        // Once a shard.
        let _ = shard.agents.set(Rc::downgrade(agents));
        if let Some(listener) = start.listeners.agents {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            until_last_call(&shard, agents.clone().accept(listener));
        }
    }
    Ok(Open { shard, agents })
}

/// Runs an endless task until the process accepts nothing new, and then drops it, its listener first of
/// all. While the process drains no other process would serve new connections.
fn until_last_call(shard: &Shard, task: impl Future<Output = ()> + 'static) {
    let phase = shard.phase.clone();
    tokio::task::spawn_local(async move {
        tokio::select! {
            () = task => {}
            () = lifecycle::last_call(phase) => {}
        }
    });
}
