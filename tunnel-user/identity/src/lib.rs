//! Identities of peers, and their verification.
//!
//! An identity is the one URI in a certificate ([`identity`]). [`anchors`] checks CAs. A CA vouches for
//! its own trust domain only ([`verify`]), for the callers of one listener ([`caller_verifier`]), for servers
//! by name ([`named`]), or for the CA that follows it ([`succession`]). Certificates, keys and CAs are
//! PEM files ([`pem`]) that reload without a restart ([`material`]), and so is the list of revoked
//! peers ([`revoked`]). [`audit`] and [`metrics`] record them. A CA of ours issues certificates
//! ([`issue`]); a joining worker requests and keeps one ([`credential`]) of a server that it knows by
//! the hash of its CA ([`pin`]). [`floor`] sets TLS versions and suites towards other programs,
//! `signatures` holds the common part of all verifiers, and [`pattern`] matches identities.
//!
//! `server::grants` and `agent::policy` decide about the rights of an identity.

pub mod anchors;
pub mod audit;
pub mod caller_verifier;
pub mod credential;
pub mod floor;
pub mod identity;
pub mod issue;
pub mod join;
pub mod key_hash;
pub mod lifetime;
pub mod material;
mod material_error;
pub mod metrics;
pub mod named;
pub mod pattern;
pub mod pem;
pub mod pin;
pub mod reloading;
pub mod revoked;
mod signatures;
pub mod succession;
#[cfg(test)]
pub(crate) mod testing;
pub mod validity;
pub mod verify;

pub use identity::{Identity, Role, TrustDomain};
pub use key_hash::KeyHash;
pub use material::Material;

use std::sync::Arc;

use rustls::CipherSuite;
use rustls::crypto::CryptoProvider;

/// ALPN of the tunnel, version 1.
pub const ALPN: &[u8] = b"cpc/1";

/// Returns the cryptography of every TLS session: aws-lc-rs, with the hybrid X25519MLKEM768 key
/// exchange preferred (`prefer-post-quantum` of rustls).
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Returns the cryptography of tunnels, with AES-128-GCM first. Both ends are ours, and it costs a
/// third less than the AES-256 that rustls prefers, at the strength of the key exchange.
pub fn tunnel_provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}
