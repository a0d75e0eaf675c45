//! Translation of a [`TlsFloor`] to rustls.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{SupportedCipherSuite, SupportedProtocolVersion, version};

use super::provider;
use cpc_config::tls_floor::{TlsFloor, TlsVersion};

/// The TLS versions and cryptography that a listener accepts, for rustls.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// Cryptography of the listener.
    pub provider: Arc<CryptoProvider>,
    /// TLS versions, at least one for a checked floor.
    pub versions: Vec<&'static SupportedProtocolVersion>,
}

/// Translates a floor. rustls refuses a configuration without a version.
pub fn accepted(floor: &TlsFloor) -> Accepted {
    let own = provider();
    let wanted = |suite: &SupportedCipherSuite| {
        floor.cipher_suites.is_empty() || floor.cipher_suites.contains(&iana_name(*suite))
    };
    let mut suites = own.cipher_suites.clone();
    suites.retain(wanted);
    let mut versions = vec![&version::TLS13, &version::TLS12];
    versions.retain(|version| {
        let spoken = suites.iter().any(|suite| suite.version() == *version);
        spoken && (floor.min_version == TlsVersion::Tls12 || *version == &version::TLS13)
    });
    let provider = CryptoProvider {
        cipher_suites: suites,
        ..(*own).clone()
    };
    Accepted {
        provider: provider.into(),
        versions,
    }
}

/// Returns the IANA name of a suite: rustls names those of TLS 1.3 differently.
fn iana_name(suite: SupportedCipherSuite) -> String {
    let name = suite.suite().as_str().unwrap_or_default();
    name.replacen("TLS13_", "TLS_", 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::tls_floor::SUITES;

    fn versions(
        min_version: TlsVersion,
        suites: &[&str],
    ) -> Vec<&'static SupportedProtocolVersion> {
        let cipher_suites = suites.iter().map(|&name| name.into()).collect();
        accepted(&TlsFloor {
            min_version,
            cipher_suites,
        })
        .versions
    }

    #[test]
    fn the_configuration_knows_every_suite() {
        let suites = accepted(&TlsFloor::default())
            .provider
            .cipher_suites
            .clone();
        let mut spoken: Vec<_> = suites.into_iter().map(iana_name).collect();
        let mut known = SUITES.map(str::to_owned);
        spoken.sort();
        known.sort();
        assert_eq!(spoken, known);
    }

    #[test]
    fn suites_decide_what_is_spoken() {
        let old = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
        let new = "TLS_AES_256_GCM_SHA384";
        let both = [&version::TLS13, &version::TLS12];
        assert_eq!(versions(TlsVersion::Tls12, &[]), both);
        assert_eq!(versions(TlsVersion::Tls12, &[old]), [&version::TLS12]);
        assert_eq!(versions(TlsVersion::Tls12, &[new]), [&version::TLS13]);
        assert_eq!(versions(TlsVersion::Tls13, &[old, new]), [&version::TLS13]);
    }
}
