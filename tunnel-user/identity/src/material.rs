//! Certificates, keys and CAs: read from files, checked, and reloaded when they change.
//!
//! Invariant: the material in force was whole and consistent when it was read. A failed reload keeps
//! the old material and is logged. A reload does not affect live connections.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, SignatureScheme};

use super::anchors::{Anchor, Anchors};
use super::identity::{Identity, Role, TrustDomain};
use super::lifetime::{Certificates, Lifetime, Purpose};
pub use super::material_error::MaterialError;
use super::pem;
use super::reloading::{fingerprint, watch};
use super::revoked::Revocations;
use super::verify::{PeerVerifier, TrustStore};
use cpc_config::TlsFiles;
use cpc_host::report::report;

/// Iterates over the watched files.
fn all(files: &TlsFiles) -> impl Iterator<Item = &PathBuf> {
    let own = [&files.cert, &files.key, &files.ca];
    own.into_iter()
        .chain(files.trust.iter().map(|(_, path)| path))
}

/// Reads a PEM chain and its key.
///
/// # Errors
/// [`MaterialError`] naming the file.
pub fn load_key(
    cert: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, MaterialError> {
    let chain = pem::certificates(cert)?;
    let private = pem::private_key(key)?;
    let private = provider.key_provider.load_private_key(private);
    let private = private.map_err(|_| MaterialError::KeyKind(key.into()))?;
    let pair = CertifiedKey::new(chain, private);
    match pair.keys_match() {
        // For some kinds of keys the comparison is impossible.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(pair),
        Err(rustls::Error::InconsistentKeys(_)) => Err(MaterialError::Mismatch {
            cert: cert.into(),
            key: key.into(),
        }),
        Err(error) => Err(file(cert, &error)),
    }
}

/// Reads the CAs in a PEM file.
///
/// # Errors
/// [`MaterialError`] naming the file, and the certificate in it that is not a CA's.
pub fn load_anchors(path: &Path) -> Result<Anchors, MaterialError> {
    Anchors::new(pem::certificates(path)?).map_err(|error| file(path, &error))
}

fn file(path: &Path, why: &dyn fmt::Display) -> MaterialError {
    MaterialError::File {
        path: path.into(),
        why: why.to_string(),
    }
}

/// The key, identity and trusted CAs of one side, all of which may change while in use.
#[derive(Debug)]
pub struct Material {
    files: TlsFiles,
    role: Role,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Own>,
    trust: Arc<ArcSwap<TrustStore>>,
    ca_changes: AtomicU64,
    revocations: Arc<Revocations>,
}

#[derive(Debug)]
struct Own {
    identity: Identity,
    key: Arc<CertifiedKey>,
    fingerprint: Vec<u8>,
}

/// Change of the trusted CAs by a reload.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// Added CAs, by trust domain.
    pub added: Vec<(TrustDomain, Anchor)>,
    /// Removed CAs, by trust domain.
    pub removed: Vec<(TrustDomain, Anchor)>,
}

impl Change {
    fn between(old: &TrustStore, new: &TrustStore) -> Self {
        Self {
            added: beyond(new, old),
            removed: beyond(old, new),
        }
    }

    /// Returns the number of changes.
    pub fn count(&self) -> usize {
        self.added.len() + self.removed.len()
    }
}

/// Returns the CAs in `store` that are not in `other`.
fn beyond(store: &TrustStore, other: &TrustStore) -> Vec<(TrustDomain, Anchor)> {
    let all = store.domains();
    let all = all.flat_map(|(domain, anchors)| anchors.iter().map(move |ca| (domain, ca)));
    let more = all.filter(|(domain, ca)| {
        let there = other.of(domain);
        !there.is_some_and(|anchors| anchors.contains(ca.certificate()))
    });
    more.map(|(domain, ca)| (domain.clone(), ca.clone()))
        .collect()
}

impl Material {
    /// Reads `files`, whose leaf must be for `role`.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file at fault.
    pub fn load(
        files: TlsFiles,
        role: Role,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<Self>, MaterialError> {
        let (own, trust) = read(&files, role, &provider)?;
        let revocations = Revocations::load(files.revoked.clone())?;
        Ok(Arc::new(Self {
            revocations,
            files,
            role,
            provider,
            current: ArcSwap::from_pointee(own),
            trust: Arc::new(ArcSwap::from_pointee(trust)),
            ca_changes: AtomicU64::default(),
        }))
    }

    /// Returns our own identity, from the certificate in force.
    pub fn identity(&self) -> Identity {
        self.current.load().identity.clone()
    }

    /// Returns our own chain and key in force.
    pub fn key(&self) -> Arc<CertifiedKey> {
        self.current.load().key.clone()
    }

    /// Returns the trusted trust domains.
    pub fn domains(&self) -> HashSet<TrustDomain> {
        let trust = self.trust.load();
        trust.domains().map(|(domain, _)| domain.clone()).collect()
    }

    /// Returns the CAs of our own trust domain.
    pub fn anchors(&self) -> Arc<Anchors> {
        let own = self.identity().trust_domain;
        self.trust.load().of(&own).cloned().unwrap_or_default()
    }

    /// Returns the certificates of these CAs.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.anchors().certificates()
    }

