//! CAs identified by the hash of their key: a worker without a CA's certificate authenticates a server
//! by it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, Error, OtherError};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::anchors::Anchors;
use super::identity::{Identity, Role};
use super::revoked::Revocations;
use super::signatures::signatures;
use super::verify::{PeerVerifier, TrustStore};

/// The SHA-256 of a public key (its `SubjectPublicKeyInfo`, RFC 7469 section 2.4), written as kubeadm
/// writes it: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

/// The text is not a hash.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no hash of a key: sha256: and 64 hexadecimal digits are, as `cpc token create` prints them"
)]
pub struct HashError(String);

impl KeyHash {
    /// Returns the hash of a key in DER.
    pub fn of_spki(spki: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, spki);
        let mut hash = [0; 32];
        // SHA-256 has 32 bytes.
        hash.copy_from_slice(digest.as_ref());
        Self(hash)
    }

    /// Returns the hash of a certificate's key.
    ///
    /// # Errors
    /// The certificate is malformed.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let read = X509Certificate::from_der(certificate);
        let (_, read) = read.map_err(|_| CertificateError::BadEncoding)?;
        Ok(Self::of_spki(read.public_key().raw))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyHash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let wrong = || HashError(text.chars().take(80).collect());
        let digits = text
            .trim()
            .strip_prefix("sha256:")
            .ok_or_else(wrong)?
            .as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 64 {
            return Err(wrong());
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            for digit in pair {
                let digit = char::from(*digit).to_digit(16).ok_or_else(wrong)?;
                // Below 16.
                *byte = *byte << 4 | digit as u8;
            }
        }
        Ok(Self(hash))
    }
}

/// A verifier of servers by a CA with one of these keys. The server shows the certificate of the CA
/// behind its own.
#[derive(Debug)]
pub struct PinnedVerifier {
    pins: Vec<KeyHash>,
    provider: Arc<CryptoProvider>,
}

/// No shown CA has one of the keys.
#[derive(thiserror::Error)]
#[error(
    "no CA that it shows has the key {0}: it is another server, or its CA was replaced; \
     `cpc token create` prints the present hash"
)]
struct Unpinned(String);

impl fmt::Debug for Unpinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PinnedVerifier {
    /// Creates the verifier of a handshake.
    pub fn new(pins: Vec<KeyHash>, provider: Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self { pins, provider })
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        shown: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut roots = Vec::new();
        for certificate in shown {
            if self.pins.contains(&KeyHash::of(certificate)?) {
                roots.push(certificate.clone().into_owned());
            }
        }
        let other = |error| Error::InvalidCertificate(CertificateError::Other(OtherError(error)));
        if roots.is_empty() {
            let pins: Vec<_> = self.pins.iter().map(ToString::to_string).collect();
            return Err(other(Arc::new(Unpinned(pins.join(" or ")))));
        }
        let identity = Identity::from_certificate(leaf).map_err(|error| other(Arc::new(error)))?;
        let anchors = Anchors::new(roots).map_err(|error| other(Arc::new(error)))?;
        let mut trust = TrustStore::default();
        trust.add(identity.trust_domain, anchors);
        let trust = Arc::new(ArcSwap::from_pointee(trust));
        PeerVerifier::new(
            Role::Server,
            trust,
            Revocations::none(),
            self.provider.clone(),
        )
        .verify_server_cert(leaf, shown, server_name, ocsp_response, now)
    }

    signatures!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_written_as_it_is_read() {
        let hash = KeyHash::of_spki(b"x");
        let text = hash.to_string();
        assert_eq!(text.parse::<KeyHash>().unwrap(), hash);
        // In a list there may be blanks.
        assert_eq!(format!(" {text}\n").parse::<KeyHash>().unwrap(), hash);
        assert_eq!(
            text.to_uppercase()
                .replace("SHA", "sha")
                .parse::<KeyHash>()
                .unwrap(),
            hash
        );
        for wrong in [
            "",
            "sha256:",
            &text[1..],
            &text[..70],
            "sha256:zz",
            &text.replace('a', "é"),
        ] {
            assert!(wrong.parse::<KeyHash>().is_err(), "{wrong}");
        }
    }
}
