//! A key of our own and the certificate that was issued for it: asked for, checked, and kept in one file.
//!
//! One file, since it is replaced in one step: a crash between a key's file and its certificate's would
//! leave neither of use.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use tunnel_proto::certificate::Issued;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::identity::{Identity, IdentityError, Role};
use super::material::load_certificates;
use super::revoked::Revocations;
use super::verify::{PeerVerifier, TrustStore};

/// Why there is no credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file.
    #[error("{}: {why}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system says.
        why: io::Error,
    },
    /// The key.
    #[error("the key: {0}")]
    Key(#[from] rcgen::Error),
    /// The certificate names nobody.
    #[error("what the server sent is of no use: {0}")]
    Identity(#[from] IdentityError),
    /// The certificate names somebody else.
    #[error("the server sent the certificate of {found}, who is not {expected}")]
    Another {
        /// Whose it is.
        found: Box<Identity>,
        /// The name that was asked for.
        expected: String,
    },
    /// The certificate is not for our key, or not by a CA that the server named.
    #[error("what the server sent is of no use: {0}")]
    Chain(#[from] rustls::Error),
}

/// A key that waits for its certificate.
pub struct Draft(KeyPair);

impl Draft {
    /// A fresh key (ECDSA with P-256).
    ///
    /// # Errors
    /// [`CredentialError::Key`].
    pub fn generate() -> Result<Self, CredentialError> {
        Ok(Self(KeyPair::generate()?))
    }

    /// The key that lies in `file`, or a fresh one, which then does: whoever asks again shall be known.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn kept_in(file: &Path) -> Result<Self, CredentialError> {
        match fs::read_to_string(file) {
            Ok(pem) => Ok(Self(KeyPair::from_pem(&pem)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let draft = Self::generate()?;
                write(file, &draft.0.serialize_pem(), 0o600)?;
                Ok(draft)
            }
            Err(why) => Err(CredentialError::File {
                path: file.into(),
                why,
            }),
        }
    }

    /// A request for a certificate (PKCS #10, DER), whose subject is for people to read.
    ///
    /// # Errors
    /// [`CredentialError::Key`].
    pub fn request(&self, name: &str) -> Result<Vec<u8>, CredentialError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }

    /// Takes what was issued, if it is of use: for this key, for the agent `name`, and vouched for by the
    /// roots that came with it.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn complete(
        &self,
        issued: Issued,
        name: &str,
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
        if *identity.name != *name || identity.role != Role::Agent {
            return Err(CredentialError::Another {
                found: identity.into(),
                expected: name.into(),
            });
        }
        let mut store = RootCertStore::empty();
        for root in &roots {
            store.add(root.clone())?;
        }
        let mut trust = TrustStore::default();
        trust
            .add(identity.trust_domain.clone(), store, provider)
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let trust = Arc::new(ArcSwap::from_pointee(trust));
        PeerVerifier::new(Role::Agent, trust, Revocations::none(), provider.clone())
            .verify_client_cert(leaf, between, UnixTime::now())?;
        let (_, not_after) = validity(leaf).ok_or_else(no_certificate)?;
        let mut pem = self.0.serialize_pem();
        key.cert.iter().for_each(|der| pem.push_str(&to_pem(der)));
        Ok(Credential {
            identity,
            not_after,
            pem,
            roots,
        })
    }
}

fn no_certificate() -> rustls::Error {
    rustls::CertificateError::BadEncoding.into()
}

/// A key, its certificate, and whom its owner trusts.
pub struct Credential {
    /// Whose it is.
    pub identity: Identity,
    /// The last moment at which it is valid.
    pub not_after: SystemTime,
    pem: String,
    roots: Vec<CertificateDer<'static>>,
}

impl Credential {
    /// Puts roots in the place of `ca`, where they are others, and then key and certificate in the place
    /// of `file`; each in one step.
    ///
    /// # Errors
    /// [`CredentialError::File`].
    pub fn save(&self, file: &Path, ca: &Path) -> Result<(), CredentialError> {
        if load_certificates(ca).ok().as_ref() != Some(&self.roots) {
            let roots: String = self.roots.iter().map(|der| to_pem(der)).collect();
            write(ca, &roots, 0o644)?;
        }
        write(file, &self.pem, 0o600)
    }
}

/// From when until when a certificate is valid.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, read) = X509Certificate::from_der(certificate).ok()?;
    let validity = read.validity();
    let time = |at: x509_parser::time::ASN1Time| SystemTime::from(at.to_datetime());
    Some((time(validity.not_before), time(validity.not_after)))
}

/// Writes a file in one step, so that it is there after a crash, whole.
fn write(path: &Path, content: &str, mode: u32) -> Result<(), CredentialError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let written = || {
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(folder)?;
        file.write_all(content.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(folder)?.sync_all()
    };
    written().map_err(|why| CredentialError::File {
        path: path.into(),
        why,
    })
}

/// RFC 7468.
fn to_pem(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().copied().map(char::from));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::tls::issue::{Applicant, Authority, Request};
    use crate::tls::material::load_key;
    use crate::tls::provider;

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
        let applicant = Applicant::read(csr).unwrap();
        let leaf = authority.certify(&request, &applicant).unwrap();
        let roots = load_certificates(&folder.join("ca.crt")).unwrap();
        Issued {
            chain: vec![leaf.to_vec()],
            roots: roots.iter().map(|der| der.to_vec()).collect(),
        }
    }

    #[test]
    fn what_was_issued_is_kept_whole() {
        let place = tempfile::tempdir().unwrap();
        let ca = place.path().join("ca");
        let authority = authority(&ca, "cluster.local");
        let pending = place.path().join("pending");
        let csr = Draft::kept_in(&pending).unwrap().request("w1").unwrap();
        // Asked again, the key is the same.
        let draft = Draft::kept_in(&pending).unwrap();
        let again = Applicant::read(&draft.request("w1").unwrap()).unwrap();
        assert_eq!(Applicant::read(&csr).unwrap().key(), again.key());
        let issued = issue(&authority, &ca, "w1", &csr);
        let credential = draft.complete(issued, "w1", &provider()).unwrap();
        let (file, roots) = (place.path().join("agent.pem"), place.path().join("ca.crt"));
        credential.save(&file, &roots).unwrap();
        let key = load_key(&file, &file, &provider()).unwrap();
        let identity = Identity::from_certificate(&key.cert[0]).unwrap();
        assert_eq!(identity.uri(), "spiffe://cluster.local/agent/w1");
        assert_eq!(
            load_certificates(&roots).unwrap(),
            load_certificates(&ca.join("ca.crt")).unwrap()
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
        let draft = Draft::generate().unwrap();
        let csr = draft.request("w1").unwrap();
        let good = issue(&authority, &ca, "w1", &csr);
        let refused = |issued: Issued, name| draft.complete(issued, name, &provider()).is_err();
        assert!(!refused(good.clone(), "w1"));
        assert!(refused(good.clone(), "w2"), "another name");
        let foreign = Draft::generate().unwrap().request("w1").unwrap();
        assert!(
            refused(issue(&authority, &ca, "w1", &foreign), "w1"),
            "another key"
        );
        let roots = load_certificates(&other_ca.join("ca.crt")).unwrap();
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

    #[test]
    fn a_request_that_was_tampered_with_is_refused() {
        let mut csr = Draft::generate().unwrap().request("w1").unwrap();
        assert!(Applicant::read(&csr).is_ok());
        let last = csr.len() - 1;
        csr[last] ^= 1;
        assert!(Applicant::read(&csr).is_err());
        assert!(Applicant::read(b"x").is_err());
    }
}
