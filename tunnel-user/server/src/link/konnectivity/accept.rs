//! Taking agents in: connections, their bounds, and the calls on them.

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

use super::door::Door;
use super::session;
use crate::doorstep::Why;
use crate::shard::Shard;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::gate::Gate;
use cpc_host::report::report;
use cpc_host::sources::Place;
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_transport::grpc::server::{ServeError, serve};
use cpc_transport::grpc::{Settings, tcp};

/// A peer that has not finished TLS by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection without a call is ended after that, or after twice that at most.
const UNUSED: Duration = Duration::from_secs(15);

/// Bytes that may wait in the kernel to be sent: what stands before a packet delays it.
const UNSENT: u32 = 128 << 10;

/// How often is looked whether all connections have ended.
const LEAVE_POLL: Duration = Duration::from_millis(10);

/// The agents of one shard.
pub(crate) struct Agents {
    pub(super) shard: Rc<Shard>,
    pub(super) door: Door,
    settings: Settings,
    connections: Gate,
    ending: Notify,
}

/// A connection that agents may call on.
pub(super) struct Peer {
    /// Where it comes from.
    pub remote: SocketAddr,
    /// Its verified certificate.
    pub certificate: Option<CertificateDer<'static>>,
    /// The socket, to be looked at.
    pub socket: Arc<OwnedFd>,
    /// Its calls.
    pub calls: Gate,
    /// Given back with the first agent.
    stranger: RefCell<Option<Place>>,
}

impl Peer {
    /// An agent has come of it.
    pub(super) fn is_known(&self) {
        self.stranger.take();
    }
}

impl Agents {
    /// None yet.
    pub(crate) fn new(shard: Rc<Shard>, door: Door) -> Rc<Self> {
        let settings = Settings {
            keepalive: Some(door.keepalive),
            // An agent needs one; a stranger may fill its window.
            streams: 1,
            ..Settings::AGENT
        };
        let agents = Rc::new(Self {
            shard,
            door,
            settings,
            connections: Gate::new(usize::MAX),
            ending: Notify::new(),
        });
        // Once a shard.
        let _ = agents.shard.agents.set(Rc::downgrade(&agents));
        agents
    }

    /// Ends the connections whose streams have ended, and waits until all have.
    pub(crate) async fn leave(&self) {
        self.ending.notify_waiters();
        while self.connections.inside() > 0 {
            sleep(LEAVE_POLL).await;
        }
    }

    /// Accepts for ever.
    pub(crate) async fn accept(self: Rc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((socket, remote)) => match self.door.step.enter(remote.ip()) {
                    Ok(stranger) => {
                        stranger.charge(Instant::now());
                        self.deal(socket, remote, stranger);
                    }
                    Err(why) => {
                        self.door.step.failed(why.into());
                        tracing::warn!(%remote, %why, "agent's connection is closed");
                    }
                },
                Err(error) => after_failed_accept(&listener, "konnectivity", &error, b"").await,
            }
        }
    }

    /// Gives a stranger to the shard whose turn it is: his links will live there.
    fn deal(&self, socket: TcpStream, remote: SocketAddr, stranger: Place) {
        let Ok(socket) = socket.into_std() else {
            return;
        };
        self.shard
            .run_on(self.shard.turn(), move |shard| async move {
                let agents = shard.agents.get().and_then(Weak::upgrade);
                if let (Some(agents), Ok(socket)) = (agents, TcpStream::from_std(socket)) {
                    agents.serve(socket, remote, stranger).await;
                }
            });
    }

    /// Serves one connection to its end.
    async fn serve(self: Rc<Self>, socket: TcpStream, remote: SocketAddr, stranger: Place) {
        let _counted = self.connections.enter();
        // Not while we drain: an agent drops a server that says so, with all its connections.
        let ending = self.ending.notified();
        let failed = |why, error: &(dyn Error + 'static)| {
            self.door.step.failed(why);
            tracing::warn!(%remote, error = report(error), "agent's handshake failed");
            audit::peer_refused(Listener::Konnectivity, remote, error);
        };
        let secured = async {
            let watched = Arc::new(watched(&socket)?);
            let tls = self.door.tls.acceptor().accept(socket).await?;
            Ok::<_, io::Error>((tls, watched))
        };
        let (tls, socket) = match timeout(HANDSHAKE_TIMEOUT, secured).await {
            Ok(Ok(secured)) => secured,
            Ok(Err(error)) => return failed(Why::Tls, &error),
            Err(_) => return failed(Why::Timeout, &io::Error::from(io::ErrorKind::TimedOut)),
        };
        let certificates = tls.get_ref().1.peer_certificates();
        let peer = Rc::new(Peer {
            remote,
            certificate: certificates.and_then(|chain| chain.first()).cloned(),
            socket,
            calls: Gate::new(self.settings.streams as usize),
            stranger: RefCell::new(Some(stranger)),
        });
        let on_call = |call| {
            // HTTP/2 bounds them by the same number.
            if let Some(entered) = peer.calls.enter() {
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
                Err(error @ ServeError::Handshake) => failed(Why::Timeout, &error),
                Err(error) => tracing::debug!(%remote, error = report(&error), "agent's connection ended"),
                Ok(()) => {}
            },
            () = unused(&peer.calls) => tracing::debug!(%remote, "connection without a call ends"),
        }
    }
}

/// Prepares a socket, and returns it once more, to be looked at.
fn watched(socket: &TcpStream) -> io::Result<OwnedFd> {
    tcp::prepare(socket)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT)?;
    socket.as_fd().try_clone_to_owned()
}

/// Waits until a connection has stood there without a call.
async fn unused(calls: &Gate) {
    loop {
        sleep(UNUSED).await;
        if calls.inside() == 0 {
            return;
        }
    }
}
