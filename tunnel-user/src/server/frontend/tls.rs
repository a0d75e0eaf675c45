//! TLS of a frontend on TCP: its own certificate, and callers that a given CA vouches for.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use tokio_rustls::TlsAcceptor;

use crate::config::server::TcpFrontend;
use crate::tls::identity::IdentityError;
use crate::tls::material::{MaterialError, fingerprint, load_key, load_roots, watch};
use crate::tls::verify::unknown_issuer;
use crate::tls::{Identity, Role, TrustDomain, provider};

/// The TLS of one frontend, read anew when its files change.
#[derive(Clone)]
pub(in crate::server) struct FrontendTls {
    config: TcpFrontend,
    tenant: TrustDomain,
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
    ) -> Result<Self, MaterialError> {
        let acceptor = Arc::new(ArcSwap::from_pointee(acceptor(&config, &tenant)?));
        Ok(Self {
            config,
            tenant,
            acceptor,
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
                let fresh = acceptor(&self.config, &self.tenant)?;
                self.acceptor.store(Arc::new(fresh));
                last = now;
                tracing::info!(frontend = %self.config.tcp, "certificates reloaded");
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

fn acceptor(config: &TcpFrontend, tenant: &TrustDomain) -> Result<TlsAcceptor, MaterialError> {
    let provider = provider();
    let key = load_key(&config.cert, &config.key, &provider)?;
    let roots = Arc::new(load_roots(&config.client_ca)?);
    let file = |path: &std::path::Path, why: String| MaterialError::File {
        path: path.into(),
        why,
    };
    let inner = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|e| file(&config.client_ca, e.to_string()))?;
    let callers = Callers {
        inner,
        tenant: tenant.clone(),
    };
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| file(&config.cert, e.to_string()))?
        .with_client_cert_verifier(Arc::new(callers))
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

/// Lets in whom the CA vouches for, unless the certificate is for another role: where one CA
/// serves everything, a stolen agent's certificate must be no way in.
#[derive(Debug)]
struct Callers {
    inner: Arc<dyn ClientCertVerifier>,
    tenant: TrustDomain,
}

/// Why a caller whom the CA vouches for is turned away all the same.
#[derive(thiserror::Error)]
enum Refusal {
    #[error("{0} is no client: its certificate is for another role")]
    Role(Identity),
    #[error("{0} is not of {1}, whose nodes this frontend leads to")]
    Tenant(Identity, TrustDomain),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// rustls shows a refusal of ours with `Debug`, and people are to read it.
impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

impl ClientCertVerifier for Callers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match Identity::from_certificate(leaf) {
            Ok(identity) if identity.trust_domain != self.tenant => {
                return Err(Refusal::Tenant(identity, self.tenant.clone()).into());
            }
            Ok(identity) if identity.role == Role::Client => {}
            Ok(identity) => return Err(Refusal::Role(identity).into()),
            // A certificate of another make names no role: the CA alone decides.
            Err(IdentityError::UriCount(0)) => {}
            Err(error) => return Err(Refusal::from(error).into()),
        }
        self.inner
            .verify_client_cert(leaf, intermediates, now)
            .map_err(unknown_issuer)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
