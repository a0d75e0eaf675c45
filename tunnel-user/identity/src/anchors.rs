//! CAs as trust anchors: the checks of a CA certificate, and of the chains below it.
//!
//! webpki takes every anchor for a CA, valid without end and for chains of any length. So this module
//! checks that a certificate is a CA's when it is read, and its validity and path length at each
//! handshake.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Error, X509Version};

use super::identity::TrustDomain;
use super::key_hash::KeyHash;

/// Maximum length of a displayed subject, in characters.
const SHOWN: usize = 200;

/// Reason why a certificate can't be a trust anchor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnchorError {
    /// The certificate is not X.509.
    #[error("certificate {position} of {of} can't be read: {why}")]
    Unreadable {
        /// Position, counted from 1.
        position: usize,
        /// Number of certificates in the file.
        of: usize,
        /// Error of the parser.
        why: String,
    },
    /// The certificate is not a CA's.
    #[error(
        "certificate {position} of {of} ({subject}) is not a CA's: {why}; remove it, and put the \
         certificate of the CA that issued it in its place"
    )]
    NotCa {
        /// Position, counted from 1.
        position: usize,
        /// Number of certificates in the file.
        of: usize,
        /// Subject of the certificate.
        subject: String,
        /// Missing property.
        why: &'static str,
    },
}

/// One CA.
#[derive(Clone)]
pub struct Anchor {
    certificate: CertificateDer<'static>,
    trust: TrustAnchor<'static>,
    subject: String,
    subject_der: Vec<u8>,
    key: KeyHash,
    domains: Vec<String>,
    not_before: SystemTime,
    not_after: SystemTime,
    path_length: Option<u32>,
}

impl Anchor {
    /// Returns the certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Returns the subject, for people.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Returns the subject, in DER.
    pub(super) fn subject_der(&self) -> &[u8] {
        &self.subject_der
    }

    /// Returns name and key.
    pub(super) fn trust(&self) -> &TrustAnchor<'static> {
        &self.trust
    }

    /// Returns the name constraints in DER, if there are any.
    pub(super) fn name_constraints(&self) -> Option<&[u8]> {
        self.trust.name_constraints.as_deref()
    }

    /// Returns the hash of the key.
    pub fn key(&self) -> KeyHash {
        self.key
    }

    /// Returns the first and the last moment of validity.
    pub fn validity(&self) -> (SystemTime, SystemTime) {
        (self.not_before, self.not_after)
    }

    /// Returns the maximum number of CAs between this one and a leaf.
    pub fn path_length(&self) -> Option<u32> {
        self.path_length
    }

    /// Returns the trust domain that the CA names, if that is one.
    pub(super) fn domain(&self) -> Option<TrustDomain> {
        match &self.domains[..] {
            [domain] => domain.parse().ok(),
            _ => None,
        }
    }

    /// Whether the CA names no other trust domain than `domain`. A CA that names none may belong to
    /// any.
    pub(super) fn is_of(&self, domain: &TrustDomain) -> bool {
        { self.domains.iter() }.all(|named| named == domain.as_str())
    }

    fn check(&self, below: u32, now: SystemTime) -> Result<(), ChainError> {
        let subject = || self.subject.clone();
        let at = |at| humantime::format_rfc3339_seconds(at).to_string();
        if now > self.not_after {
            return Err(ChainError::Expired(subject(), at(self.not_after)));
        }
        if now < self.not_before {
            return Err(ChainError::NotYet(subject(), at(self.not_before)));
        }
        match self.path_length {
            Some(max) if below > max => Err(ChainError::TooLong {
                subject: subject(),
                max,
                found: below,
            }),
            _ => Ok(()),
        }
    }
}

/// The CAs of one trust domain, or of the callers of one listener.
#[derive(Clone, Default)]
pub struct Anchors {
    list: Vec<Anchor>,
    /// Trust anchors, in the same order.
    trust: Vec<TrustAnchor<'static>>,
}

