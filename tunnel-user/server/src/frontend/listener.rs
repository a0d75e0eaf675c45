//! Listeners of frontends: Unix sockets, and TCP with mutual TLS.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::http_connect;
use super::protocol::Protocol;
use super::scope::Scope;
use super::tls::FrontendTls;
use super::unix::{SocketFile, SocketFileState};
use crate::extension::shard::ShardHandle;
use crate::handover::Handover;
use crate::handshakes::{HandshakeFailure, HandshakeLimiter};
use crate::shard::Shard;
use cpc_datapath::socket::TlsSocket;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::report::report;
use cpc_host::source_limiter::HandshakePermit;
use cpc_identity::revoked::Peer;
use cpc_observe::audit::events::{self as audit, Listener};

/// Timeout of a client's TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Clients and protocol of a listener.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// Tenant and allow-list of the clients.
    pub scope: Arc<Scope>,
    /// Protocol of the listener.
    pub protocol: Protocol,
}

impl Service {
    /// Serves a client without TLS: here, until its link is known. A client that can't move later goes
    /// to the next shard in turn.
    fn take_unix(&self, shard: &Rc<Shard>, socket: UnixStream) -> io::Result<()> {
        let scope = self.scope.clone();
        match &self.protocol {
            Protocol::HttpConnect(refusals) => {
                let served =
                    http_connect::connection(shard.clone(), scope, *refusals, None, socket);
                tokio::task::spawn_local(served);
            }
            Protocol::Foreign(protocol) => {
                let (protocol, socket) = (protocol.clone(), socket.into_std()?);
                shard.run_on(shard.turn(), move |shard| async move {
                    match UnixStream::from_std(socket) {
                        Ok(socket) => {
                            let shard = ShardHandle::new(&shard);
                            protocol.serve_unix(shard, scope, socket).await;
                        }
                        Err(error) => {
                            tracing::warn!(error = report(&error), "client not taken over");
                        }
                    }
                });
            }
        }
        Ok(())
    }

    /// Serves a client with TLS, whose handshake is work for the next shard in turn.
    fn take_tls(
        &self,
        shard: &Rc<Shard>,
        (socket, client): (TcpStream, SocketAddr),
        (acceptor, limiter, stranger): (TlsAcceptor, HandshakeLimiter, HandshakePermit),
    ) -> io::Result<()> {
        let (service, socket) = (self.clone(), socket.into_std()?);
        shard.run_on(shard.turn(), move |shard| async move {
            let secured = async { acceptor.accept(TcpStream::from_std(socket)?).await };
            let known = timeout(HANDSHAKE, secured).await;
            let Ok(Ok(session)) = known else {
                stranger.charge(Instant::now());
                return unknown(&limiter, client, known.map(|known| known.map(drop)));
            };
            drop(stranger);
            service.serve_tls(shard, client, session);
        });
        Ok(())
    }

    /// Serves a client in a task of its own, which does not keep the memory of the handshake.
    fn serve_tls(self, shard: Rc<Shard>, client: SocketAddr, session: TlsStream<TcpStream>) {
        let certificates = session.get_ref().1.peer_certificates();
        let peer = certificates.and_then(|chain| chain.first()).map(Peer::of);
        let peer = peer.unwrap_or_default();
        let revocations = shard.revocations.clone();
        let cut = async move {
            let revoked = revocations.on_revocation(&peer).await;
            tracing::warn!(%client, why = %revoked, "client's connection is ended");
            audit::cut("client", client, &revoked);
        };
        let scope = self.scope;
        match self.protocol {
            Protocol::HttpConnect(refusals) => {
                let local = TlsSocket::new(session, cut);
                let served = http_connect::connection(shard, scope, refusals, Some(client), local);
                tokio::task::spawn_local(served);
            }
            Protocol::Foreign(protocol) => {
                let shard = ShardHandle::new(&shard);
                let served = protocol.serve_tls(shard, scope, client, session);
                tokio::task::spawn_local(async move {
                    tokio::select! {
                        () = served => {}
                        () = cut => {}
                    }
                });
            }
        }
    }
}

/// Counts and logs a failed handshake.
fn unknown(limiter: &HandshakeLimiter, client: SocketAddr, known: Result<io::Result<()>, Elapsed>) {
    match known {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            limiter.failed(HandshakeFailure::Tls);
            tracing::warn!(%client, error = report(&error), "frontend handshake failed");
            audit::peer_refused(Listener::Frontend, client, &error);
        }
        Err(_) => {
            limiter.failed(HandshakeFailure::Timeout);
            tracing::warn!(%client, "frontend handshake not finished in time");
            audit::peer_refused(
                Listener::Frontend,
                client,
                &io::Error::from(io::ErrorKind::TimedOut),
            );
        }
    }
}

