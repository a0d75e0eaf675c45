//! CAs identified by the hash of their key: a worker without a CA's certificate authenticates a server
//! by it.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, Error, OtherError};

use super::anchors::Anchors;
use super::identity::{Identity, Role};
use super::key_hash::KeyHash;
use super::revoked::Revocations;
use super::signatures::signatures;
use super::verify::{PeerVerifier, TrustStore};

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