    /// Returns the paths of the files.
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Returns a verifier for peers of `role` that follows reloads.
    pub fn verifier(&self, role: Role) -> Arc<PeerVerifier> {
        let (trust, revocations) = (self.trust.clone(), self.revocations.clone());
        PeerVerifier::new(role, trust, revocations, self.provider.clone())
    }

    /// Returns the revoked peers, whose file has a watch of its own.
    pub fn revocations(&self) -> Arc<Revocations> {
        self.revocations.clone()
    }

    /// Reads the files again if one of them changed. Returns the change, if new material is in force.
    ///
    /// # Errors
    /// [`MaterialError`]; the old material stays in force.
    pub fn reload(&self) -> Result<Option<Change>, MaterialError> {
        if fingerprint(all(&self.files)) == self.current.load().fingerprint {
            return Ok(None);
        }
        let (own, trust) = read(&self.files, self.role, &self.provider)?;
        let current = self.identity();
        if own.identity.uri() != current.uri() {
            return Err(MaterialError::Another {
                path: self.files.cert.clone(),
                identity: own.identity.into(),
                current: current.into(),
            });
        }
        let change = Change::between(&self.trust.load(), &trust);
        let count = u64::try_from(change.count()).unwrap_or(u64::MAX);
        self.ca_changes.fetch_add(count, Ordering::Relaxed);
        self.trust.store(Arc::new(trust));
        self.current.store(Arc::new(own));
        Ok(Some(change))
    }

    /// Reloads the files every [`RELOAD_INTERVAL`](super::reloading::RELOAD_INTERVAL), without end. Calls `changed` for new material, and
    /// for an unusable file.
    pub async fn watch(self: Arc<Self>, changed: impl Fn(Result<&Change, &MaterialError>)) {
        let reload = || {
            if let Some(change) = self.reload()? {
                tracing::info!(identity = %self.identity(), "certificates reloaded");
                for (what, cas) in [("added", &change.added), ("removed", &change.removed)] {
                    for (domain, ca) in cas {
                        tracing::info!(%domain, ca = ca.subject(), key = %ca.key(), "CA {what}");
                    }
                }
                changed(Ok(&change));
            }
            Ok(())
        };
        let on_error = |error: &MaterialError| {
            tracing::warn!(
                error = report(error),
                "certificates not reloaded, the old ones stay"
            );
            changed(Err(error));
        };
        watch(reload, on_error).await;
    }
}

impl Certificates for Material {
    fn lifetimes(&self) -> Vec<Lifetime> {
        let (current, trust) = (self.current.load(), self.trust.load());
        let own = Lifetime::own(Purpose::Tunnel, &current.key, &self.files.cert);
        let domains = [(&current.identity.trust_domain, &self.files.ca)];
        let further = self.files.trust.iter().map(|(domain, file)| (domain, file));
        let cas = { domains.into_iter().chain(further) }.flat_map(|(domain, file)| {
            let anchors = trust.of(domain).map(|it| &**it);
            let lives = anchors.map(|it| Lifetime::cas(Purpose::Tunnel, it, file));
            lives.unwrap_or_default()
        });
        own.into_iter().chain(cas).collect()
    }

    fn ca_changes(&self) -> u64 {
        self.ca_changes.load(Ordering::Relaxed)
    }
}

impl ResolvesServerCert for Material {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().key.clone())
    }
}

impl ResolvesClientCert for Material {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn read(
    files: &TlsFiles,
    role: Role,
    provider: &Arc<CryptoProvider>,
) -> Result<(Own, TrustStore), MaterialError> {
    // Taken first: a file that changes while it is read is then read again.
    let fingerprint = fingerprint(all(files));
    let key = load_key(&files.cert, &files.key, provider)?;
    pem::warn_if_exposed(&files.key);
    let leaf = key
        .cert
        .first()
        .ok_or_else(|| file(&files.cert, &"holds no certificate"))?;
    let identity = Identity::from_certificate(leaf).map_err(|why| MaterialError::Identity {
        path: files.cert.clone(),
        why,
    })?;
    if identity.role != role {
        return Err(MaterialError::Role {
            path: files.cert.clone(),
            identity,
            expected: role,
        });
    }
    let mut trust = TrustStore::default();
    let own = (identity.trust_domain.clone(), files.ca.clone());
    for (domain, path) in std::iter::once(&own).chain(&files.trust) {
        trust.add(domain.clone(), load_anchors(path)?);
    }
    Ok((
        Own {
            identity,
            key: Arc::new(key),
            fingerprint,
        },
        trust,
    ))
}
