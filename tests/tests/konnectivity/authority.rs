//! Certificates as clusters have them: of one authority, named by common name and addresses, with
//! nothing of the connector's in them.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// An authority, with the certificates that it has issued in one folder.
pub(crate) struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one, in a new folder.
    pub(crate) fn create(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let name = folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        params
            .distinguished_name
            .push(DnType::CommonName, name.context("no name")?);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        fs::write(folder.join("ca.crt"), issuer.pem())?;
        Ok(Self { folder, issuer })
    }

    /// Issues a certificate that serves on both sides of TLS.
    pub(crate) fn issue(&self, name: &str, addresses: &[IpAddr]) -> Result<Credentials> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        let addresses = addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names = addresses.collect();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let credentials = self.credentials(name);
        fs::write(&credentials.cert, certificate.pem())?;
        fs::write(&credentials.key, key.serialize_pem())?;
        Ok(credentials)
    }

    /// The authority's own certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    fn credentials(&self, name: &str) -> Credentials {
        let file = |extension| self.folder.join(name).with_extension(extension);
        Credentials {
            ca: self.ca(),
            cert: file("crt"),
            key: file("key"),
        }
    }
}

/// A certificate, its key and whom its holder trusts, as files.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Credentials {
    /// A client that shows its certificate.
    pub(crate) fn client(&self) -> Result<ClientTlsConfig> {
        Ok(self.anonymous()?.identity(self.identity()?))
    }

    /// A client that shows none.
    pub(crate) fn anonymous(&self) -> Result<ClientTlsConfig> {
        Ok(ClientTlsConfig::new().ca_certificate(self.trusted()?))
    }

    /// A server that wants certificates.
    pub(crate) fn server(&self) -> Result<ServerTlsConfig> {
        Ok(self.open_server()?.client_ca_root(self.trusted()?))
    }

    /// A server that wants none.
    pub(crate) fn open_server(&self) -> Result<ServerTlsConfig> {
        Ok(ServerTlsConfig::new().identity(self.identity()?))
    }

    fn trusted(&self) -> Result<Certificate> {
        Ok(Certificate::from_pem(fs::read(&self.ca)?))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(Identity::from_pem(
            fs::read(&self.cert)?,
            fs::read(&self.key)?,
        ))
    }
}