impl Anchors {
    /// Checks that each of `certificates` is a CA's. A CA that is not valid now is kept, and counts
    /// once it is valid.
    ///
    /// # Errors
    /// [`AnchorError`] naming the certificate.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, AnchorError> {
        let of = certificates.len();
        let (mut list, mut trust) = (Vec::new(), Vec::new());
        for (index, certificate) in certificates.into_iter().enumerate() {
            let position = index + 1;
            let unreadable = |why: &dyn fmt::Display| AnchorError::Unreadable {
                position,
                of,
                why: why.to_string(),
            };
            let (_, read) = X509Certificate::from_der(&certificate).map_err(|e| unreadable(&e))?;
            let subject: String = read.subject().to_string().chars().take(SHOWN).collect();
            let path_length = ca(&read).map_err(|why| AnchorError::NotCa {
                position,
                of,
                subject: subject.clone(),
                why,
            })?;
            let time = |at: x509_parser::time::ASN1Time| SystemTime::from(at.to_datetime());
            let (not_before, not_after) = (
                time(read.validity().not_before),
                time(read.validity().not_after),
            );
            let anchor = webpki::anchor_from_trusted_cert(&certificate);
            let anchor = anchor.map_err(|e| unreadable(&e))?.to_owned();
            trust.push(anchor.clone());
            let subject_der = read.subject().as_raw().to_vec();
            let key = KeyHash::of_spki(read.public_key().raw);
            let domains = domains(&read).map_err(|e| unreadable(&e))?;
            list.push(Anchor {
                certificate,
                trust: anchor,
                subject,
                subject_der,
                key,
                domains,
                not_before,
                not_after,
                path_length,
            });
        }
        Ok(Self { list, trust })
    }

    /// Iterates over the CAs.
    pub fn iter(&self) -> impl Iterator<Item = &Anchor> {
        self.list.iter()
    }

    /// Whether `certificate` is one of the CAs.
    pub fn contains(&self, certificate: &CertificateDer<'_>) -> bool {
        { self.list.iter() }.any(|anchor| anchor.certificate == *certificate)
    }

    /// Keeps the CAs that name no other trust domain than `domain`.
    #[must_use]
    pub fn of_domain(self, domain: &TrustDomain) -> Self {
        let both = self.list.into_iter().zip(self.trust);
        let (list, trust) = both.filter(|(anchor, _)| anchor.is_of(domain)).unzip();
        Self { list, trust }
    }

    /// Whether there is no CA.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether at least one CA is valid at `now`.
    pub fn any_valid(&self, now: SystemTime) -> bool {
        self.list.iter().any(|anchor| anchor.check(0, now).is_ok())
    }

    /// Returns the certificates.
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        { self.list.iter() }
            .map(|anchor| anchor.certificate.clone())
            .collect()
    }

    /// Returns the subjects, as hints for clients that have several certificates.
    pub fn subjects(&self) -> Vec<DistinguishedName> {
        { self.trust.iter() }
            .map(|trust| DistinguishedName::in_sequence(&trust.subject))
            .collect()
    }

    /// Checks that one of the CAs vouches for `leaf` at `now`, by way of `between`.
    ///
    /// # Errors
    /// The error of webpki, or `ChainError` where only the CA, or a CA between, is at fault.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        (now, usage): (UnixTime, KeyUsage),
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Error> {
        let refused = Cell::new(None);
        let check = |path: &VerifiedPath<'_>| {
            self.check(path, now).map_err(|why| {
                refused.set(Some(why));
                webpki::Error::UnknownIssuer
            })
        };
        let leaf = EndEntityCert::try_from(leaf).map_err(in_rustls)?;
        let check: &dyn Fn(&VerifiedPath<'_>) -> Result<(), webpki::Error> = &check;
        let (algorithms, trust) = (algorithms.all, &self.trust);
        let found =
            leaf.verify_for_usage(algorithms, trust, between, now, usage, None, Some(check));
        match (found, refused.take()) {
            (Ok(_), _) => Ok(()),
            (Err(_), Some(why)) => Err(why.into()),
            (Err(error), None) => Err(in_rustls(error)),
        }
    }

    fn check(&self, path: &VerifiedPath<'_>, now: UnixTime) -> Result<(), ChainError> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let mut below = 0;
        for between in path.intermediate_certificates() {
            let der = between.der();
            let read = X509Certificate::from_der(&der);
            let (_, read) = read.map_err(|error| ChainError::Unreadable(error.to_string()))?;
            ca(&read).map_err(|why| {
                ChainError::NotCa(
                    read.subject().to_string().chars().take(SHOWN).collect(),
                    why,
                )
            })?;
            // A CA's certificate for its own next key counts for none (RFC 5280 section 6.1.4).
            below += u32::from(between.subject() != between.issuer());
        }
        // One key may stand in several certificates: the best of them counts.
        let same = self.list.iter().zip(&self.trust);
        let same = same.filter(|(_, trust)| *trust == path.anchor());
        let mut verdict = Err(ChainError::Unreadable("no such CA".into()));
        for (anchor, _) in same {
            verdict = anchor.check(below, now);
            if verdict.is_ok() {
                break;
            }
        }
        verdict
    }
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.subject)
    }
}

