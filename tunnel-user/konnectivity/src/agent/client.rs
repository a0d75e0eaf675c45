//! The parameters of a dial to a proxy-server: TLS, a token, and the identity of the agent.
//!
//! Each dial reads the files: a renewed one counts from the next dial on.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::sign::SingleCertAndKey;
use tunnel_proto::konnectivity::{IdentifierError, Identifiers, metadata};
use tunnel_proto::route::Claim;
use uuid::Uuid;

use crate::grpc::{ALPN, Settings};
use cpc_config::konnectivity::ProxyServerConfig;
use cpc_host::report::report;
use cpc_identity::lifetime::{Certificates, Lifetime, Purpose};
use cpc_identity::material::{MaterialError, load_anchors, load_key};
use cpc_identity::named::NamedVerifier;
use cpc_identity::{pem, provider};

/// Maximum size of a token, in bytes: that of a service account has one or two thousand.
const MAX_TOKEN: usize = 32 << 10;

/// Reason why a proxy-server can't be dialled with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// rustls refuses the configuration.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
    /// There are no roots.
    #[error("konnectivity.ca is missing: it vouches for the proxy-servers")]
    NoRoots,
    /// The name of the server is invalid.
    #[error("{name:?} can't stand in a certificate ({why}): set konnectivity.server_name")]
    ServerName {
        /// The name.
        name: String,
        /// Error of rustls.
        why: InvalidDnsNameError,
    },
    /// The token can't be read.
    #[error("konnectivity.token_file {}: {why}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        why: io::Error,
    },
    /// The token has characters that a header can't hold.
    #[error(
        "konnectivity.token_file {} holds characters that a header can't have, such as the end of a line; \
         it must hold the token and nothing else", .0.display()
    )]
    TokenText(PathBuf),
    /// The identifiers are invalid.
    #[error("konnectivity.identifiers: {0}")]
    Identifiers(IdentifierError),
    /// A value can't stand in a header.
    #[error(
        "{0} holds characters that a header can't have; write visible ASCII, URL-encoded if need be"
    )]
    Header(&'static str),
}

impl From<rustls::Error> for ClientError {
    fn from(why: rustls::Error) -> Self {
        Self::Tls(why)
    }
}

impl From<IdentifierError> for ClientError {
    fn from(why: IdentifierError) -> Self {
        Self::Identifiers(why)
    }
}

/// Parameters of dials to proxy-servers.
#[derive(Clone, Debug)]
pub(super) struct Client {
    config: ProxyServerConfig,
    agent_id: Arc<str>,
    identifiers: Identifiers,
}

impl Client {
    /// Checks everything that can be checked before a server is dialled.
    ///
    /// # Errors
    /// [`ClientError`].
    pub(super) fn new(config: &ProxyServerConfig) -> Result<Self, ClientError> {
        let (identifiers, unusable) = Identifiers::parse_strict(&config.identifiers)?;
        for error in unusable {
            tracing::warn!(
                error = report(&error),
                "konnectivity.identifiers: left to the server to understand"
            );
        }
        let agent_id = config.agent_id.clone();
        let agent_id = agent_id.unwrap_or_else(|| Uuid::new_v4().to_string());
        for (key, text) in [
            ("konnectivity.identifiers", &config.identifiers),
            ("konnectivity.agent_id", &agent_id),
        ] {
            if !is_header_text(text) {
                return Err(ClientError::Header(key));
            }
        }
        let client = Self {
            config: config.clone(),
            agent_id: agent_id.into(),
            identifiers,
        };
        client.tls()?;
        client.config.key.as_deref().map(pem::warn_if_exposed);
        Ok(client)
    }

    /// Returns the id that the agent reports.
    pub(super) fn agent_id(&self) -> &Arc<str> {
        &self.agent_id
    }

