//! Servers identified by host name: Konnectivity's, which have no identity of ours.

use std::sync::Arc;

use rustls::Error;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use webpki::KeyUsage;

use super::anchors::Anchors;
use super::signatures::signatures;
use super::verify::unknown_issuer;

/// A verifier of servers by the dialled host name and a CA.
#[derive(Debug)]
pub struct NamedVerifier {
    anchors: Anchors,
    provider: Arc<CryptoProvider>,
}

impl NamedVerifier {
    /// Creates the verifier of a handshake.
    pub fn new(anchors: Anchors, provider: Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self { anchors, provider })
    }
}

impl ServerCertVerifier for NamedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        let when = (now, KeyUsage::server_auth());
        let verified = self.anchors.verify(leaf, intermediates, when, algorithms);
        verified.map_err(unknown_issuer)?;
        verify_server_name(&ParsedCertificate::try_from(leaf)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}
