//! Certificates, keys and CAs: read from files, checked, and read anew when they change.
//!
//! Invariant: what is in force was whole and consistent when it was read. A reload that fails
//! keeps what was there and says so. Live connections are untouched by a reload.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};

use super::identity::{Identity, IdentityError, Role, TrustDomain};
use super::revoked::Revocations;
use super::verify::{PeerVerifier, TrustStore};

/// How often the files are looked at.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Where TLS material lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// PEM chain, the leaf first.
    pub cert: PathBuf,
    /// PEM private key of the leaf.
    pub key: PathBuf,
    /// PEM roots that vouch for the leaf's own trust domain.
    pub ca: PathBuf,
    /// Further trust domains and the PEM roots that vouch for each.
    pub trust: Vec<(TrustDomain, PathBuf)>,
    /// Peers who count no more.
    pub revoked: Option<PathBuf>,
}

impl Files {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        let own = [&self.cert, &self.key, &self.ca];
        own.into_iter()
            .chain(self.trust.iter().map(|(_, path)| path))
    }
}

/// Why TLS material was not taken.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// A file could not be read or holds no PEM.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The leaf is no identity.
    #[error("{}: {why}", path.display())]
    Identity {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong with it.
        why: IdentityError,
    },
    /// The leaf is for something else.
    #[error("{}: {identity} can't be used here, which needs a certificate for the role {expected}", path.display())]
    Role {
        /// The certificate's file.
        path: PathBuf,
        /// Whose it is.
        identity: Identity,
        /// What it should have been for.
        expected: Role,
    },
    /// A renewed certificate names somebody else than the running process.
    #[error("{}: {identity} is not {current}, who is running; restart to become another", path.display())]
    Another {
        /// The certificate's file.
        path: PathBuf,
        /// Whose it is.
        identity: Box<Identity>,
        /// Whose it was.
        current: Box<Identity>,
    },
    /// Key and certificate don't belong together.
    #[error("{}: the key is not that of {}: {why}", key.display(), cert.display())]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What rustls says.
        why: rustls::Error,
    },
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
    let chain = load_certificates(cert)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| file(key, &e))?;
    CertifiedKey::from_der(chain, private, provider).map_err(|why| MaterialError::Mismatch {
        cert: cert.into(),
        key: key.into(),
        why,
    })
}

/// Reads PEM roots.
///
/// # Errors
/// [`MaterialError`] naming the file.
pub fn load_roots(path: &Path) -> Result<RootCertStore, MaterialError> {
    let mut roots = RootCertStore::empty();
    for cert in load_certificates(path)? {
        roots.add(cert).map_err(|e| file(path, &e))?;
    }
    Ok(roots)
}

/// Reads PEM certificates, at least one.
///
/// # Errors
/// [`MaterialError::File`].
pub fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let certs = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| file(path, &e))?;
    if certs.is_empty() {
        return Err(file(path, &"holds no PEM certificate"));
    }
    Ok(certs)
}

fn file(path: &Path, why: &dyn fmt::Display) -> MaterialError {
    MaterialError::File {
        path: path.into(),
        why: why.to_string(),
    }
}

/// One side's key, its identity and whom it trusts, each of which may change while in use.
#[derive(Debug)]
pub struct Material {
    files: Files,
    role: Role,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Own>,
    trust: Arc<ArcSwap<TrustStore>>,
    revocations: Arc<Revocations>,
}

#[derive(Debug)]
struct Own {
    identity: Identity,
    key: Arc<CertifiedKey>,
    roots: Vec<CertificateDer<'static>>,
    fingerprint: Vec<u8>,
}

impl Material {
    /// Reads `files`, whose leaf must be for `role`.
    ///
    /// # Errors
    /// [`MaterialError`] naming the file at fault.
    pub fn load(
        files: Files,
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
        }))
    }

    /// Our own identity, as the certificate in force has it.
    pub fn identity(&self) -> Identity {
        self.current.load().identity.clone()
    }

    /// Our own chain and key, as they are in force.
    pub fn key(&self) -> Arc<CertifiedKey> {
        self.current.load().key.clone()
    }

    /// The roots that vouch for our own trust domain.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.current.load().roots.clone()
    }

    /// Where all of it lies.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// A verifier for peers of `role` that follows reloads.
    pub fn verifier(&self, role: Role) -> Arc<PeerVerifier> {
        let (trust, revocations) = (self.trust.clone(), self.revocations.clone());
        PeerVerifier::new(role, trust, revocations, self.provider.clone())
    }

    /// Peers who count no more; to be watched beside the material.
    pub fn revocations(&self) -> Arc<Revocations> {
        self.revocations.clone()
    }

    /// Reads the files again if one of them changed. Returns whether something new is in force.
    ///
    /// # Errors
    /// [`MaterialError`]; what was in force stays.
    pub fn reload(&self) -> Result<bool, MaterialError> {
        if fingerprint(self.files.all()) == self.current.load().fingerprint {
            return Ok(false);
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
        self.trust.store(Arc::new(trust));
        self.current.store(Arc::new(own));
        Ok(true)
    }

    /// Looks at the files every [`RELOAD_INTERVAL`], for ever, and calls `changed` when something
    /// new is in force.
    pub async fn watch(self: Arc<Self>, changed: impl Fn()) {
        let reload = || {
            let reloaded = self.reload()?;
            if reloaded {
                tracing::info!(identity = %self.identity(), "certificates reloaded");
                changed();
            }
            Ok(())
        };
        watch(reload).await;
    }
}

/// Calls `reload` every [`RELOAD_INTERVAL`], for ever, and says once of each kind of trouble that
/// what was there stays.
pub async fn watch(mut reload: impl FnMut() -> Result<(), MaterialError>) {
    let mut complaint = String::new();
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        match reload() {
            Ok(()) => complaint.clear(),
            Err(error) if error.to_string() != complaint => {
                tracing::warn!(%error, "certificates not reloaded, the old ones stay");
                complaint = error.to_string();
            }
            Err(_) => {}
        }
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
    files: &Files,
    role: Role,
    provider: &Arc<CryptoProvider>,
) -> Result<(Own, TrustStore), MaterialError> {
    // Taken first: a file that changes while it is read is then read again.
    let fingerprint = fingerprint(files.all());
    let key = load_key(&files.cert, &files.key, provider)?;
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
        trust
            .add(domain.clone(), load_roots(path)?, provider)
            .map_err(|e| file(path, &e))?;
    }
    Ok((
        Own {
            identity,
            key: Arc::new(key),
            roots: load_certificates(&files.ca)?,
            fingerprint,
        },
        trust,
    ))
}

/// Changes when a file's content does; a file that can't be read counts as empty.
pub fn fingerprint<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<u8> {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for path in paths {
        let content = std::fs::read(path).unwrap_or_default();
        digest.update(&(content.len() as u64).to_be_bytes());
        digest.update(&content);
    }
    digest.finish().as_ref().to_vec()
}