impl fmt::Debug for Anchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subjects = self.list.iter().map(|anchor| &anchor.subject);
        f.debug_set().entries(subjects).finish()
    }
}

/// Reason why a correctly signed chain does not count.
#[derive(thiserror::Error)]
enum ChainError {
    #[error("the CA {0} has expired at {1}; replace it (tls.ca)")]
    Expired(String, String),
    #[error("the CA {0} is not valid before {1}; is the clock right?")]
    NotYet(String, String),
    #[error("the CA {subject} allows {max} CAs below it, and the chain has {found}")]
    TooLong {
        subject: String,
        max: u32,
        found: u32,
    },
    #[error("{0} is not a CA's certificate, but signed another: {1}")]
    NotCa(String, &'static str),
    #[error("a certificate in the chain can't be read: {0}")]
    Unreadable(String),
    #[error(
        "the certificate lacks the extended key usage of its side: clientAuth of a client, serverAuth \
         of a server"
    )]
    Usage,
    #[error("the peer's own certificate is that of a CA")]
    CaAsLeaf,
    #[error("a CA in the chain allows fewer CAs below it than there are")]
    PathLength,
    #[error("a CA in the chain may not vouch for the names in the certificate")]
    Names,
    #[error("{0:?}")]
    Other(webpki::Error),
}

/// Prints the text for people: rustls shows errors of verifiers with `Debug`.
impl fmt::Debug for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<ChainError> for Error {
    fn from(error: ChainError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Checks that a certificate is a CA's (RFC 5280 sections 4.2.1.3 and 4.2.1.9). Returns its path
/// length.
///
/// # Errors
/// The missing property.
fn ca(certificate: &X509Certificate<'_>) -> Result<Option<u32>, &'static str> {
    if certificate.version() != X509Version::V3 {
        return Err("it is of X.509 version 1 or 2, which has no CAs");
    }
    let constraints = certificate.basic_constraints();
    let constraints = constraints.map_err(|_| "its basic constraints can't be read")?;
    let constraints = constraints.ok_or("it has no basic constraints")?.value;
    if !constraints.ca {
        return Err("its basic constraints say CA:FALSE");
    }
    let usage = certificate.key_usage();
    match usage.map_err(|_| "its key usage can't be read")? {
        Some(usage) if !usage.value.key_cert_sign() => {
            Err("its key usage does not let it sign certificates (keyCertSign)")
        }
        _ => Ok(constraints.path_len_constraint),
    }
}

/// Returns the trust domains that a CA names.
fn domains(certificate: &X509Certificate<'_>) -> Result<Vec<String>, X509Error> {
    let names = certificate.subject_alternative_name()?;
    let names = names.into_iter().flat_map(|it| &it.value.general_names);
    let domains = names.filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://").map(ToOwned::to_owned),
        _ => None,
    });
    Ok(domains.collect())
}

/// Converts an error of webpki as rustls does.
fn in_rustls(error: webpki::Error) -> Error {
    use webpki::Error::{
        BadDer, BadDerTime, CaUsedAsEndEntity, CertExpired, CertNotValidYet,
        InvalidSignatureForPublicKey, NameConstraintViolation, PathLenConstraintViolated,
        RequiredEkuNotFoundContext, TrailingData, UnknownIssuer,
    };
    match error {
        BadDer | BadDerTime | TrailingData(_) => CertificateError::BadEncoding.into(),
        CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }.into()
        }
        CertExpired { time, not_after } => {
            CertificateError::ExpiredContext { time, not_after }.into()
        }
        UnknownIssuer => CertificateError::UnknownIssuer.into(),
        InvalidSignatureForPublicKey => CertificateError::BadSignature.into(),
        RequiredEkuNotFoundContext(_) => ChainError::Usage.into(),
        CaUsedAsEndEntity => ChainError::CaAsLeaf.into(),
        PathLenConstraintViolated => ChainError::PathLength.into(),
        NameConstraintViolation => ChainError::Names.into(),
        other => ChainError::Other(other).into(),
    }
}

#[cfg(test)]
mod tests;
