//! Verification of the callers of a listener with its own CA: programs with and without an identity
//! of ours.
//!
//! Where one CA serves everything, a stolen certificate must open only the listener that it was
//! issued for.

use std::fmt;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};

use webpki::KeyUsage;

use super::anchors::Anchors;
use super::identity::{Identity, IdentityError, Role, TrustDomain};
use super::revoked::{Revocations, Revoked};
use super::signatures::signatures;
use super::verify::unknown_issuer;

/// A verifier of callers by CA. It rejects certificates of another role or tenant.
#[derive(Debug)]
pub struct CallerVerifier {
    anchors: Anchors,
    hints: Vec<DistinguishedName>,
    provider: Arc<CryptoProvider>,
    role: Role,
    tenant: TrustDomain,
    revocations: Arc<Revocations>,
}

impl CallerVerifier {
    /// Creates a verifier for callers that `anchors` vouch for and `revocations` do not name. Those
    /// with an identity must have `role` and belong to `tenant`.
    pub fn new(
        anchors: Anchors,
        provider: Arc<CryptoProvider>,
        (role, tenant): (Role, TrustDomain),
        revocations: Arc<Revocations>,
    ) -> Arc<Self> {
        Arc::new(Self {
            hints: anchors.subjects(),
            anchors,
            provider,
            role,
            tenant,
            revocations,
        })
    }
}

/// Reason why a caller with a valid chain is refused.
#[derive(thiserror::Error)]
enum Refusal {
    #[error("{0} is no {1}: its certificate is for another role")]
    Role(Identity, Role),
    #[error("{0} is not of {1}, the tenant of this listener")]
    Tenant(Identity, TrustDomain),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Revoked(#[from] Revoked),
}

/// Prints the text for people: rustls shows errors of verifiers with `Debug`.
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

impl ClientCertVerifier for CallerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
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
        let algorithms = &self.provider.signature_verification_algorithms;
        let when = (now, KeyUsage::client_auth());
        let verified = self.anchors.verify(leaf, intermediates, when, algorithms);
        verified.map_err(unknown_issuer)?;
        let checked = self.revocations.check_certificate(leaf);
        checked.map_err(Refusal::from)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}
