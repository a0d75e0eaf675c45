//! The join listener: TLS over TCP without client certificates, one request, one answer.
//!
//! Unauthenticated peers reach it. So it serves few at a time, each for a few seconds, and bounds each
//! read in advance.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tunnel_proto::certificate::Join;
use tunnel_proto::join::{self, Reader};

use super::ServerError;
use super::handshakes::{FailureCounters, HandshakeFailure, HandshakeLimiter};
use cpc_config::ServerConfig;
use cpc_config::server::HandshakesConfig;
use cpc_host::descriptors::after_failed_accept;
use cpc_host::report::report;
use cpc_identity::issue::Authority;
use cpc_identity::join::clock::Clock;
use cpc_identity::join::issuer::{Jobs, Pods};
use cpc_identity::join::metrics::Outcome;
use cpc_identity::join::{IssueLog, Issuer, JoinMetrics};
use cpc_identity::{Identity, Material, pem, provider};
use cpc_kubernetes::{node::Nodes, token::TokenReviewer};
use cpc_observe::audit::events::{self as audit, Listener};

/// Maximum number of concurrent peers, or `limits.handshakes.at_once` where that is less.
const MAX_STRANGERS: usize = 256;

/// Timeout of one peer, including the review of a token of Kubernetes.
const PATIENCE: Duration = Duration::from_secs(15);

/// Opens the issuer, where one is configured.
///
/// # Errors
/// [`ServerError`]: the CA or the file of tokens can't be read, or the CA belongs to another trust
/// domain.
pub(super) async fn issuer(
    config: &ServerConfig,
    identity: &Identity,
    material: Option<&Arc<Material>>,
) -> Result<Option<Arc<Issuer>>, ServerError> {
    let (Some(config), Some(material), directory) =
        (&config.join, material, config.join_directory())
    else {
        return Ok(None);
    };
    let authority = Authority::open(&config.ca)?;
    pem::warn_if_exposed(&config.ca.join("ca.key"));
    if *authority.trust_domain() != identity.trust_domain {
        return Err(ServerError::JoinDomain {
            ca: authority.trust_domain().clone(),
            own: identity.trust_domain.clone(),
        });
    }
    let pods = match &config.kubernetes {
        Some(pods) => {
            let client = cpc_kubernetes::client(&pods.access()).await?;
            Some(Pods {
                reviewer: TokenReviewer::new(client.clone(), pods.rules()),
                nodes: Nodes::new(client),
                addresses: pods.addresses.clone(),
            })
        }
        None => None,
    };
    let log = IssueLog::open(&directory)?;
    Ok(Some(Arc::new(Issuer {
        clock: Clock::resume(log.read()?.settled),
        log,
        ca: config.ca.clone(),
        validity: config.validity,
        material: material.clone(),
        revocations: material.revocations(),
        pods,
        metrics: JoinMetrics::default(),
        jobs: Jobs::default(),
    })))
}

/// A resolver that shows our certificate and, behind it, the CAs that vouch for it: a joining worker
/// knows one of them by its hash.
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
    // A session ticket would be of no use.
    tls.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

/// Creates the limiter of the listener: each peer costs a handshake and a place, token or not.
pub(super) fn limiter(limits: &HandshakesConfig, failures: FailureCounters) -> HandshakeLimiter {
    let limits = HandshakesConfig {
        at_once: limits.at_once.min(MAX_STRANGERS),
        ..limits.clone()
    };
    HandshakeLimiter::new(&limits, failures)
}

/// Serves without end.
///
/// # Errors
/// At once, when the listener or TLS can't be set up.
pub(super) async fn serve(
    listener: TcpListener,
    issuer: Arc<Issuer>,
    limiter: HandshakeLimiter,
) -> Result<(), ServerError> {
    let acceptor = acceptor(&issuer.material).map_err(io::Error::other)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tokio::spawn(issuer.clone().keep_time());
    tokio::spawn(async move {
        loop {
            let (socket, remote) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    after_failed_accept(&listener, "join", &error, b"").await;
                    continue;
                }
            };
            let place = match limiter.admit(remote.ip()) {
                Ok(place) => place,
                // Dropped with its socket at the bound.
                Err(why) => {
                    limiter.failed(why.into());
                    tracing::warn!(%remote, %why, "connection to the join listener is dropped");
                    continue;
                }
            };
            place.charge(Instant::now());
            let (acceptor, issuer, limiter) = (acceptor.clone(), issuer.clone(), limiter.clone());
            tokio::spawn(async move {
                let served = timeout(PATIENCE, one(acceptor, &issuer, socket, remote)).await;
                drop(place);
                let (why, error) = match served {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => (HandshakeFailure::Tls, error),
                    Err(_) => (HandshakeFailure::Timeout, io::ErrorKind::TimedOut.into()),
                };
                issuer.metrics.join(Outcome::Failed);
                limiter.failed(why);
                tracing::warn!(%remote, error = report(&error), "join failed");
                audit::peer_refused(Listener::Join, remote, &error);
            });
        }
    });
    Ok(())
}

async fn one(
    acceptor: TlsAcceptor,
    issuer: &Arc<Issuer>,
    socket: TcpStream,
    remote: SocketAddr,
) -> io::Result<()> {
    let mut session = acceptor.accept(socket).await?;
    let asked = request(&mut session).await?;
    let answer = issuer.join(asked, remote).await;
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
