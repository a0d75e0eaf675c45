//! A cluster CA: it issues certificates with the right URI, key usage and addresses, with a key made
//! here or for the public key in a signing request.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};

use rustls::pki_types::CertificateDer;
use x509_parser::asn1_rs::Tag;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::anchors::Anchors;
use super::identity::{self, Identity, IdentityError, Role, TrustDomain};
use super::key_hash::KeyHash;
use super::material::MaterialError;
use super::{pem, provider, succession};
use cpc_host::directory::Directory;

/// Time before now at which validity begins, for clocks that disagree.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Reason why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A file could not be read or written.
    #[error("{}: {why}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        why: std::io::Error,
    },
    /// A file exists already and would be lost.
    #[error("{} exists: nothing was written; remove it first if it is to be replaced", .0.display())]
    Exists(PathBuf),
    /// A name is invalid in a certificate.
    #[error(transparent)]
    Name(#[from] IdentityError),
    /// The files of the CA hold no CA of ours.
    #[error("{}: {why}; make one with `cpc pki init`", path.display())]
    Ca {
        /// Certificate of the CA.
        path: PathBuf,
        /// Fault of the certificate.
        why: String,
    },
    /// A file of the CA holds something else.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The CA has expired.
    #[error("the CA has expired at {}; make another (docs/joining.md)", humantime::format_rfc3339_seconds(*.0))]
    Expired(SystemTime),
    /// This CA can't vouch for the other one.
    #[error("this CA can't vouch for that one: {0}")]
    CrossSign(String),
    /// The certificate can't be created.
    #[error("the certificate could not be made: {0}")]
    Rcgen(rcgen::Error),
    /// The system has no random numbers.
    #[error("no random numbers for a serial number")]
    Random,
}

impl From<rcgen::Error> for IssueError {
    fn from(why: rcgen::Error) -> Self {
        Self::Rcgen(why)
    }
}

/// The public key in a signing request, with proof of possession of the private one.
#[derive(Debug)]
pub struct SigningRequest(CertificateSigningRequestParams);

impl SigningRequest {
    /// Reads a PKCS #10 request (RFC 2986, DER). Only its key counts.
    ///
    /// # Errors
    /// The fault of the request, such as a signature by another key.
    pub fn read(csr: &[u8]) -> Result<Self, rcgen::Error> {
        CertificateSigningRequestParams::from_der(&csr.into()).map(Self)
    }

    /// Returns the SHA-256 of the key's `SubjectPublicKeyInfo`.
    pub fn key(&self) -> KeyHash {
        KeyHash::of_spki(&self.0.public_key.subject_public_key_info())
    }
}

/// A request for a certificate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Role of the holder.
    pub role: Role,
    /// Server id, node name or client name.
    pub name: String,
    /// DNS names that TLS clients may check (servers and frontends).
    pub dns: Vec<String>,
    /// Node addresses of an agent, or addresses of a frontend.
    pub addresses: Vec<IpAddr>,
    /// Last moment of validity.
    pub not_after: SystemTime,
}

