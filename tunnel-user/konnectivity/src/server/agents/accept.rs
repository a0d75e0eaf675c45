//! Acceptance of agents: connections, their bounds, and the calls on them.

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tunnel_proto::konnectivity::CONNECT;

use super::acceptor::Acceptor;
use super::peer::{Context, Peer};
use super::session;
use crate::grpc::server::{ServeError, serve};
use crate::grpc::{Settings, tcp};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::report::report;
use cpc_host::source_limiter::HandshakePermit;
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_server::extension::{AgentServer, HandshakeFailure, ShardHandle};

/// Timeout of a peer's TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time after which a connection without a call is ended; twice that at most.
const UNUSED: Duration = Duration::from_secs(15);

/// Maximum number of unsent bytes in the kernel: bytes ahead of a packet delay it.
const UNSENT: u32 = 128 << 10;

/// Polling interval for the end of all connections.
const LEAVE_POLL: Duration = Duration::from_millis(10);

/// Agents of one shard.
pub(super) struct Agents {
    context: Rc<Context>,
    settings: Settings,
    connections: ConcurrencyLimit,
    ending: Notify,
}

impl Agents {
    /// Creates an empty set.
    pub(super) fn new(shard: ShardHandle, acceptor: Acceptor) -> Self {
        let settings = Settings {
            keepalive: Some(acceptor.keepalive),
            // An agent needs one; a stranger may fill its window.
            streams: 1,
            ..Settings::AGENT
        };
        Self {
            context: Rc::new(Context { shard, acceptor }),
            settings,
            connections: ConcurrencyLimit::new(usize::MAX),
            ending: Notify::new(),
        }
    }

    async fn accept_all(self: Rc<Self>, listener: TcpListener) {
        let Context { shard, acceptor } = &*self.context;
        loop {
            match listener.accept().await {
                Ok((socket, remote)) => match acceptor.handshakes.admit(remote.ip()) {
                    Ok(stranger) => {
                        stranger.charge(Instant::now());
                        shard.deal_agent(socket, remote, stranger);
                    }
                    Err(why) => {
                        acceptor.handshakes.failed(why.into());
                        tracing::warn!(%remote, %why, "agent's connection is closed");
                    }
                },
                Err(error) => after_failed_accept(&listener, "konnectivity", &error, b"").await,
            }
        }
    }

    /// Serves one connection to its end.
    async fn serve(
        self: Rc<Self>,
        socket: TcpStream,
        remote: SocketAddr,
        stranger: HandshakePermit,
    ) {
        let _counted = self.connections.acquire();
        // Not while we drain: an agent drops a server that says so, with all its connections.
        let ending = self.ending.notified();
        let failed = |why, error: &(dyn Error + 'static)| {
            self.context.acceptor.handshakes.failed(why);
            tracing::warn!(%remote, error = report(error), "agent's handshake failed");
            audit::peer_refused(Listener::Konnectivity, remote, error);
        };
        let secured = async {
            let watched = Arc::new(watched(&socket)?);
            let tls = self.context.acceptor.tls.acceptor().accept(socket).await?;
            Ok::<_, io::Error>((tls, watched))
        };
        let (tls, socket) = match timeout(HANDSHAKE_TIMEOUT, secured).await {
            Ok(Ok(secured)) => secured,
            Ok(Err(error)) => return failed(HandshakeFailure::Tls, &error),
            Err(_) => {
                return failed(
                    HandshakeFailure::Timeout,
                    &io::Error::from(io::ErrorKind::TimedOut),
                );
            }
        };
        let certificates = tls.get_ref().1.peer_certificates();
        let peer = Rc::new(Peer {
            remote,
            certificate: certificates.and_then(|chain| chain.first()).cloned(),
            socket,
            calls: ConcurrencyLimit::new(self.settings.streams as usize),
            stranger: RefCell::new(Some(stranger)),
        });
        let on_call = |call| {
            // HTTP/2 bounds them by the same number.
            if let Some(entered) = peer.calls.acquire() {
                let session = session::serve(self.context.clone(), peer.clone(), call);
                tokio::task::spawn_local(async move {
                    session.await;
                    drop(entered);
                });
            }
        };
        let served = serve(tls, &self.settings, CONNECT, ending, on_call);
        tokio::select! {
            served = served => match served {
                Err(error @ ServeError::Handshake) => failed(HandshakeFailure::Timeout, &error),
                Err(error) => tracing::debug!(%remote, error = report(&error), "agent's connection ended"),
                Ok(()) => {}
            },
            () = unused(&peer.calls) => tracing::debug!(%remote, "connection without a call ends"),
        }
    }
}

impl AgentServer for Agents {
    fn accept(self: Rc<Self>, listener: TcpListener) -> LocalBoxFuture<'static, ()> {
        Box::pin(self.accept_all(listener))
    }

    fn take(self: Rc<Self>, socket: TcpStream, remote: SocketAddr, permit: HandshakePermit) {
        tokio::task::spawn_local(self.serve(socket, remote, permit));
    }

    fn leave(self: Rc<Self>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            self.ending.notify_waiters();
            while self.connections.in_use() > 0 {
                sleep(LEAVE_POLL).await;
            }
        })
    }
}

/// Prepares a socket, and returns a duplicate for statistics.
fn watched(socket: &TcpStream) -> io::Result<OwnedFd> {
    tcp::prepare(socket)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT)?;
    socket.as_fd().try_clone_to_owned()
}

/// Waits until a connection has been without a call for too long.
async fn unused(calls: &ConcurrencyLimit) {
    loop {
        sleep(UNUSED).await;
        if calls.in_use() == 0 {
            return;
        }
    }
}
