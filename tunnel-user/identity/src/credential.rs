//! A key of this process and its certificate: requested, checked, and stored in one file.
//!
//! One file can be replaced in one step. With two, a crash between the writes would leave neither
//! usable.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use tunnel_proto::certificate::Issued;

use super::anchors::{Anchor, AnchorError, Anchors};
use super::identity::{Identity, IdentityError, Role, TrustDomain};
use super::key_hash::KeyHash;
use super::pem;
use super::revoked::Revocations;
use super::succession::{self, Reason, Succession};
use super::validity::validity;
use super::verify::{PeerVerifier, TrustStore};
use cpc_host::directory::Directory;

/// Failure to get a credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file can't be read or written.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        why: io::Error,
    },
    /// The key can't be generated.
    #[error("the key: {0}")]
    Key(rcgen::Error),
    /// The certificate has no identity.
    #[error("the certificate from the server is unusable: {0}")]
    Identity(IdentityError),
    /// The certificate has another identity.
    #[error("the server sent the certificate of {found}, not of {expected}")]
    Another {
        /// Identity in the certificate.
        found: Box<Identity>,
        /// The requested name, or the identity to be renewed.
        expected: String,
    },
    /// A CA certificate is not one.
    #[error("the CA certificate from the server is unusable: {0}")]
    Anchor(AnchorError),
    /// The server offered no CA that counts.
    #[error("the server sent no CA that counts here{}", listed(.0))]
    NoCa(Vec<(Anchor, Reason)>),
    /// The clock of this host or of the server is wrong.
    #[error(
        "the certificate that was just issued is valid {0}: this host's clock is wrong, or the server's"
    )]
    Clock(String),
    /// The certificate is not for our key, or not by a CA that the server named.
    #[error("the certificate from the server is unusable: {0}")]
    Chain(rustls::Error),
}

impl From<rcgen::Error> for CredentialError {
    fn from(why: rcgen::Error) -> Self {
        Self::Key(why)
    }
}

impl From<IdentityError> for CredentialError {
    fn from(why: IdentityError) -> Self {
        Self::Identity(why)
    }
}

impl From<AnchorError> for CredentialError {
    fn from(why: AnchorError) -> Self {
        Self::Anchor(why)
    }
}

impl From<rustls::Error> for CredentialError {
    fn from(why: rustls::Error) -> Self {
        Self::Chain(why)
    }
}

/// A key that waits for its certificate.
pub struct PendingCredential(KeyPair);

impl PendingCredential {
    /// Generates a key (ECDSA with P-256).
    ///
    /// # Errors
    /// [`CredentialError::Key`].
    pub fn generate() -> Result<Self, CredentialError> {
        Ok(Self(KeyPair::generate()?))
    }

    /// Reads the key in `file`, or generates one and writes it there: a repeated request must have the
    /// same key.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn load_or_generate(file: &Path) -> Result<Self, CredentialError> {
        let read = Directory::of(file).and_then(|(directory, name)| directory.read(name));
        match read {
            Ok(pem) => Ok(Self(
                KeyPair::from_pem(&String::from_utf8_lossy(&pem)).map_err(|_| {
                    CredentialError::File {
                        path: file.into(),
                        why: io::Error::other("holds no key of cpc; remove it, and join again"),
                    }
                })?,
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pending = Self::generate()?;
                write(file, &pending.0.serialize_pem(), 0o600)?;
                Ok(pending)
            }
            Err(why) => Err(CredentialError::File {
                path: file.into(),
                why,
            }),
        }
    }