/// A CA, in the files `ca.crt` and `ca.key` of one directory. The URI of the CA names its trust
/// domain.
#[derive(Debug)]
pub struct Authority {
    trust_domain: TrustDomain,
    not_after: SystemTime,
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Creates a CA for `trust_domain` in `dir`.
    ///
    /// # Errors
    /// [`IssueError::Exists`] when there is one already, [`IssueError::Io`] otherwise.
    pub fn create(
        dir: &Path,
        trust_domain: &TrustDomain,
        not_after: SystemTime,
    ) -> Result<(), IssueError> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{trust_domain} CA"));
        params.subject_alt_names = vec![SanType::URI(ca_uri(trust_domain).as_str().try_into()?)];
        set_validity(&mut params, not_after);
        let key = KeyPair::generate()?;
        let cert = params.self_signed(&key)?;
        let output = OutputDirectory::open(dir)?;
        output.put("ca.key", &key.serialize_pem(), 0o600)?;
        output.put_or_undo("ca.crt", &cert.pem(), &["ca.key"])
    }

    /// Opens the CA in `dir`.
    ///
    /// # Errors
    /// [`IssueError::Io`] or [`IssueError::Ca`].
    pub fn open(dir: &Path) -> Result<Self, IssueError> {
        let (path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        let wrong = |why: String| IssueError::Ca {
            path: path.clone(),
            why,
        };
        // The first is the one that issues.
        let certificate = pem::certificates(&path)?.swap_remove(0);
        let anchors = Anchors::new(vec![certificate.clone()]).map_err(|e| wrong(e.to_string()))?;
        let anchor = anchors.iter().next();
        let anchor = anchor.ok_or_else(|| wrong("holds no CA".into()))?;
        let domain = anchor.domain();
        let trust_domain = domain.ok_or_else(|| wrong("names no trust domain".into()))?;
        let key = KeyPair::try_from(&pem::private_key(&key_path)?)
            .map_err(|_| MaterialError::KeyKind(key_path.clone()))?;
        if KeyHash::of_spki(&key.subject_public_key_info()) != anchor.key() {
            return Err(MaterialError::Mismatch {
                cert: path,
                key: key_path,
            }
            .into());
        }
        Ok(Self {
            trust_domain,
            not_after: anchor.validity().1,
            pem: read(&path)?,
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            certificate,
        })
    }

    /// Returns the trust domain of the CA.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Returns the hash of the key.
    pub fn key(&self) -> KeyHash {
        KeyHash::of_spki(&self.issuer.key().subject_public_key_info())
    }

    /// Returns the last moment of validity of the CA, and of the certificates that it issues.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Issues a certificate for the key in `csr`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn certify(
        &self,
        request: &Request,
        csr: &SigningRequest,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let certificate = self.sign(request, &csr.0.public_key)?;
        Ok(certificate.der().clone())
    }

    /// Signs the certificate of the CA `other`, of the same trust domain. A peer that trusts this
    /// CA accepts the other one from a server that shows the result (RFC 4210 section 4.4, "new
    /// with old").
    ///
    /// # Errors
    /// [`IssueError::CrossSign`]: peers would not accept the result.
    pub fn cross_sign(
        &self,
        other: &CertificateDer<'static>,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let wrong = |why: &dyn fmt::Display| IssueError::CrossSign(why.to_string());
        let now = SystemTime::now();
        let anchors = Anchors::new(vec![other.clone()]).map_err(|e| wrong(&e))?;
        let anchor = anchors
            .iter()
            .next()
            .ok_or_else(|| wrong(&"there is none"))?;
        let (_, read) = X509Certificate::from_der(other).map_err(|e| wrong(&e))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(match anchor.path_length().map(u8::try_from) {
            None => BasicConstraints::Unconstrained,
            Some(length) => BasicConstraints::Constrained(length.unwrap_or(u8::MAX)),
        });
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = subject(&read)
            .ok_or_else(|| wrong(&"its subject has parts of other kinds than text"))?;
        params.subject_alt_names = vec![SanType::URI(
            ca_uri(&self.trust_domain).as_str().try_into()?,
        )];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        set_validity(&mut params, self.not_after.min(anchor.validity().1));
        let key = SubjectPublicKeyInfo::from_der(read.public_key().raw)?;
        let signed = params.signed_by(&key, &self.issuer)?.der().clone();
        // Judged as an agent does.
        let own = Anchors::new(vec![self.certificate.clone()]).map_err(|e| wrong(&e))?;
        let both = vec![other.clone(), signed.clone()];
        let algorithms = &provider().signature_verification_algorithms;
        let judged = succession::judge(both, &own, &self.trust_domain, now, algorithms);
        match judged.map_err(|e| wrong(&e))?.refused.first() {
            None => Ok(signed),
            Some((_, why)) => Err(wrong(why)),
        }
    }

    /// Cross-signs the first certificate in the file `other`, and writes a new file `out`: this CA, the
    /// other one, and the signed one. Returns the hash of the other one's key.
    ///
    /// # Errors
    /// [`IssueError`]; no existing file is overwritten.
    pub fn cross_sign_into(&self, other: &Path, out: &Path) -> Result<KeyHash, IssueError> {
        let other = pem::certificates(other)?.swap_remove(0);
        let signed = self.cross_sign(&other)?;
        let all = [&self.certificate, &other, &signed];
        let text: String = all.into_iter().map(pem::encode).collect();
        write_new(out, &text, 0o644)?;
        KeyHash::of(&other).map_err(|error| IssueError::CrossSign(error.to_string()))
    }

    fn sign(&self, request: &Request, key: &impl PublicKeyData) -> Result<Certificate, IssueError> {
        if SystemTime::now() > self.not_after {
            return Err(IssueError::Expired(self.not_after));
        }
        identity::check_name(&request.name)?;
        let uri = identity::uri(&self.trust_domain, request.role, &request.name);
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, request.name.clone());
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
        for dns in &request.dns {
            params
                .subject_alt_names
                .push(SanType::DnsName(dns.as_str().try_into()?));
        }
        let addresses = request.addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names.extend(addresses);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match request.role {
            Role::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Role::Agent | Role::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        set_validity(&mut params, request.not_after.min(self.not_after));
        Ok(params.signed_by(key, &self.issuer)?)
    }

    /// Makes a key and issues a certificate for it. Writes nothing.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn make(&self, request: &Request) -> Result<UnsavedCredential, IssueError> {
        let key = KeyPair::generate()?;
        let certificate = self.sign(request, &key)?;
        Ok(UnsavedCredential {
            identity: Identity::from_certificate(certificate.der())?,
            certificate,
            key: key.serialize_pem(),
            ca: self.pem.clone(),
        })
    }

    /// Issues a certificate into `out`.
    ///
    /// # Errors
    /// [`IssueError`]; no existing file is overwritten.
    pub fn issue(&self, request: &Request, out: &Path) -> Result<Identity, IssueError> {
        let credential = self.make(request)?;
        credential.save(&credential.output_directory(out)?)?;
        Ok(credential.identity)
    }
}

