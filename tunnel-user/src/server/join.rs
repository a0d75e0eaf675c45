//! The join listener: TLS over TCP without client certificates, one request, one answer.
//!
//! Strangers reach it. So few are served at a time, each for a few seconds, and what is read of one is
//! bounded before it is read.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tunnel_proto::certificate::Join;
use tunnel_proto::join::{self, Reader};

use super::ServerError;
use crate::config::ServerConfig;
use crate::join::desk::Pods;
use crate::join::metrics::Outcome;
use crate::join::{Book, Desk, JoinMetrics};
use crate::kubernetes::{self, token::TokenReviewer};
use crate::telemetry::audit::events as audit;
use crate::tls::issue::Authority;
use crate::tls::{Identity, Material, provider};

/// Strangers at once; further ones wait in the backlog.
const MAX_STRANGERS: usize = 64;

/// How long one may take, the review of a token of Kubernetes included.
const PATIENCE: Duration = Duration::from_secs(15);

/// After an accept that failed, for want of file descriptors most likely.
const REST: Duration = Duration::from_millis(100);

/// Opens the desk, where one is configured.
///
/// # Errors
/// [`ServerError`]: the CA or the book can't be read, or the CA is of another trust domain than we.
pub(super) async fn desk(
    config: &ServerConfig,
    identity: &Identity,
    material: Option<&Arc<Material>>,
) -> Result<Option<Arc<Desk>>, ServerError> {
    let (Some(config), Some(material), directory) =
        (&config.join, material, config.join_directory())
    else {
        return Ok(None);
    };
    let authority = Authority::open(&config.ca)?;
    if *authority.trust_domain() != identity.trust_domain {
        return Err(ServerError::JoinDomain {
            ca: authority.trust_domain().clone(),
            own: identity.trust_domain.clone(),
        });
    }
    let pods = match &config.kubernetes {
        Some(pods) => {
            let client = kubernetes::client(&pods.access()).await?;
            Some(Pods {
                reviewer: TokenReviewer::new(client, pods.rules()),
                addresses: pods.addresses.clone(),
            })
        }
        None => None,
    };
    Ok(Some(Arc::new(Desk {
        book: Book::open(&directory)?,
        ca: config.ca.clone(),
        validity: config.validity,
        material: material.clone(),
        revocations: material.revocations(),
        pods,
        metrics: JoinMetrics::default(),
    })))
}

/// Shows our certificate and, behind it, the CAs that vouch for us: whoever joins knows one of them by
/// its hash.
#[derive(Debug)]
struct WithRoots(Arc<Material>);

impl ResolvesServerCert for WithRoots {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let own = self.0.key();
        let chain = own.cert.iter().cloned().chain(self.0.roots());
        let key = CertifiedKey::new(chain.collect(), own.key.clone());
        Some(Arc::new(key))
    }
}

fn acceptor(material: &Arc<Material>) -> Result<TlsAcceptor, rustls::Error> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(WithRoots(material.clone())));
    tls.alpn_protocols = vec![join::ALPN.to_vec()];
    // A ticket would be of no use to anybody.
    tls.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

/// Serves for ever.
///
/// # Errors
/// At once, when the listener or TLS can't be had.
pub(super) async fn serve(listener: TcpListener, desk: Arc<Desk>) -> Result<(), ServerError> {
    let acceptor = acceptor(&desk.material).map_err(io::Error::other)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(MAX_STRANGERS));
        loop {
            // The semaphore is never closed, so there always is a permit in the end.
            let place = room.clone().acquire_owned().await.ok();
            let (socket, remote) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "no connection accepted for a join");
                    sleep(REST).await;
                    continue;
                }
            };
            let (acceptor, desk) = (acceptor.clone(), desk.clone());
            tokio::spawn(async move {
                let _place = place;
                let served = timeout(PATIENCE, one(acceptor, &desk, socket, remote)).await;
                let late = || io::Error::from(io::ErrorKind::TimedOut);
                if let Err(error) = served.unwrap_or_else(|_| Err(late())) {
                    desk.metrics.join(Outcome::Failed);
                    tracing::debug!(%remote, %error, "nobody joined");
                    audit::peer_refused(remote, &error);
                }
            });
        }
    });
    Ok(())
}

async fn one(
    acceptor: TlsAcceptor,
    desk: &Arc<Desk>,
    socket: TcpStream,
    remote: SocketAddr,
) -> io::Result<()> {
    let mut session = acceptor.accept(socket).await?;
    let asked = request(&mut session).await?;
    let answer = desk.join(asked, remote).await;
    let answer = join::answer(&answer).map_err(io::Error::other)?;
    session.write_all(&answer).await?;
    session.shutdown().await
}

async fn request(session: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Join> {
    let (mut reader, mut room) = (Reader::default(), [0; 4096]);
    loop {
        let read = session.read(&mut room).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let asked = reader.request(&room[..read]).map_err(io::Error::other)?;
        if let Some(join) = asked {
            return Ok(join);
        }
    }
}
