//! Where frontends listen: on Unix sockets, and on TCP with mutual TLS.

use std::fs;
use std::io;
use std::net::TcpListener as StdTcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::tls::FrontendTls;
use super::{accept_failed, grpc, http_connect};
use crate::config::frontend::{Answers, UnixFrontend};
use crate::datapath::socket::{TlsSocket, prepare_listener};
use crate::process::gate::Gate;
use crate::server::shard::Shard;
use crate::tls::{TlsFloor, TlsVersion, TrustDomain};
use crate::transport::grpc::{ALPN, AnyAuthority, tcp};

/// A client that has not finished its TLS handshake by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// TLS handshakes under way at once on one frontend.
const MAX_STRANGERS: usize = 1024;

/// What is spoken at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Protocol {
    /// HTTP CONNECT, and how it is refused.
    HttpConnect(Answers),
    /// Konnectivity's `ProxyService`.
    Grpc,
}

impl Protocol {
    /// Its name in logs.
    fn name(self) -> &'static str {
        match self {
            Self::HttpConnect(_) => "http_connect",
            Self::Grpc => "grpc",
        }
    }

    /// Prepares a listener, whose accepted sockets inherit it.
    ///
    /// # Errors
    /// What the system says.
    pub(in crate::server) fn prepare(self, listener: &StdTcpListener) -> io::Result<()> {
        match self {
            Self::HttpConnect(_) => prepare_listener(listener),
            Self::Grpc => tcp::prepare(listener),
        }
    }

    /// What TLS is accepted unless something is configured.
    pub(super) fn floor(self) -> TlsFloor {
        let min_version = match self {
            Self::HttpConnect(_) => TlsVersion::Tls13,
            // As its clients know it from Konnectivity.
            Self::Grpc => TlsVersion::Tls12,
        };
        TlsFloor {
            min_version,
            ..TlsFloor::default()
        }
    }

    /// What TLS is told of it (ALPN).
    pub(super) fn alpn(self) -> Vec<Vec<u8>> {
        match self {
            Self::HttpConnect(_) => Vec::new(),
            Self::Grpc => vec![ALPN.to_vec()],
        }
    }
}

/// Makes the socket of a Unix frontend. One left by a process that is gone is replaced; one that
/// answers is not, unless it is to be taken over.
///
/// # Errors
/// What the system says.
pub(in crate::server) fn bind_unix(config: &UnixFrontend) -> io::Result<StdUnixListener> {
    let path = &config.unix;
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if !config.takeover && std::os::unix::net::UnixStream::connect(path).is_ok() {
            let text = format!("{} is served by another process", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        fs::remove_file(path)?;
    }
    // Under another name until its mode is right: nobody can connect before.
    let aside = aside(path);
    let _ = fs::remove_file(&aside);
    let listener = StdUnixListener::bind(&aside)?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(config.mode))?;
    fs::rename(&aside, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Who is served at a listener, and how.
pub(in crate::server) struct Service {
    /// Where.
    pub shard: Rc<Shard>,
    /// The tenant that callers are.
    pub tenant: TrustDomain,
    /// What they speak.
    pub protocol: Protocol,
}

impl Service {
    async fn unix(&self, socket: UnixStream) {
        match self.protocol {
            Protocol::HttpConnect(answers) => {
                http_connect::connection(&self.shard, &self.tenant, answers, None, socket).await;
            }
            Protocol::Grpc => {
                let socket = AnyAuthority::new(socket);
                grpc::connection(&self.shard, &self.tenant, None, socket).await;
            }
        }
    }

    async fn tls(&self, client: String, session: TlsStream<TcpStream>) {
        let client = Some(client);
        match self.protocol {
            Protocol::HttpConnect(answers) => {
                let local = TlsSocket::new(session);
                http_connect::connection(&self.shard, &self.tenant, answers, client, local).await;
            }
            Protocol::Grpc => grpc::connection(&self.shard, &self.tenant, client, session).await,
        }
    }
}

/// Accepts on a Unix socket for ever.
pub(in crate::server) async fn accept_unix(service: Rc<Service>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let service = service.clone();
                tokio::task::spawn_local(async move { service.unix(socket).await });
            }
            Err(error) => {
                let name = format!("{} unix", service.protocol.name());
                accept_failed(&name, &error).await;
            }
        }
    }
}

/// Accepts on TCP for ever.
pub(in crate::server) async fn accept_tls(
    service: Rc<Service>,
    listener: TcpListener,
    tls: FrontendTls,
) {
    let strangers = Gate::new(MAX_STRANGERS);
    loop {
        match listener.accept().await {
            Ok((socket, client)) => {
                // Dropped with its socket at the bound.
                let Some(stranger) = strangers.enter() else {
                    tracing::warn!(%client, "too many handshakes at once, connection is reset");
                    continue;
                };
                let service = service.clone();
                let acceptor = tls.acceptor();
                tokio::task::spawn_local(async move {
                    let client = client.to_string();
                    let known = timeout(HANDSHAKE, acceptor.accept(socket)).await;
                    drop(stranger);
                    match known {
                        Ok(Ok(session)) => service.tls(client, session).await,
                        Ok(Err(error)) => {
                            tracing::warn!(client, %error, "frontend handshake failed");
                        }
                        Err(_) => tracing::warn!(client, "frontend handshake not finished in time"),
                    }
                });
            }
            Err(error) => {
                let name = format!("{} tcp", service.protocol.name());
                accept_failed(&name, &error).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::version::{TLS12, TLS13};

    use super::*;

    #[test]
    fn tls_before_1_3_is_for_grpc() {
        let versions = |protocol: Protocol| protocol.floor().accepted().unwrap().versions;
        for answers in [Answers::Detailed, Answers::Konnectivity] {
            assert_eq!(versions(Protocol::HttpConnect(answers)), [&TLS13]);
        }
        assert_eq!(versions(Protocol::Grpc), [&TLS13, &TLS12]);
    }
}
