//! TLS versions and cipher suites that listeners for other programs accept. The tunnel speaks TLS 1.3
//! alone and has no such choice.

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The cipher suites that are spoken here, by their IANA names. Those of TLS 1.3 name no key exchange.
pub const SUITES: [&str; 9] = [
    "TLS_AES_256_GCM_SHA384",
    "TLS_AES_128_GCM_SHA256",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// TLS that a listener accepts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsFloor {
    /// The oldest version.
    pub min_version: TlsVersion,
    /// Cipher suites of TLS 1.2 and 1.3 by their IANA names; all that are safe when empty.
    pub cipher_suites: Vec<String>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TlsVersion {
    /// RFC 5246.
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    /// RFC 8446.
    #[serde(rename = "1.3")]
    Tls13,
}

impl TlsFloor {
    /// Checks that every suite is known and that one of them belongs to an accepted version.
    ///
    /// # Errors
    /// [`ConfigError::Value`] that names `key`.
    pub(super) fn check(&self, key: &str) -> Result<(), ConfigError> {
        let value =
            |below: &str, why: String| Err(ConfigError::value(format!("{key}.{below}"), why));
        if let Some(unknown) = self.cipher_suites.iter().find(|name| !is_suite(name)) {
            let all = SUITES.join(", ");
            return value(
                "cipher_suites",
                format!("{unknown} is not a supported cipher suite; {all} are"),
            );
        }
        let needs_new = self.min_version == TlsVersion::Tls13 && !self.cipher_suites.is_empty();
        if needs_new && !self.cipher_suites.iter().any(|name| is_of_tls13(name)) {
            return value(
                "cipher_suites",
                "none of the cipher suites is one of TLS 1.3, which min_version requires".into(),
            );
        }
        Ok(())
    }
}

/// Whether `cpc` supports the cipher suite with this IANA name.
pub fn is_suite(name: &str) -> bool {
    SUITES.contains(&name)
}

fn is_of_tls13(name: &str) -> bool {
    !name.contains("_WITH_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_that_accepts_nothing_is_refused() {
        let floor = |min_version, suites: &[&str]| {
            let cipher_suites = suites.iter().map(|&name| name.into()).collect();
            let floor = TlsFloor {
                min_version,
                cipher_suites,
            };
            floor.check("tls_floor").map_err(|error| error.to_string())
        };
        let (old, new) = (SUITES[4], SUITES[0]);
        assert!(!is_of_tls13(old) && is_of_tls13(new));
        assert_eq!(floor(TlsVersion::Tls12, &[old]), Ok(()));
        assert_eq!(floor(TlsVersion::Tls13, &[old, new]), Ok(()));
        assert_eq!(floor(TlsVersion::Tls13, &[]), Ok(()));
        let none = floor(TlsVersion::Tls13, &[old]).unwrap_err();
        assert!(none.contains("TLS 1.3"), "{none}");
        let unknown = floor(TlsVersion::Tls12, &["TLS_RSA_WITH_RC4_128_SHA"]).unwrap_err();
        assert!(
            unknown.contains("RC4") && unknown.contains(old),
            "{unknown}"
        );
    }
}
