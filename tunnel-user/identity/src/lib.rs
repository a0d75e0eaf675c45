//! Who a peer is, and how it is made sure of.
//!
//! An identity is the one URI in a certificate ([`identity`]); what may be a CA is in [`anchors`]. One
//! vouches for its own trust domain only ([`verify`]), for the callers of one listener ([`callers`]), for
//! servers by name ([`named`]), or for the CA that follows it ([`succession`]). Certificates, keys and
//! CAs are PEM files ([`pem`]) that are watched and read anew without a restart ([`material`]), and so is the list of
//! those who count no more ([`revoked`]); what is recorded of them is in [`audit`] and [`metrics`]; a CA of ours makes certificates ([`issue`]), which who joins asks
//! for and keeps ([`credential`]) of a server that it knows by its CA's hash ([`pin`]). What others than
//! we speak TLS with is in [`floor`]; what all verifiers do alike with signatures, in `signatures`. Identities by pattern are in [`pattern`].
//!
//! What an identity may do is not decided here: see `server::grants` and `agent::policy`.

pub mod anchors;
pub mod audit;
pub mod callers;
pub mod credential;
pub mod floor;
pub mod identity;
pub mod issue;
pub mod join;
pub mod lifetime;
pub mod material;
pub mod metrics;
pub mod named;
pub mod pattern;
pub mod pem;
pub mod pin;
pub mod revoked;
mod signatures;
pub mod succession;
#[cfg(test)]
pub(crate) mod testing;
pub mod verify;

pub use identity::{Identity, Role, TrustDomain};
pub use material::Material;
pub use pin::KeyHash;

use std::sync::Arc;

use rustls::CipherSuite;
use rustls::crypto::CryptoProvider;

/// ALPN of the tunnel, version 1.
pub const ALPN: &[u8] = b"cpc/1";

/// The cryptography of every TLS session: aws-lc-rs, with the hybrid X25519MLKEM768 key exchange
/// preferred (`prefer-post-quantum` of rustls).
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The same with AES-128-GCM first: both ends of a tunnel are ours, and as strong as the exchange
/// of keys is it costs a third less than the AES-256 that rustls prefers.
pub fn tunnel_provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}