/// Accepts on a Unix socket without end, and creates its file again when that is gone.
pub(crate) async fn accept_unix(
    shard: Rc<Shard>,
    service: Service,
    mut listener: UnixListener,
    file: SocketFile,
) {
    let handover = shard.handover.clone();
    let mut file = OwnedFile { file, handover };
    let mut fate = SocketFileState::There;
    loop {
        // After a handover the file is the successor's.
        let changed = { &shard.handover }.accept(async || file.file.changed(fate).await);
        let taken = tokio::select! {
            accepted = { &shard.handover }.accept(async || listener.accept().await) => match accepted {
                Ok((socket, _)) => service.take_unix(&shard, socket),
                Err(error) => Err(error),
            },
            changed = changed => {
                fate = changed;
                if let Some(other) = restore(&shard, &mut file.file, &mut fate) {
                    // Who waits at the old one is served.
                    while let Some(Ok((socket, _))) = listener.accept().now_or_never() {
                        if let Err(error) = service.take_unix(&shard, socket) {
                            tracing::warn!(error = report(&error), "client not taken over");
                        }
                    }
                    listener = other;
                }
                continue;
            }
        };
        if let Err(error) = taken {
            let protocol = &service.protocol;
            let name = format!("{} unix", protocol.name());
            after_failed_accept(&listener, &name, &error, &protocol.no_descriptor()).await;
        }
    }
}

/// The file of a Unix socket, which a successor needs.
struct OwnedFile {
    file: SocketFile,
    handover: Handover,
}

impl Drop for OwnedFile {
    fn drop(&mut self) {
        if self.handover.is_collecting() {
            self.file.leave();
        }
    }
}

/// Repairs the file of a frontend where possible. Returns a new listener, if there is one. A fault that
/// remains shows in readiness.
fn restore(
    shard: &Shard,
    file: &mut SocketFile,
    fate: &mut SocketFileState,
) -> Option<UnixListener> {
    let path = file.path().display().to_string();
    let why = match fate {
        SocketFileState::There => {
            tracing::info!(path, "the frontend's socket is there again");
            shard.faults.clear(&path);
            return None;
        }
        SocketFileState::Taken => "another process has put its own in its place".to_owned(),
        SocketFileState::Gone => match file.make_again().and_then(UnixListener::from_std) {
            Ok(listener) => {
                tracing::warn!(path, "the frontend's socket was removed, and is made again");
                shard.faults.clear(&path);
                *fate = SocketFileState::There;
                return Some(listener);
            }
            Err(error) => format!(
                "it was removed, and can't be made again: {}",
                report(&error)
            ),
        },
    };
    let trouble = format!("the frontend's socket {path} is not there: {why}");
    if shard.faults.set(&path, trouble) {
        tracing::error!(
            path,
            why,
            "no client reaches a frontend: its socket is not there"
        );
    }
    None
}

/// Accepts on TCP without end. Clients with a certificate may connect without limit: only failed
/// handshakes count against their source.
pub(crate) async fn accept_tls(
    shard: Rc<Shard>,
    service: Service,
    listener: TcpListener,
    tls: FrontendTls,
) {
    let failures = shard.metrics.frontend_handshakes.clone();
    let handshakes = shard.limits.handshakes.at_most(shard.shares.handshakes);
    let limiter = HandshakeLimiter::new(&handshakes, failures);
    loop {
        let accepted = { &shard.handover }.accept(async || listener.accept().await);
        let taken = match accepted.await {
            Ok(accepted) => match limiter.admit(accepted.1.ip()) {
                Ok(stranger) => {
                    let tls = (tls.acceptor(), limiter.clone(), stranger);
                    service.take_tls(&shard, accepted, tls)
                }
                // Dropped with its socket at the bound.
                Err(why) => {
                    let (_, client) = accepted;
                    limiter.failed(why.into());
                    tracing::warn!(%client, %why, "client's connection is reset");
                    Ok(())
                }
            },
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            // Before TLS there is nothing to say.
            let name = format!("{} tcp", service.protocol.name());
            after_failed_accept(&listener, &name, &error, b"").await;
        }
    }
}
