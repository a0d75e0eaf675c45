//! Making a cluster CA and issuing certificates with the right URI, key usage and addresses: with a key
//! made here, or for somebody's own.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber,
};

use rustls::pki_types::CertificateDer;

use super::identity::{self, Identity, IdentityError, Role, TrustDomain};
use super::pin::KeyHash;

/// Validity that starts a little in the past, for clocks that disagree.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A file could not be read or written.
    #[error("{}: {why}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        why: std::io::Error,
    },
    /// A file is there already and would be lost.
    #[error("{} exists: nothing was written; remove it first if it is to be replaced", .0.display())]
    Exists(PathBuf),
    /// A name that can't stand in a certificate.
    #[error(transparent)]
    Name(#[from] IdentityError),
    /// The CA's files hold no CA of ours.
    #[error("{}: {why}; make one with `cpc pki init`", path.display())]
    Ca {
        /// The CA's certificate.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The certificate could not be made.
    #[error("the certificate could not be made: {0}")]
    Rcgen(#[from] rcgen::Error),
    /// The system has no random numbers.
    #[error("no random numbers for a serial number")]
    Random,
}

/// Somebody's public key, with proof that they hold the private one.
#[derive(Debug)]
pub struct Applicant(CertificateSigningRequestParams);

impl Applicant {
    /// Reads a PKCS #10 (RFC 2986, DER). Nothing counts of it but the key.
    ///
    /// # Errors
    /// What is wrong with it, which may be that its signature is another key's.
    pub fn read(csr: &[u8]) -> Result<Self, rcgen::Error> {
        CertificateSigningRequestParams::from_der(&csr.into()).map(Self)
    }

    /// The key, as others know it: the SHA-256 of its `SubjectPublicKeyInfo`.
    pub fn key(&self) -> KeyHash {
        KeyHash::of_spki(&self.0.public_key.subject_public_key_info())
    }
}

/// What to issue.
#[derive(Clone, Debug)]
pub struct Request {
    /// For which role.
    pub role: Role,
    /// Server id, node name or client name.
    pub name: String,
    /// DNS names that TLS clients may check (servers and frontends).
    pub dns: Vec<String>,
    /// Node addresses of an agent, or addresses of a frontend.
    pub addresses: Vec<IpAddr>,
    /// The last moment at which it is valid.
    pub not_after: SystemTime,
}

/// A CA, kept as `ca.crt` and `ca.key` in one directory. Its own URI names its trust domain.
#[derive(Debug)]
pub struct Authority {
    trust_domain: TrustDomain,
    not_after: SystemTime,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a CA for `trust_domain` in `dir`.
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
        fs::create_dir_all(dir).map_err(|why| IssueError::Io {
            path: dir.into(),
            why,
        })?;
        write_new(&dir.join("ca.key"), &key.serialize_pem(), 0o600)?;
        write_new(&dir.join("ca.crt"), &cert.pem(), 0o644)
    }

    /// Opens the CA in `dir`.
    ///
    /// # Errors
    /// [`IssueError::Io`] or [`IssueError::Ca`].
    pub fn open(dir: &Path) -> Result<Self, IssueError> {
        let path = dir.join("ca.crt");
        let pem = read(&path)?;
        let key = KeyPair::from_pem(&read(&dir.join("ca.key"))?)?;
        let wrong = |why: String| IssueError::Ca {
            path: path.clone(),
            why,
        };
        let (trust_domain, not_after) = read_ca(pem.as_bytes()).map_err(wrong)?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key)?;
        Ok(Self {
            trust_domain,
            not_after,
            pem,
            issuer,
        })
    }

    /// Whom it vouches for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The last moment at which it is valid, and with it whatever it issues.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Issues a certificate for the key of `applicant`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn certify(
        &self,
        request: &Request,
        applicant: &Applicant,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let certificate = self.sign(request, &applicant.0.public_key)?;
        Ok(certificate.der().clone())
    }

    fn sign(&self, request: &Request, key: &impl PublicKeyData) -> Result<Certificate, IssueError> {
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
        set_validity(&mut params, request.not_after);
        Ok(params.signed_by(key, &self.issuer)?)
    }

    /// Issues a certificate into `out`: `<role>.crt`, `<role>.key` and a copy of `ca.crt`.
    ///
    /// # Errors
    /// [`IssueError`]; nothing that was there is overwritten.
    pub fn issue(&self, request: &Request, out: &Path) -> Result<Identity, IssueError> {
        let key = KeyPair::generate()?;
        let cert = self.sign(request, &key)?;
        fs::create_dir_all(out).map_err(|why| IssueError::Io {
            path: out.into(),
            why,
        })?;
        let base = out.join(request.role.as_str());
        let (key_file, cert_file) = (base.with_extension("key"), base.with_extension("crt"));
        // A key alone would be in the way of the next try.
        if cert_file.exists() {
            return Err(IssueError::Exists(cert_file));
        }
        write_new(&key_file, &key.serialize_pem(), 0o600)?;
        write_new(&cert_file, &cert.pem(), 0o644)?;
        let ca = out.join("ca.crt");
        if !ca.exists() {
            write_new(&ca, &self.pem, 0o644)?;
        }
        Ok(Identity::from_certificate(cert.der())?)
    }
}

fn ca_uri(trust_domain: &TrustDomain) -> String {
    format!("spiffe://{trust_domain}")
}

/// Unpredictable and never given twice (RFC 5280 section 4.1.2.2): positive, 16 octets.
fn serial() -> Result<SerialNumber, IssueError> {
    let mut octets = [0; 16];
    aws_lc_rs::rand::fill(&mut octets).map_err(|_| IssueError::Random)?;
    // A leading zero would be left out, and a leading one mean a negative number.
    octets[0] = octets[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&octets))
}

/// Whom a CA vouches for, and until when.
fn read_ca(pem: &[u8]) -> Result<(TrustDomain, SystemTime), String> {
    use x509_parser::prelude::GeneralName;
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).map_err(|e| e.to_string())?;
    let cert = pem.parse_x509().map_err(|e| e.to_string())?;
    let not_after = cert.validity().not_after.to_datetime().into();
    let names = cert.subject_alternative_name().map_err(|e| e.to_string())?;
    let names = names.into_iter().flat_map(|san| &san.value.general_names);
    let uri = names.filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
        _ => None,
    });
    match uri.collect::<Vec<_>>()[..] {
        [domain] => {
            let domain = domain.parse().map_err(|e: IdentityError| e.to_string())?;
            Ok((domain, not_after))
        }
        _ => Err("names no trust domain".into()),
    }
}

fn set_validity(params: &mut CertificateParams, not_after: SystemTime) {
    let not_before = (SystemTime::now() - CLOCK_SKEW).min(not_after - CLOCK_SKEW);
    params.not_before = not_before.into();
    params.not_after = not_after.into();
}

fn read(path: &Path) -> Result<String, IssueError> {
    fs::read_to_string(path).map_err(|why| IssueError::Io {
        path: path.into(),
        why,
    })
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), IssueError> {
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()));
    written.map_err(|why| match why.kind() {
        std::io::ErrorKind::AlreadyExists => IssueError::Exists(path.into()),
        _ => IssueError::Io {
            path: path.into(),
            why,
        },
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
