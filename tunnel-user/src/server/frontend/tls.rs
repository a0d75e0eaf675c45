//! TLS of a frontend on TCP: its own certificate, and callers that a given CA vouches for.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::server::WebPkiClientVerifier;
use tokio_rustls::TlsAcceptor;

use super::listener::Protocol;
use crate::config::frontend::TcpFrontend;
use crate::telemetry::audit::events as audit;
use crate::tls::callers::Callers;
use crate::tls::floor::Accepted;
use crate::tls::material::{MaterialError, fingerprint, load_key, load_roots, watch};
use crate::tls::revoked::Revocations;
use crate::tls::{Role, TrustDomain};

/// The TLS of one frontend, read anew when its files change.
#[derive(Clone)]
pub(in crate::server) struct FrontendTls {
    config: TcpFrontend,
    tenant: TrustDomain,
    protocol: Protocol,
    revocations: Arc<Revocations>,
    acceptor: Arc<ArcSwap<TlsAcceptor>>,
}

impl FrontendTls {
    /// Reads the files of a frontend whose callers are of `tenant`.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file.
    pub(in crate::server) fn load(
        config: TcpFrontend,
        tenant: TrustDomain,
        protocol: Protocol,
        revocations: Arc<Revocations>,
    ) -> Result<Self, MaterialError> {
        let first = acceptor(&config, &tenant, protocol, &revocations)?;
        Ok(Self {
            config,
            tenant,
            protocol,
            revocations,
            acceptor: Arc::new(ArcSwap::from_pointee(first)),
        })
    }

    /// Reads the files again when they change, for ever.
    pub(in crate::server) async fn watch(self) {
        let files = || {
            let TcpFrontend {
                cert,
                key,
                client_ca,
                ..
            } = &self.config;
            fingerprint([cert, key, client_ca])
        };
        let mut last = files();
        let reload = || {
            let now = files();
            if now != last {
                let fresh = acceptor(&self.config, &self.tenant, self.protocol, &self.revocations)?;
                self.acceptor.store(Arc::new(fresh));
                last = now;
                tracing::info!(frontend = %self.config.tcp, "certificates reloaded");
                audit::changed("certificates of a frontend", Ok(()));
            }
            Ok(())
        };
        watch(reload).await;
    }

    /// For the next caller.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::clone(&self.acceptor.load())
    }
}

fn acceptor(
    config: &TcpFrontend,
    tenant: &TrustDomain,
    protocol: Protocol,
    revocations: &Arc<Revocations>,
) -> Result<TlsAcceptor, MaterialError> {
    let file = |path: &std::path::Path, why: String| MaterialError::File {
        path: path.into(),
        why,
    };
    let floor = config.tls_floor.clone();
    let accepted = floor.unwrap_or_else(|| protocol.floor()).accepted();
    let Accepted { provider, versions } =
        accepted.map_err(|e| file(&config.cert, e.to_string()))?;
    let key = load_key(&config.cert, &config.key, &provider)?;
    let roots = Arc::new(load_roots(&config.client_ca)?);
    let inner = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|e| file(&config.client_ca, e.to_string()))?;
    let callers = Callers::new(inner, (Role::Client, tenant.clone()), revocations.clone());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .map_err(|e| file(&config.cert, e.to_string()))?
        .with_client_cert_verifier(callers)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    tls.alpn_protocols = protocol.alpn();
    Ok(TlsAcceptor::from(Arc::new(tls)))
}