    /// Returns a certificate request (PKCS #10, DER), whose subject is for people to read.
    ///
    /// # Errors
    /// [`CredentialError::Key`].
    pub fn request(&self, name: &str) -> Result<Vec<u8>, CredentialError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }

    /// Checks the issued certificate: it must be for this key and the expected identity, and vouched
    /// for by a CA that was trusted before or by one that such a CA vouches for ([`succession`]).
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn complete(
        &self,
        issued: Issued,
        expected: &Expected<'_>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Credential, CredentialError> {
        let der = |list: Vec<Vec<u8>>| list.into_iter().map(CertificateDer::from);
        let chain: Vec<_> = der(issued.chain).collect();
        let roots: Vec<_> = der(issued.roots).collect();
        let key = PrivateKeyDer::try_from(self.0.serialize_der());
        let key = key.map_err(|why| rustls::Error::General(why.into()))?;
        // It checks that key and certificate belong together.
        let key = CertifiedKey::from_der(chain, key, provider)?;
        let (leaf, between) = key.cert.split_first().ok_or_else(no_certificate)?;
        let identity = Identity::from_certificate(leaf)?;
        expected.check(&identity)?;
        let now = SystemTime::now();
        let (not_before, not_after) = validity(leaf).ok_or_else(no_certificate)?;
        let at = |at| humantime::format_rfc3339_seconds(at);
        if now < not_before {
            return Err(CredentialError::Clock(format!(
                "from {} on",
                at(not_before)
            )));
        }
        if now > not_after {
            return Err(CredentialError::Clock(format!("until {}", at(not_after))));
        }
        let Succession { accepted, refused } =
            expected.judge(roots, &identity.trust_domain, now, provider)?;
        if accepted.is_empty() {
            return Err(CredentialError::NoCa(refused));
        }
        let roots = accepted.certificates();
        let mut trust = TrustStore::default();
        trust.add(identity.trust_domain.clone(), accepted);
        let trust = Arc::new(ArcSwap::from_pointee(trust));
        PeerVerifier::new(Role::Agent, trust, Revocations::none(), provider.clone())
            .verify_client_cert(leaf, between, UnixTime::now())?;
        let mut text = self.0.serialize_pem();
        key.cert
            .iter()
            .for_each(|der| text.push_str(&pem::encode(der)));
        Ok(Credential {
            identity,
            not_before,
            not_after,
            refused,
            pem: text,
            roots,
        })
    }
}

/// The expected identity of an issued certificate, and the CAs trusted so far.
#[derive(Clone, Copy, Debug)]
pub enum Expected<'a> {
    /// A first certificate. Hashes of keys identify the CAs.
    Join {
        /// Name of the node.
        name: &'a str,
        /// Hashes of the keys of the CAs.
        pins: &'a [KeyHash],
    },
    /// A certificate that replaces the present one.
    Renewal {
        /// Identity of the present certificate.
        identity: &'a Identity,
        /// CAs of its trust domain.
        anchors: &'a Anchors,
    },
}

impl Expected<'_> {
    fn check(&self, found: &Identity) -> Result<(), CredentialError> {
        let (is_expected, expected) = match self {
            Self::Join { name, .. } => (
                *found.name == **name && found.role == Role::Agent,
                (*name).to_owned(),
            ),
            Self::Renewal { identity, .. } => (found.uri() == identity.uri(), identity.uri()),
        };
        match is_expected {
            true => Ok(()),
            false => Err(CredentialError::Another {
                found: found.clone().into(),
                expected,
            }),
        }
    }

    fn judge(
        &self,
        offered: Vec<CertificateDer<'static>>,
        domain: &TrustDomain,
        now: SystemTime,
        provider: &CryptoProvider,
    ) -> Result<Succession, AnchorError> {
        let algorithms = &provider.signature_verification_algorithms;
        match self {
            Self::Join { pins, .. } => {
                let is_pinned =
                    |it: &&CertificateDer<'_>| KeyHash::of(it).is_ok_and(|key| pins.contains(&key));
                let pinned = offered.iter().filter(is_pinned).cloned().collect();
                let present = Anchors::new(pinned)?.of_domain(domain);
                succession::judge(offered, &present, domain, now, algorithms)
            }
            Self::Renewal { anchors, .. } => {
                succession::judge(offered, anchors, domain, now, algorithms)
            }
        }
    }
}

/// Lists refused CAs, for people.
fn listed(refused: &[(Anchor, Reason)]) -> String {
    let refused = refused
        .iter()
        .map(|(ca, why)| format!("; {} ({}): {why}", ca.subject(), ca.key()));
    refused.collect()
}

fn no_certificate() -> rustls::Error {
    rustls::CertificateError::BadEncoding.into()
}

/// A key, its certificate, and the CAs that its owner trusts.
pub struct Credential {
    /// Identity in the certificate.
    pub identity: Identity,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// CAs that the server offered and that don't count.
    pub refused: Vec<(Anchor, Reason)>,
    pem: String,
    roots: Vec<CertificateDer<'static>>,
}

