//! Certificates of all simulated servers and agents, made once for all seeds.
//!
//! Keys are random, but no length depends on them: signatures of Ed25519 have one size. So traces of two
//! runs are equal, although the bytes on the wire are not.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use cpc_config::TlsConfig;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, SanType, SerialNumber,
};
use tempfile::TempDir;

/// Trust domain of everything here.
pub const DOMAIN: &str = "simulation";

/// Validity in seconds since 1970: 2020 to 2050, for any step of a clock.
const VALID: (u64, u64) = (1_577_836_800, 2_524_608_000);

/// Files with certificates and keys.
#[derive(Debug)]
pub struct Pki {
    directory: TempDir,
}

impl Pki {
    /// Makes certificates for the servers and agents of the given names and addresses.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn new(servers: &[String], agents: &[(String, Ipv4Addr)]) -> Result<Self> {
        let directory = TempDir::with_prefix("simulation-")?;
        let mut params = valid();
        params.distinguished_name.push(DnType::CommonName, "CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.subject_alt_names = vec![uri("")?];
        params.serial_number = Some(SerialNumber::from(vec![1; 8]));
        let ca = CertifiedIssuer::self_signed(params, key()?)?;
        fs::write(directory.path().join("ca.pem"), ca.pem())?;
        let server = ExtendedKeyUsagePurpose::ServerAuth;
        let agent = ExtendedKeyUsagePurpose::ClientAuth;
        let servers = servers.iter().map(|name| (name, "server", None, &server));
        let agents = agents
            .iter()
            .map(|(name, ip)| (name, "agent", Some(ip), &agent));
        for (serial, (name, role, ip, usage)) in (2..).zip(servers.chain(agents)) {
            let mut params = valid();
            params.subject_alt_names = vec![uri(&format!("/{role}/{name}"))?];
            if let Some(ip) = ip {
                params
                    .subject_alt_names
                    .push(SanType::IpAddress((*ip).into()));
            }
            params.extended_key_usages = vec![usage.clone()];
            params.serial_number = Some(SerialNumber::from(vec![serial; 8]));
            let key = key()?;
            let leaf = params.signed_by(&key, &ca)?;
            let text = format!("{}{}", leaf.pem(), key.serialize_pem());
            fs::write(directory.path().join(format!("{name}.pem")), text)?;
        }
        Ok(Self { directory })
    }

    /// Returns the directory of the files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the TLS section of a configuration for `name`.
    pub fn tls(&self, name: &str) -> TlsConfig {
        let file = |name: String| Some::<PathBuf>(self.directory().join(name));
        TlsConfig {
            cert: file(format!("{name}.pem")),
            key: file(format!("{name}.pem")),
            ca: file("ca.pem".into()),
            ..TlsConfig::default()
        }
    }
}

fn key() -> Result<KeyPair> {
    Ok(KeyPair::generate_for(&PKCS_ED25519)?)
}

fn uri(path: &str) -> Result<SanType> {
    Ok(SanType::URI(format!("spiffe://{DOMAIN}{path}").try_into()?))
}

fn valid() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = (UNIX_EPOCH + Duration::from_secs(VALID.0)).into();
    params.not_after = (UNIX_EPOCH + Duration::from_secs(VALID.1)).into();
    params
}
