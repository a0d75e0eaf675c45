//! Acceptance of agents: connections, their bounds, and the calls on them.

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tunnel_proto::konnectivity::CONNECT;

use super::acceptor::Acceptor;
use super::session;
use crate::handshakes::HandshakeFailure;
use crate::shard::{AgentServer, Shard};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::report::report;
use cpc_host::source_limiter::HandshakePermit;
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_transport::grpc::server::{ServeError, serve};
use cpc_transport::grpc::{Settings, tcp};

/// Timeout of a peer's TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time after which a connection without a call is ended; twice that at most.
const UNUSED: Duration = Duration::from_secs(15);

/// Maximum number of unsent bytes in the kernel: bytes ahead of a packet delay it.
const UNSENT: u32 = 128 << 10;

/// Polling interval for the end of all connections.
const LEAVE_POLL: Duration = Duration::from_millis(10);

/// Agents of one shard.
pub(crate) struct Agents {
    pub(super) shard: Rc<Shard>,
    pub(super) acceptor: Acceptor,
    settings: Settings,
    connections: ConcurrencyLimit,
    ending: Notify,
}

/// A connection on which agents may call.
pub(super) struct Peer {
    /// Address of the peer.
    pub remote: SocketAddr,
    /// Verified certificate of the peer.
    pub certificate: Option<CertificateDer<'static>>,
    /// The socket, for its statistics.
    pub socket: Arc<OwnedFd>,
    /// Number of calls.
    pub calls: ConcurrencyLimit,
    /// Permit of the handshake, returned with the first agent.
    stranger: RefCell<Option<HandshakePermit>>,
}

impl Peer {
    /// Notes that the connection has an agent.
    pub(super) fn is_known(&self) {
        self.stranger.take();
    }
}

impl Agents {
    /// Creates an empty set.
    pub(crate) fn new(shard: Rc<Shard>, acceptor: Acceptor) -> Rc<Self> {
        let settings = Settings {
            keepalive: Some(acceptor.keepalive),
            // An agent needs one; a stranger may fill its window.
            streams: 1,
            ..Settings::AGENT
        };
        let agents = Rc::new(Self {
            shard,
            acceptor,
            settings,
            connections: ConcurrencyLimit::new(usize::MAX),
            ending: Notify::new(),
        });
        // Once a shard.
        let server: Weak<dyn AgentServer> = Rc::<Self>::downgrade(&agents);
        let _ = agents.shard.agents.set(server);
        agents
    }

    /// Ends the connections whose streams have ended, and waits until all have.
    pub(crate) async fn leave(&self) {
        self.ending.notify_waiters();
        while self.connections.in_use() > 0 {
            sleep(LEAVE_POLL).await;
        }
    }

    /// Accepts without end.
    pub(crate) async fn accept(self: Rc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((socket, remote)) => match self.acceptor.handshakes.admit(remote.ip()) {
                    Ok(stranger) => {
                        stranger.charge(Instant::now());
                        self.deal(socket, remote, stranger);
                    }
                    Err(why) => {
                        self.acceptor.handshakes.failed(why.into());
                        tracing::warn!(%remote, %why, "agent's connection is closed");
                    }
                },
                Err(error) => after_failed_accept(&listener, "konnectivity", &error, b"").await,
            }
        }
    }

    /// Gives a new connection to the next shard in turn: its links will live there.
    fn deal(&self, socket: TcpStream, remote: SocketAddr, stranger: HandshakePermit) {
        let Ok(socket) = socket.into_std() else {
            return;
        };
        self.shard
            .run_on(self.shard.turn(), move |shard| async move {
                let agents = shard.agents.get().and_then(Weak::upgrade);
                if let (Some(agents), Ok(socket)) = (agents, TcpStream::from_std(socket)) {
                    agents.take(socket, remote, stranger);
                }
            });
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
            self.acceptor.handshakes.failed(why);
            tracing::warn!(%remote, error = report(error), "agent's handshake failed");
            audit::peer_refused(Listener::Konnectivity, remote, error);
        };
        let secured = async {
            let watched = Arc::new(watched(&socket)?);
            let tls = self.acceptor.tls.acceptor().accept(socket).await?;
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
                let session = session::serve(self.clone(), peer.clone(), call);
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
    fn take(self: Rc<Self>, socket: TcpStream, remote: SocketAddr, permit: HandshakePermit) {
        tokio::task::spawn_local(self.serve(socket, remote, permit));
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
