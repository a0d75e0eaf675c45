//! Which TLS is accepted from programs that are not ours. The tunnel speaks TLS 1.3 alone and has
//! no such choice.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{SupportedCipherSuite, SupportedProtocolVersion, version};
use serde::Deserialize;

use super::provider;

/// What TLS is accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsFloor {
    /// The oldest version.
    pub min_version: TlsVersion,
    /// Cipher suites of TLS 1.2 and 1.3 by their IANA names; all that are safe when empty.
    pub cipher_suites: Vec<String>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum TlsVersion {
    /// RFC 5246.
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    /// RFC 8446.
    #[serde(rename = "1.3")]
    Tls13,
}

/// Why a [`TlsFloor`] can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FloorError {
    /// A name that stands for no suite.
    #[error("{0} is no cipher suite that is spoken here; {all} are", all = names().join(", "))]
    Unknown(String),
    /// Nothing is left for the version.
    #[error("none of the cipher suites is one of TLS 1.3, which min_version asks for")]
    NoneLeft,
}

impl TlsFloor {
    /// What a listener accepts.
    ///
    /// # Errors
    /// [`FloorError`].
    pub fn accepted(&self) -> Result<Accepted, FloorError> {
        let own = provider();
        let unknown = self.cipher_suites.iter().find(|name| !is_suite(name));
        if let Some(unknown) = unknown {
            return Err(FloorError::Unknown(unknown.clone()));
        }
        let wanted = |suite: &SupportedCipherSuite| {
            self.cipher_suites.is_empty() || self.cipher_suites.contains(&iana_name(*suite))
        };
        let mut suites = own.cipher_suites.clone();
        suites.retain(wanted);
        let mut versions = vec![&version::TLS13, &version::TLS12];
        versions.retain(|version| {
            let spoken = suites.iter().any(|suite| suite.version() == *version);
            spoken && (self.min_version == TlsVersion::Tls12 || *version == &version::TLS13)
        });
        if versions.is_empty() {
            return Err(FloorError::NoneLeft);
        }
        let provider = CryptoProvider {
            cipher_suites: suites,
            ..(*own).clone()
        };
        Ok(Accepted {
            provider: provider.into(),
            versions,
        })
    }
}

/// What a listener accepts, for rustls.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// Its cryptography.
    pub provider: Arc<CryptoProvider>,
    /// Its versions, at least one.
    pub versions: Vec<&'static SupportedProtocolVersion>,
}

/// Whether a suite of that IANA name is spoken.
pub fn is_suite(name: &str) -> bool {
    names().iter().any(|known| known == name)
}

fn names() -> Vec<String> {
    let own = provider();
    let suites = own.cipher_suites.iter();
    suites.map(|suite| iana_name(*suite)).collect()
}

/// rustls names the suites of TLS 1.3 in a way of its own.
fn iana_name(suite: SupportedCipherSuite) -> String {
    let name = suite.suite().as_str().unwrap_or_default();
    name.replacen("TLS13_", "TLS_", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(min_version: TlsVersion, suites: &[&str]) -> TlsFloor {
        TlsFloor {
            min_version,
            cipher_suites: suites.iter().map(|&name| name.into()).collect(),
        }
    }

    #[test]
    fn by_default_both_versions_with_every_suite() {
        let accepted = TlsFloor::default().accepted().unwrap();
        assert_eq!(accepted.versions, [&version::TLS13, &version::TLS12]);
        assert_eq!(accepted.provider.cipher_suites.len(), names().len());
    }

    #[test]
    fn suites_decide_what_is_spoken() {
        let old = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
        let new = "TLS_AES_256_GCM_SHA384";
        let versions = |min, suites: &[&str]| floor(min, suites).accepted().unwrap().versions;
        assert_eq!(versions(TlsVersion::Tls12, &[old]), [&version::TLS12]);
        assert_eq!(versions(TlsVersion::Tls12, &[new]), [&version::TLS13]);
        assert_eq!(versions(TlsVersion::Tls13, &[old, new]), [&version::TLS13]);
        let none = floor(TlsVersion::Tls13, &[old]).accepted().unwrap_err();
        assert!(matches!(none, FloorError::NoneLeft));
        let unknown = floor(TlsVersion::Tls12, &["TLS_RSA_WITH_RC4_128_SHA"]);
        let error = unknown.accepted().unwrap_err().to_string();
        assert!(error.contains("RC4") && error.contains(old), "{error}");
    }
}
