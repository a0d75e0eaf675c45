//! TLS of the agents' listener: our certificate, and the CA of the agents where one is configured.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::server::NoClientAuth;
use tokio_rustls::TlsAcceptor;

use crate::grpc;
use cpc_config::konnectivity::KonnectivityConfig;
use cpc_config::tls_floor::TlsFloor;
use cpc_host::report::report;
use cpc_identity::caller_verifier::CallerVerifier;
use cpc_identity::floor::{Accepted, accepted};
use cpc_identity::lifetime::{Certificates, Lifetime, Purpose};
use cpc_identity::material::{MaterialError, load_anchors, load_key};
use cpc_identity::pem;
use cpc_identity::reloading::{fingerprint, watch};
use cpc_identity::revoked::Revocations;
use cpc_identity::{Role, TrustDomain};
use cpc_observe::audit::events as audit;

/// TLS of the listener, reloaded when its files change.
#[derive(Clone)]
pub(super) struct AgentTls {
    files: Files,
    loaded: Arc<ArcSwap<Loaded>>,
}

/// Configuration in force.
struct Loaded {
    acceptor: TlsAcceptor,
    lifetimes: Vec<Lifetime>,
    fingerprint: Vec<u8>,
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

impl Files {
    fn fingerprint(&self) -> Vec<u8> {
        fingerprint([&self.cert, &self.key].into_iter().chain(&self.client_ca))
    }
}

impl AgentTls {
    /// Reads the files of a listener whose agents belong to `tenant`; `own` are the certificate and key
    /// for a listener without any.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file.
    pub(super) fn load(
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
        let loaded = Arc::new(ArcSwap::from_pointee(read(&files)?));
        Ok(Self { files, loaded })
    }

    /// Reloads the files when they change, without end.
    pub(super) async fn watch(self) {
        let reload = || {
            if self.files.fingerprint() != self.loaded.load().fingerprint {
                self.loaded.store(Arc::new(read(&self.files)?));
                tracing::info!("certificates for agents of Konnectivity reloaded");
                audit::changed("certificates for agents of Konnectivity", Ok(()));
            }
            Ok(())
        };
        let complain = |error: &MaterialError| {
            tracing::warn!(
                error = report(error),
                "certificates for agents of Konnectivity not reloaded, the old ones stay"
            );
            audit::changed("certificates for agents of Konnectivity", Err(error));
        };
        watch(reload, complain).await;
    }

    /// Returns the acceptor for the next agent.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.loaded.load().acceptor.clone()
    }
}

impl Certificates for AgentTls {
    fn lifetimes(&self) -> Vec<Lifetime> {
        self.loaded.load().lifetimes.clone()
    }
}

fn read(files: &Files) -> Result<Loaded, MaterialError> {
    let wrong = |path: &Path, why: String| MaterialError::File {
        path: path.into(),
        why,
    };
    // Taken first: a file that changes while it is read is then read again.
    let fingerprint = files.fingerprint();
    let Accepted { provider, versions } = accepted(&files.floor);
    let key = load_key(&files.cert, &files.key, &provider)?;
    pem::warn_if_exposed(&files.key);
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&versions)
        .map_err(|e| wrong(&files.cert, e.to_string()))?;
    let own = Lifetime::own(Purpose::Konnectivity, &key, &files.cert);
    let mut lifetimes = Vec::from_iter(own);
    let builder = match &files.client_ca {
        Some(ca) => {
            let anchors = load_anchors(ca)?;
            lifetimes.extend(Lifetime::cas(Purpose::Konnectivity, &anchors, ca));
            let role = (Role::Agent, files.tenant.clone());
            let revocations = files.revocations.clone();
            let agents = CallerVerifier::new(anchors, provider, role, revocations);
            builder.with_client_cert_verifier(agents)
        }
        None => builder.with_client_cert_verifier(Arc::new(NoClientAuth)),
    };
    let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
    let mut tls = builder.with_cert_resolver(resolver);
    tls.alpn_protocols = vec![grpc::ALPN.to_vec()];
    Ok(Loaded {
        acceptor: TlsAcceptor::from(Arc::new(tls)),
        lifetimes,
        fingerprint,
    })
}