    /// Returns the addresses that the agent reports.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let v4 = self.identifiers.ipv4.iter().copied().map(IpAddr::from);
        let v6 = self.identifiers.ipv6.iter().copied().map(IpAddr::from);
        v4.chain(v6).collect()
    }

    /// Returns the claims that the agent reports.
    pub(super) fn claims(&self) -> Vec<Claim> {
        self.identifiers.claims()
    }

    /// Returns bounds and timers of the connection.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            keepalive: Some(self.config.keepalive),
            ..Settings::AGENT
        }
    }

    /// Returns the name that the certificate of the server at `host` must have.
    pub(super) fn server_name(&self, host: &str) -> Result<ServerName<'static>, ClientError> {
        let name = self.config.server_name.as_deref().unwrap_or(host);
        ServerName::try_from(name.to_owned()).map_err(|why| ClientError::ServerName {
            name: name.to_owned(),
            why,
        })
    }

    /// Reads the TLS files, and returns their configuration.
    pub(super) fn tls(&self) -> Result<Arc<ClientConfig>, ClientError> {
        let ProxyServerConfig { ca, cert, key, .. } = &self.config;
        let anchors = load_anchors(ca.as_deref().ok_or(ClientError::NoRoots)?)?;
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(NamedVerifier::new(anchors, provider.clone()));
        let mut tls = match (cert, key) {
            (Some(cert), Some(key)) => {
                let key = load_key(cert, key, &provider)?;
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)))
            }
            _ => builder.with_no_client_auth(),
        };
        tls.alpn_protocols.push(ALPN.to_vec());
        let further = self
            .config
            .alpn
            .iter()
            .map(|name| name.clone().into_bytes());
        tls.alpn_protocols
            .extend(further.filter(|name| name != ALPN));
        Ok(Arc::new(tls))
    }

    /// Returns the identity and claims of the agent, for one call.
    pub(super) fn metadata(&self) -> Result<Vec<(&'static str, String)>, ClientError> {
        // The identifiers as they were written: a proxy-server compares texts.
        let mut metadata = vec![
            (metadata::AGENT_ID, self.agent_id.to_string()),
            (metadata::AGENT_IDENTIFIERS, self.config.identifiers.clone()),
        ];
        if let Some(path) = &self.config.token_file {
            let bearer = format!("{}{}", metadata::BEARER, token(path)?);
            metadata.push((metadata::AUTHORIZATION, bearer));
        }
        Ok(metadata)
    }
}

/// Reads the files, as a dial does.
impl Certificates for Client {
    fn lifetimes(&self) -> Vec<Lifetime> {
        let ProxyServerConfig { ca, cert, key, .. } = &self.config;
        let cas = ca.as_deref().and_then(|file| {
            let anchors = load_anchors(file).ok()?;
            Some(Lifetime::cas(Purpose::Konnectivity, &anchors, file))
        });
        let own = cert.as_deref().zip(key.as_deref()).and_then(|(cert, key)| {
            let key = load_key(cert, key, &provider()).ok()?;
            Lifetime::own(Purpose::Konnectivity, &key, cert)
        });
        cas.into_iter().flatten().chain(own).collect()
    }
}

/// Reads the token, which is sent unchanged, as Konnectivity's agent does.
fn token(path: &Path) -> Result<String, ClientError> {
    let token = std::fs::read(path).map_err(|why| ClientError::Token {
        path: path.into(),
        why,
    })?;
    String::from_utf8(token)
        .ok()
        .filter(|token| !token.is_empty() && token.len() <= MAX_TOKEN && is_header_text(token))
        .ok_or_else(|| ClientError::TokenText(path.into()))
}

fn is_header_text(text: &str) -> bool {
    text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn client(config: ProxyServerConfig) -> Result<Client, ClientError> {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let cert = params.self_signed(&rcgen::KeyPair::generate().unwrap());
        let mut ca = tempfile::NamedTempFile::new().unwrap();
        ca.write_all(cert.unwrap().pem().as_bytes()).unwrap();
        Client::new(&ProxyServerConfig {
            ca: Some(ca.path().into()),
            ..config
        })
    }

    #[test]
    fn who_we_are_is_random_or_as_configured() {
        let one = client(ProxyServerConfig::default()).unwrap();
        let other = client(ProxyServerConfig::default()).unwrap();
        assert_ne!(one.agent_id, other.agent_id);

        let named = client(ProxyServerConfig {
            agent_id: Some("w1".into()),
            identifiers: "host=W1&ipv4=10.0.0.1".into(),
            ..Default::default()
        });
        let named = named.unwrap();
        assert_eq!(
            named.metadata().unwrap(),
            [
                ("agentid", "w1".to_owned()),
                ("agentidentifiers", "host=W1&ipv4=10.0.0.1".to_owned())
            ]
        );
        assert_eq!(named.addresses(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn what_no_header_takes_is_refused_with_its_key() {
        for (config, key) in [
            (
                ProxyServerConfig {
                    agent_id: Some("w\u{f6}rker".into()),
                    ..Default::default()
                },
                "konnectivity.agent_id",
            ),
            (
                ProxyServerConfig {
                    identifiers: "nonsense=1".into(),
                    ..Default::default()
                },
                "konnectivity.identifiers",
            ),
        ] {
            let error = client(config).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn the_token_is_read_at_each_dial_and_sent_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let client = client(ProxyServerConfig {
            token_file: Some(file.path().into()),
            ..Default::default()
        });
        let client = client.unwrap();
        for token in ["first", "second"] {
            std::fs::write(file.path(), token).unwrap();
            let metadata = client.metadata().unwrap();
            let expected = ("authorization", format!("Bearer {token}"));
            assert_eq!(metadata.last(), Some(&expected));
        }
        for unfit in ["", "token\n", "t\u{f6}ken"] {
            std::fs::write(file.path(), unfit).unwrap();
            let error = client.metadata().unwrap_err();
            assert!(matches!(error, ClientError::TokenText(_)), "{unfit:?}");
        }
    }
}
