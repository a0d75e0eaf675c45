//! Callers of a listener that has a CA of its own: programs that are not ours as well as those that
//! are.
//!
//! Where one CA serves everything, a stolen certificate must be no way in but the one that it was
//! made for.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

use super::identity::{Identity, IdentityError, Role, TrustDomain};
use super::revoked::{Revocations, Revoked};
use super::verify::unknown_issuer;

/// Lets in whom the CA vouches for, unless the certificate is for another role or tenant.
#[derive(Debug)]
pub struct Callers {
    inner: Arc<dyn ClientCertVerifier>,
    role: Role,
    tenant: TrustDomain,
    revocations: Arc<Revocations>,
}

impl Callers {
    /// Lets in whom `inner` does and `revocations` do not name. Those with an identity must play
    /// `role` and be of `tenant`.
    pub fn new(
        inner: Arc<dyn ClientCertVerifier>,
        (role, tenant): (Role, TrustDomain),
        revocations: Arc<Revocations>,
    ) -> Arc<Self> {
        Arc::new(Self {
            inner,
            role,
            tenant,
            revocations,
        })
    }
}

/// Why a caller whom the CA vouches for is turned away all the same.
#[derive(thiserror::Error)]
enum Refusal {
    #[error("{0} is no {1}: its certificate is for another role")]
    Role(Identity, Role),
    #[error("{0} is not of {1}, whom this listener is for")]
    Tenant(Identity, TrustDomain),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Revoked(#[from] Revoked),
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
            Ok(identity) if identity.role == self.role => {}
            Ok(identity) => return Err(Refusal::Role(identity, self.role).into()),
            // A certificate of another make names no role: the CA alone decides.
            Err(IdentityError::UriCount(0)) => {}
            Err(error) => return Err(Refusal::from(error).into()),
        }
        let verified = self
            .inner
            .verify_client_cert(leaf, intermediates, now)
            .map_err(unknown_issuer)?;
        let checked = self.revocations.check_certificate(leaf);
        checked.map_err(Refusal::from)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
