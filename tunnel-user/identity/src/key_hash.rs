//! The hash of a key, by which a CA is known without its certificate.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use rustls::{CertificateError, Error};
use x509_parser::prelude::{FromDer, X509Certificate};

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