impl Credential {
    /// Replaces `ca` by the new roots, where they differ, and then `file` by key and certificate; each
    /// in one step.
    ///
    /// # Errors
    /// [`CredentialError::File`].
    pub fn save(&self, file: &Path, ca: &Path) -> Result<(), CredentialError> {
        if pem::certificates(ca).ok().as_ref() != Some(&self.roots) {
            let roots: String = self.roots.iter().map(|der| pem::encode(der)).collect();
            write(ca, &roots, 0o644)?;
        }
        write(file, &self.pem, 0o600)
    }
}

/// Writes a file in one step, so that a crash leaves the old or the new one whole.
fn write(path: &Path, content: &str, mode: u32) -> Result<(), CredentialError> {
    let written = Directory::of(path)
        .and_then(|(directory, name)| directory.replace(name, content.as_bytes(), mode));
    written.map_err(|why| CredentialError::File {
        path: path.into(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;
    use crate::issue::{Authority, Request, SigningRequest};
    use crate::material::load_key;
    use crate::pem::certificates;
    use crate::provider;

    fn authority(folder: &Path, domain: &str) -> Authority {
        let end = SystemTime::now() + Duration::from_secs(86_400);
        Authority::create(folder, &domain.parse().unwrap(), end).unwrap();
        Authority::open(folder).unwrap()
    }

    fn issue(authority: &Authority, folder: &Path, name: &str, csr: &[u8]) -> Issued {
        let request = Request {
            role: Role::Agent,
            name: name.into(),
            dns: vec![],
            addresses: vec!["10.99.1.2".parse().unwrap()],
            not_after: authority.not_after(),
        };
        let csr = SigningRequest::read(csr).unwrap();
        let leaf = authority.certify(&request, &csr).unwrap();
        let roots = certificates(&folder.join("ca.crt")).unwrap();
        Issued {
            chain: vec![leaf.to_vec()],
            roots: roots.iter().map(|der| der.to_vec()).collect(),
        }
    }

    fn pin(folder: &Path) -> KeyHash {
        KeyHash::of(&certificates(&folder.join("ca.crt")).unwrap()[0]).unwrap()
    }

    fn join<'a>(name: &'a str, pins: &'a [KeyHash]) -> Expected<'a> {
        Expected::Join { name, pins }
    }

    #[test]
    fn what_was_issued_is_kept_whole() {
        let place = tempfile::tempdir().unwrap();
        let ca = place.path().join("ca");
        let authority = authority(&ca, "cluster.local");
        let pending = place.path().join("pending");
        let csr = PendingCredential::load_or_generate(&pending)
            .unwrap()
            .request("w1")
            .unwrap();
        // Asked again, the key is the same.
        let pending = PendingCredential::load_or_generate(&pending).unwrap();
        let again = SigningRequest::read(&pending.request("w1").unwrap()).unwrap();
        assert_eq!(SigningRequest::read(&csr).unwrap().key(), again.key());
        let issued = issue(&authority, &ca, "w1", &csr);
        let pins = [pin(&ca)];
        let credential = pending.complete(issued, &join("w1", &pins), &provider());
        let credential = credential.unwrap();
        let (file, roots) = (place.path().join("agent.pem"), place.path().join("ca.crt"));
        credential.save(&file, &roots).unwrap();
        let key = load_key(&file, &file, &provider()).unwrap();
        let identity = Identity::from_certificate(&key.cert[0]).unwrap();
        assert_eq!(identity.uri(), "spiffe://cluster.local/agent/w1");
        assert_eq!(
            certificates(&roots).unwrap(),
            certificates(&ca.join("ca.crt")).unwrap()
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&roots)), (0o600, 0o644));
    }

    #[test]
    fn what_is_of_no_use_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let (ca, other_ca) = (place.path().join("ca"), place.path().join("other"));
        let authority = authority(&ca, "cluster.local");
        self::authority(&other_ca, "cluster.local");
        let pending = PendingCredential::generate().unwrap();
        let csr = pending.request("w1").unwrap();
        let good = issue(&authority, &ca, "w1", &csr);
        let pins = [pin(&ca)];
        let refused = |issued: Issued, name| {
            let expected = join(name, &pins);
            pending.complete(issued, &expected, &provider()).is_err()
        };
        assert!(!refused(good.clone(), "w1"));
        assert!(refused(good.clone(), "w2"), "another name");
        let foreign = PendingCredential::generate()
            .unwrap()
            .request("w1")
            .unwrap();
        assert!(
            refused(issue(&authority, &ca, "w1", &foreign), "w1"),
            "another key"
        );
        let roots = certificates(&other_ca.join("ca.crt")).unwrap();
        let roots = roots.iter().map(|der| der.to_vec()).collect();
        assert!(
            refused(
                Issued {
                    roots,
                    ..good.clone()
                },
                "w1"
            ),
            "another CA"
        );
        let chain = vec![vec![0; 9]];
        assert!(refused(Issued { chain, ..good }, "w1"), "garbage");
    }

    /// A server shows its own certificate, which proves no CA of its own.
    #[test]
    fn a_server_brings_no_ca_of_its_own() {
        let place = tempfile::tempdir().unwrap();
        let (ca, new_ca) = (place.path().join("ca"), place.path().join("new"));
        let foreign_ca = place.path().join("foreign");
        let old = authority(&ca, "cluster.local");
        let new = authority(&new_ca, "cluster.local");
        let foreign = authority(&foreign_ca, "other.local");
        let pending = PendingCredential::generate().unwrap();
        let csr = pending.request("w1").unwrap();
        let read = |folder: &Path| certificates(&folder.join("ca.crt")).unwrap();
        let first = issue(&old, &ca, "w1", &csr);
        let leaf = CertificateDer::from(first.chain[0].clone());
        let me = Identity::from_certificate(&leaf).unwrap();
        let anchors = Anchors::new(read(&ca)).unwrap();
        let renewal = Expected::Renewal {
            identity: &me,
            anchors: &anchors,
        };
        let pins = [pin(&ca)];
        let der = |list: &[CertificateDer<'_>]| list.iter().map(|it| it.to_vec()).collect();
        let with_roots = |issued: Issued, roots: &[CertificateDer<'_>]| Issued {
            roots: der(roots),
            ..issued
        };
        let both = [read(&ca), read(&new_ca)].concat();
        for expected in [renewal, join("w1", &pins)] {
            let complete = |issued| pending.complete(issued, &expected, &provider());
            // A CA of its own, alone or beside the one that is trusted, and of another domain.
            let by_new = issue(&new, &new_ca, "w1", &csr);
            assert!(complete(by_new.clone()).is_err());
            assert!(complete(with_roots(by_new.clone(), &both)).is_err());
            let by_foreign = issue(&foreign, &foreign_ca, "w1", &csr);
            assert!(complete(by_foreign.clone()).is_err());
            let mixed = [read(&ca), read(&foreign_ca)].concat();
            assert!(complete(with_roots(by_foreign, &mixed)).is_err());
            assert!(complete(with_roots(first.clone(), &[])).is_err());
            // The issued certificate is kept, the CA without a voucher is not.
            let credential = complete(with_roots(first.clone(), &both)).unwrap();
            assert_eq!(credential.roots, read(&ca));
            assert_eq!(credential.refused.len(), 1);
            // The old CA vouches for the new one.
            let bridge = old.cross_sign(&read(&new_ca)[0]).unwrap();
            let all = [both.clone(), vec![bridge]].concat();
            for issued in [first.clone(), by_new] {
                let credential = complete(with_roots(issued, &all)).unwrap();
                assert_eq!(credential.roots, all);
                assert!(credential.refused.is_empty());
            }
        }
        // Another node's certificate is refused, even one of the same name.
        let other = Identity::new("other.local".parse().unwrap(), Role::Agent, "w1").unwrap();
        let renewal = Expected::Renewal {
            identity: &other,
            anchors: &anchors,
        };
        assert!(pending.complete(first, &renewal, &provider()).is_err());
        // Only a CA of the same trust domain can be signed.
        assert!(old.cross_sign(&read(&foreign_ca)[0]).is_err());
        assert!(old.cross_sign(&leaf).is_err());
    }

    #[test]
    fn a_request_that_was_tampered_with_is_refused() {
        let mut csr = PendingCredential::generate()
            .unwrap()
            .request("w1")
            .unwrap();
        assert!(SigningRequest::read(&csr).is_ok());
        let last = csr.len() - 1;
        csr[last] ^= 1;
        assert!(SigningRequest::read(&csr).is_err());
        assert!(SigningRequest::read(b"x").is_err());
    }
}