/// A key and its certificate, not written yet.
pub struct UnsavedCredential {
    /// Identity in the certificate.
    pub identity: Identity,
    certificate: Certificate,
    key: String,
    ca: String,
}

/// A directory without the files of a certificate.
pub struct OutputDirectory {
    path: PathBuf,
    directory: Directory,
}

impl UnsavedCredential {
    /// Returns the certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        self.certificate.der()
    }

    /// Opens the directory `out`, and creates it where it is missing.
    ///
    /// # Errors
    /// [`IssueError::Exists`]: there is a certificate or a key already.
    pub fn output_directory(&self, out: &Path) -> Result<OutputDirectory, IssueError> {
        let output = OutputDirectory::open(out)?;
        // A key alone would be in the way of the next try.
        match self
            .names()
            .into_iter()
            .find(|name| output.directory.has(name))
        {
            Some(there) => Err(IssueError::Exists(out.join(there))),
            None => Ok(output),
        }
    }

    /// Writes `<role>.crt`, `<role>.key` and a copy of `ca.crt`, if there is none.
    ///
    /// # Errors
    /// [`IssueError`]; no existing file is overwritten, and no new file is left to obstruct the next
    /// attempt.
    pub fn save(&self, output: &OutputDirectory) -> Result<(), IssueError> {
        let [certificate, key] = self.names();
        output.put(&key, &self.key, 0o600)?;
        output.put_or_undo(&certificate, &self.certificate.pem(), &[&key])?;
        match output.put_or_undo("ca.crt", &self.ca, &[&key, &certificate]) {
            Err(IssueError::Exists(_)) => Ok(()),
            put => put,
        }
    }

    fn names(&self) -> [String; 2] {
        ["crt", "key"].map(|kind| format!("{}.{kind}", self.identity.role))
    }
}

impl OutputDirectory {
    fn open(path: &Path) -> Result<Self, IssueError> {
        let opened = Directory::create(path, 0o755).map_err(|why| IssueError::Io {
            path: path.into(),
            why,
        });
        Ok(Self {
            path: path.into(),
            directory: opened?,
        })
    }

    /// Writes a file that every user may read. On failure, as on a full disk, removes those `before`
    /// it.
    fn put_or_undo(&self, name: &str, content: &str, before: &[&str]) -> Result<(), IssueError> {
        let put = self.put(name, content, 0o644);
        if let Err(IssueError::Io { .. }) = put {
            for name in before {
                let _ = self.directory.remove(name);
            }
        }
        put
    }

