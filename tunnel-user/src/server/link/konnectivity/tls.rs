//! TLS of the agents' listener: our certificate, and where one is given the CA that vouches for
//! agents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::server::{NoClientAuth, WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;

use crate::config::konnectivity::KonnectivityConfig;
use crate::telemetry::audit::events as audit;
use crate::tls::callers::Callers;
use crate::tls::floor::Accepted;
use crate::tls::material::{MaterialError, fingerprint, load_key, load_roots, watch};
use crate::tls::revoked::Revocations;
use crate::tls::{Role, TlsFloor, TrustDomain};
use crate::transport::grpc;

/// The TLS of the listener, read anew when its files change.
#[derive(Clone)]
pub(in crate::server) struct AgentTls {
    files: Files,
    acceptor: Arc<ArcSwap<TlsAcceptor>>,
}

#[derive(Clone)]
struct Files {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    floor: TlsFloor,
    tenant: TrustDomain,
    revocations: Arc<Revocations>,
}

impl AgentTls {
    /// Reads the files of a listener whose agents are of `tenant`; `own` are the certificate and
    /// key for a listener without any.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file.
    pub(in crate::server) fn load(
        config: &KonnectivityConfig,
        (own_cert, own_key): (Option<&Path>, Option<&Path>),
        tenant: TrustDomain,
        revocations: Arc<Revocations>,
    ) -> Result<Self, MaterialError> {
        // The configuration has been checked: one of the two is there.
        let first = |path: &Option<PathBuf>, own: Option<&Path>| {
            path.as_deref().or(own).unwrap_or(Path::new("")).to_owned()
        };
        let files = Files {
            cert: first(&config.cert, own_cert),
            key: first(&config.key, own_key),
            client_ca: config.client_ca.clone(),
            floor: config.tls_floor.clone(),
            tenant,
            revocations,
        };
        let acceptor = Arc::new(ArcSwap::from_pointee(acceptor(&files)?));
        Ok(Self { files, acceptor })
    }

    /// Reads the files again when they change, for ever.
    pub(in crate::server) async fn watch(self) {
        let Files {
            cert,
            key,
            client_ca,
            ..
        } = &self.files;
        let files = || fingerprint([cert, key].into_iter().chain(client_ca));
        let mut last = files();
        let reload = || {
            let now = files();
            if now != last {
                self.acceptor.store(Arc::new(acceptor(&self.files)?));
                last = now;
                tracing::info!("certificates for agents of Konnectivity reloaded");
                audit::changed("certificates for agents of Konnectivity", Ok(()));
            }
            Ok(())
        };
        watch(reload).await;
    }

    /// For the next agent.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::clone(&self.acceptor.load())
    }
}

fn acceptor(files: &Files) -> Result<TlsAcceptor, MaterialError> {
    let wrong = |path: &Path, why: String| MaterialError::File {
        path: path.into(),
        why,
    };
    let accepted = files.floor.accepted();
    let Accepted { provider, versions } =
        accepted.map_err(|e| wrong(&files.cert, e.to_string()))?;
    let key = load_key(&files.cert, &files.key, &provider)?;
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&versions)
        .map_err(|e| wrong(&files.cert, e.to_string()))?;
    let builder = match &files.client_ca {
        Some(ca) => {
            let roots = Arc::new(load_roots(ca)?);
            let inner = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|e| wrong(ca, e.to_string()))?;
            let agents = Callers::new(
                inner,
                (Role::Agent, files.tenant.clone()),
                files.revocations.clone(),
            );
            builder.with_client_cert_verifier(agents)
        }
        None => builder.with_client_cert_verifier(Arc::new(NoClientAuth)),
    };
    let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
    let mut tls = builder.with_cert_resolver(resolver);
    tls.alpn_protocols = vec![grpc::ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}
