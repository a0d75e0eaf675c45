//! TLS of a frontend on TCP: its own certificate, and the CA of its callers.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio_rustls::TlsAcceptor;

use super::protocol::Protocol;
use cpc_config::frontend::TcpFrontend;
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

/// TLS of one frontend, reloaded when its files change.
#[derive(Clone)]
pub(crate) struct FrontendTls {
    config: TcpFrontend,
    tenant: TrustDomain,
    protocol: Protocol,
    revocations: Arc<Revocations>,
    loaded: Arc<ArcSwap<Loaded>>,
}

/// Configuration in force.
struct Loaded {
    acceptor: TlsAcceptor,
    lifetimes: Vec<Lifetime>,
    fingerprint: Vec<u8>,
}

impl FrontendTls {
    /// Reads the files of a frontend whose callers belong to `tenant`.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file.
    pub(crate) fn load(
        config: TcpFrontend,
        tenant: TrustDomain,
        protocol: Protocol,
        revocations: Arc<Revocations>,
    ) -> Result<Self, MaterialError> {
        let first = read(&config, &tenant, &protocol, &revocations)?;
        Ok(Self {
            config,
            tenant,
            protocol,
            revocations,
            loaded: Arc::new(ArcSwap::from_pointee(first)),
        })
    }

    /// Reloads the files when they change, without end.
    pub(crate) async fn watch(self) {
        let reload = || {
            if files(&self.config) != self.loaded.load().fingerprint {
                let fresh = read(
                    &self.config,
                    &self.tenant,
                    &self.protocol,
                    &self.revocations,
                )?;
                self.loaded.store(Arc::new(fresh));
                tracing::info!(frontend = %self.config.tcp, "certificates reloaded");
                audit::changed("certificates of a frontend", Ok(()));
            }
            Ok(())
        };
        let complain = |error: &MaterialError| {
            tracing::warn!(frontend = %self.config.tcp, error = report(error), "certificates not reloaded, the old ones stay");
            audit::changed("certificates of a frontend", Err(error));
        };
        watch(reload, complain).await;
    }

    /// Returns the acceptor for the next caller.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.loaded.load().acceptor.clone()
    }
}

impl Certificates for FrontendTls {
    fn lifetimes(&self) -> Vec<Lifetime> {
        self.loaded.load().lifetimes.clone()
    }
}

fn files(config: &TcpFrontend) -> Vec<u8> {
    fingerprint([&config.cert, &config.key, &config.client_ca])
}

fn read(
    config: &TcpFrontend,
    tenant: &TrustDomain,
    protocol: &Protocol,
    revocations: &Arc<Revocations>,
) -> Result<Loaded, MaterialError> {
    let file = |path: &std::path::Path, why: String| MaterialError::File {
        path: path.into(),
        why,
    };
    // Taken first: a file that changes while it is read is then read again.
    let fingerprint = files(config);
    let floor = config.tls_floor.clone();
    let floor = floor.unwrap_or_else(|| protocol.floor());
    let Accepted { provider, versions } = accepted(&floor);
    let key = load_key(&config.cert, &config.key, &provider)?;
    pem::warn_if_exposed(&config.key);
    let anchors = load_anchors(&config.client_ca)?;
    let mut lifetimes = Lifetime::cas(Purpose::Frontend, &anchors, &config.client_ca);
    lifetimes.extend(Lifetime::own(Purpose::Frontend, &key, &config.cert));
    let role = (Role::Client, tenant.clone());
    let callers = CallerVerifier::new(anchors, provider.clone(), role, revocations.clone());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .map_err(|e| file(&config.cert, e.to_string()))?
        .with_client_cert_verifier(callers)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    tls.alpn_protocols = protocol.alpn();
    Ok(Loaded {
        acceptor: TlsAcceptor::from(Arc::new(tls)),
        lifetimes,
        fingerprint,
    })
}