    fn put(&self, name: &str, content: &str, mode: u32) -> Result<(), IssueError> {
        let put = self.directory.create_new(name, content.as_bytes(), mode);
        put.map_err(|why| match why.kind() {
            std::io::ErrorKind::AlreadyExists => IssueError::Exists(self.path.join(name)),
            _ => IssueError::Io {
                path: self.path.join(name),
                why,
            },
        })
    }
}

/// Returns the serial number of a certificate, as `openssl x509 -serial` prints it and `tls.revoked`
/// takes it.
pub fn serial_of(certificate: &CertificateDer<'_>) -> String {
    let read = X509Certificate::from_der(certificate).ok();
    let serial = read.map(|(_, it)| it.raw_serial().to_vec());
    let octets = serial.unwrap_or_default();
    octets.iter().map(|octet| format!("{octet:02X}")).collect()
}

fn ca_uri(trust_domain: &TrustDomain) -> String {
    format!("spiffe://{trust_domain}")
}

/// Generates an unpredictable, unique serial number (RFC 5280 section 4.1.2.2): positive, 16 octets.
fn serial() -> Result<SerialNumber, IssueError> {
    let mut octets = [0; 16];
    aws_lc_rs::rand::fill(&mut octets).map_err(|_| IssueError::Random)?;
    // A leading zero would be left out, and a leading one mean a negative number.
    octets[0] = octets[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&octets))
}

/// Returns the subject of a certificate, if it consists of text.
fn subject(certificate: &X509Certificate<'_>) -> Option<DistinguishedName> {
    let mut name = DistinguishedName::new();
    for part in certificate.subject().iter_attributes() {
        let oid: Vec<_> = part.attr_type().iter()?.collect();
        let text = part.as_str().ok()?;
        let value = match part.attr_value().tag() {
            Tag::PrintableString => DnValue::PrintableString(text.try_into().ok()?),
            Tag::Ia5String => DnValue::Ia5String(text.try_into().ok()?),
            Tag::Utf8String => DnValue::Utf8String(text.into()),
            _ => return None,
        };
        name.push(DnType::from_oid(&oid), value);
    }
    Some(name)
}

fn set_validity(params: &mut CertificateParams, not_after: SystemTime) {
    let not_before = (SystemTime::now() - CLOCK_SKEW).min(not_after - CLOCK_SKEW);
    params.not_before = not_before.into();
    params.not_after = not_after.into();
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), IssueError> {
    let written = Directory::of(path)
        .and_then(|(directory, name)| directory.create_new(name, content.as_bytes(), mode));
    written.map_err(|why| match why.kind() {
        std::io::ErrorKind::AlreadyExists => IssueError::Exists(path.into()),
        _ => IssueError::Io {
            path: path.into(),
            why,
        },
    })
}

fn read(path: &Path) -> Result<String, IssueError> {
    fs::read_to_string(path).map_err(|why| IssueError::Io {
        path: path.into(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tomorrow() -> SystemTime {
        SystemTime::now() + Duration::from_secs(86_400)
    }

    #[test]
    fn an_issued_certificate_carries_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        Authority::create(dir.path(), &domain, tomorrow()).unwrap();
        let ca = Authority::open(dir.path()).unwrap();
        let request = Request {
            role: Role::Agent,
            name: "w1".into(),
            dns: vec![],
            addresses: vec![
                "10.99.1.2".parse().unwrap(),
                "fd00:99:1::2".parse().unwrap(),
            ],
            not_after: tomorrow(),
        };
        let out = dir.path().join("w1");
        let identity = ca.issue(&request, &out).unwrap();
        assert_eq!(identity.uri(), "spiffe://cluster.local/agent/w1");
        assert_eq!(identity.addresses, request.addresses);
        assert!(matches!(
            ca.issue(&request, &out),
            Err(IssueError::Exists(_))
        ));
        assert!(matches!(
            Authority::create(dir.path(), &domain, tomorrow()),
            Err(IssueError::Exists(_))
        ));
    }
}
