//! Verification of a peer's certificate chain, on both sides of the tunnel.
//!
//! The leaf's identity is read first. Its trust domain selects the roots that may vouch for it, and its
//! role must be the expected one. So a CA of one domain can't issue an identity of another, and an
//! agent's certificate can't serve as a server's. Names and addresses play no part: an agent knows a
//! server by its URI and may dial it by any address.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use webpki::KeyUsage;

use super::anchors::Anchors;
use super::identity::{Identity, Role, TrustDomain};
use super::revoked::{Revocations, Revoked};
use super::signatures::signatures;

/// The CAs of each trust domain.
#[derive(Clone, Debug, Default)]
pub struct TrustStore {
    domains: HashMap<TrustDomain, Arc<Anchors>>,
}

impl TrustStore {
    /// Trusts `anchors` for identities of `domain`, and for no others.
    pub fn add(&mut self, domain: TrustDomain, anchors: Anchors) {
        self.domains.insert(domain, anchors.into());
    }

    /// Returns the CAs of `domain`.
    pub fn of(&self, domain: &TrustDomain) -> Option<&Arc<Anchors>> {
        self.domains.get(domain)
    }

    /// Iterates over the trusted domains and their CAs.
    pub fn domains(&self) -> impl Iterator<Item = (&TrustDomain, &Anchors)> {
        { self.domains.iter() }.map(|(domain, anchors)| (domain, &**anchors))
    }
}

/// Reason why a peer was refused, beyond the errors of webpki.
#[derive(thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Identity(#[from] super::identity::IdentityError),
    #[error("{identity} is no {expected}: its certificate is for another role")]
    Role { identity: Identity, expected: Role },
    #[error("{0} is of a trust domain that is not trusted here; add its CA to tls.trust")]
    Domain(Identity),
    #[error(transparent)]
    Revoked(#[from] Revoked),
    #[error("{0} was not issued by a CA that vouches for its trust domain here; see tls.ca")]
    Issuer(Identity),
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

/// Adds the identity of the peer whose issuer is not trusted.
fn named(error: Error, identity: Identity) -> Error {
    match unknown_issuer(error) {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            Refusal::Issuer(identity).into()
        }
        error => error,
    }
}

/// Converts a bad signature to an unknown issuer. A replaced CA may keep its name: webpki then finds a
/// wrong signature instead of an unknown issuer, which would send people looking in the wrong place.
pub fn unknown_issuer(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            CertificateError::UnknownIssuer.into()
        }
        error => error,
    }
}

/// A verifier of peers of one role against a trust store that may be swapped while it is in use.
#[derive(Debug)]
pub struct PeerVerifier {
    expected: Role,
    trust: Arc<ArcSwap<TrustStore>>,
    revocations: Arc<Revocations>,
    provider: Arc<CryptoProvider>,
}

impl PeerVerifier {
    /// Creates a verifier that accepts peers of role `expected` only.
    pub fn new(
        expected: Role,
        trust: Arc<ArcSwap<TrustStore>>,
        revocations: Arc<Revocations>,
        provider: Arc<CryptoProvider>,
    ) -> Arc<Self> {
        Arc::new(Self {
            expected,
            trust,
            revocations,
            provider,
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        when: (UnixTime, KeyUsage),
    ) -> Result<(), Error> {
        let (identity, anchors) = self.anchors(leaf)?;
        let algorithms = &self.provider.signature_verification_algorithms;
        { anchors.verify(leaf, between, when, algorithms) }
            .map_err(|error| named(error, identity))?;
        self.check_revoked(leaf)
    }

    /// Checks revocation, last: an untrusted peer has nothing that could be revoked.
    fn check_revoked(&self, leaf: &CertificateDer<'_>) -> Result<(), Error> {
        let checked = self.revocations.check_certificate(leaf);
        checked.map_err(|revoked| Refusal::Revoked(revoked).into())
    }

    /// Returns the identity of the leaf, and the roots that have to vouch for it.
    fn anchors(&self, leaf: &CertificateDer<'_>) -> Result<(Identity, Arc<Anchors>), Error> {
        let identity = Identity::from_certificate(leaf).map_err(Refusal::from)?;
        if identity.role != self.expected {
            return Err(Refusal::Role {
                identity,
                expected: self.expected,
            }
            .into());
        }
        match self.trust.load().domains.get(&identity.trust_domain) {
            Some(anchors) => {
                let anchors = anchors.clone();
                Ok((identity, anchors))
            }
            None => Err(Refusal::Domain(identity).into()),
        }
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would tell strangers whose CAs are trusted; our peers have one certificate each.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, (now, KeyUsage::client_auth()))?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, intermediates, (now, KeyUsage::server_auth()))?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}
