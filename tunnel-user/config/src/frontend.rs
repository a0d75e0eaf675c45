//! `frontends`: the listeners for clients, beside the redirect.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tunnel_proto::trust_domain::TrustDomain;

use super::tls_floor::TlsFloor;
use super::{AllowRule, ConfigError};

/// `frontends`: ways in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FrontendsConfig {
    /// HTTP CONNECT listeners.
    #[serde(deserialize_with = "super::section")]
    pub http_connect: Vec<FrontendConfig>,
    /// Listeners of Konnectivity's gRPC `ProxyService`.
    #[serde(deserialize_with = "super::section")]
    pub grpc: Vec<FrontendConfig>,
}

impl FrontendsConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let worded = |frontend: &FrontendConfig| frontend.answers() != Answers::default();
        if let Some(at) = self.grpc.iter().position(worded) {
            return Err(ConfigError::value(
                format!("frontends.grpc[{at}].answers"),
                "is for http_connect: gRPC has one way to refuse",
            ));
        }
        for (list, frontends) in [("http_connect", &self.http_connect), ("grpc", &self.grpc)] {
            for (at, frontend) in frontends.iter().enumerate() {
                if let FrontendConfig::Tcp(TcpFrontend {
                    tls_floor: Some(floor),
                    ..
                }) = frontend
                {
                    floor.check(&format!("frontends.{list}[{at}].tls_floor"))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        for frontend in self.http_connect.iter_mut().chain(&mut self.grpc) {
            match frontend {
                FrontendConfig::Unix(unix) => unix.unix = base.join(&unix.unix),
                FrontendConfig::Tcp(tcp) => {
                    for path in [&mut tcp.cert, &mut tcp.key, &mut tcp.client_ca] {
                        *path = base.join(&*path);
                    }
                }
            }
        }
    }
}

/// Listener on a Unix socket, or on TCP with mutual TLS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "FrontendKeys", into = "FrontendKeys")]
pub enum FrontendConfig {
    /// A Unix socket.
    Unix(UnixFrontend),
    /// TCP with mutual TLS.
    Tcp(TcpFrontend),
}

impl FrontendConfig {
    /// Returns the form of HTTP CONNECT refusals.
    pub fn answers(&self) -> Answers {
        match self {
            Self::Unix(frontend) => frontend.answers,
            Self::Tcp(frontend) => frontend.answers,
        }
    }

    /// Returns the tenant of the callers, if it is not the server's own.
    pub fn tenant(&self) -> Option<&TrustDomain> {
        match self {
            Self::Unix(frontend) => frontend.tenant.as_ref(),
            Self::Tcp(frontend) => frontend.tenant.as_ref(),
        }
    }

    /// Destinations that callers may have; everything that agents serve when missing.
    pub fn allow(&self) -> Option<&[AllowRule]> {
        match self {
            Self::Unix(frontend) => frontend.allow.as_deref(),
            Self::Tcp(frontend) => frontend.allow.as_deref(),
        }
    }
}

/// Keys of both kinds, as the file has them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FrontendKeys {
    #[serde(skip_serializing_if = "Option::is_none")]
    unix: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    takeover: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cert: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_ca: Option<PathBuf>,
    #[serde(
        default,
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    tls_floor: Option<TlsFloor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<TrustDomain>,
    #[serde(
        default,
        deserialize_with = "super::allow::list",
        skip_serializing_if = "Option::is_none"
    )]
    allow: Option<Vec<AllowRule>>,
    #[serde(default)]
    answers: Answers,
}

/// Form of the refusals of an HTTP CONNECT frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answers {
    /// Each kind of failure has its own status, and the reason phrase names the cause.
    #[default]
    Detailed,
    /// The status of Konnectivity's proxy-server, with a reason phrase that names the cause.
    Konnectivity,
}

impl TryFrom<FrontendKeys> for FrontendConfig {
    type Error = String;

    fn try_from(keys: FrontendKeys) -> Result<Self, String> {
        match keys {
            FrontendKeys {
                unix: Some(unix),
                mode,
                takeover,
                tcp: None,
                cert: None,
                key: None,
                client_ca: None,
                tls_floor: None,
                tenant,
                allow,
                answers,
            } => Ok(Self::Unix(UnixFrontend {
                unix,
                mode: mode.map_or(Ok(DEFAULT_MODE), |mode| parse_mode(&mode))?,
                takeover: takeover.unwrap_or_default(),
                tenant,
                allow,
                answers,
            })),
            FrontendKeys {
                unix: None,
                mode: None,
                takeover: None,
                tcp: Some(tcp),
                cert: Some(cert),
                key: Some(key),
                client_ca: Some(client_ca),
                tls_floor,
                tenant,
                allow,
                answers,
            } => Ok(Self::Tcp(TcpFrontend {
                tcp,
                cert,
                key,
                client_ca,
                tls_floor,
                tenant,
                allow,
                answers,
            })),
            _ => Err(
                "a frontend has either `unix` (with `mode` and `takeover`) or `tcp` with \
                      `cert`, `key` and `client_ca` (and `tls_floor`)"
                    .into(),
            ),
        }
    }
}

impl From<FrontendConfig> for FrontendKeys {
    fn from(frontend: FrontendConfig) -> Self {
        match frontend {
            FrontendConfig::Unix(unix) => Self {
                unix: Some(unix.unix),
                mode: Some(format!("{:04o}", unix.mode)),
                takeover: Some(unix.takeover),
                tcp: None,
                cert: None,
                key: None,
                client_ca: None,
                tls_floor: None,
                tenant: unix.tenant,
                allow: unix.allow,
                answers: unix.answers,
            },
            FrontendConfig::Tcp(tcp) => Self {
                unix: None,
                mode: None,
                takeover: None,
                tcp: Some(tcp.tcp),
                cert: Some(tcp.cert),
                key: Some(tcp.key),
                client_ca: Some(tcp.client_ca),
                tls_floor: tcp.tls_floor,
                tenant: tcp.tenant,
                allow: tcp.allow,
                answers: tcp.answers,
            },
        }
    }
}

/// A frontend on a Unix socket.
#[derive(Clone, Debug, PartialEq)]
pub struct UnixFrontend {
    /// Path of the socket.
    pub unix: PathBuf,
    /// Mode of the socket's file.
    pub mode: u32,
    /// Replaces a socket on which another process listens. Otherwise the server replaces only a
    /// dead socket.
    pub takeover: bool,
    /// Tenant of the callers; the server's own trust domain when missing.
    pub tenant: Option<TrustDomain>,
    /// Destinations that callers may have; everything that agents serve when missing.
    pub allow: Option<Vec<AllowRule>>,
    /// Form of refusals of HTTP CONNECT.
    pub answers: Answers,
}

/// A frontend on TCP with mutual TLS.
#[derive(Clone, Debug, PartialEq)]
pub struct TcpFrontend {
    /// Address of the listener.
    pub tcp: SocketAddr,
    /// PEM chain that callers check.
    pub cert: PathBuf,
    /// PEM key of `cert`.
    pub key: PathBuf,
    /// PEM roots that vouch for callers. A caller whose certificate names a role must be a
    /// `client`; an agent is refused.
    pub client_ca: PathBuf,
    /// TLS that the listener accepts. When missing, from 1.3 on for HTTP CONNECT; from 1.2 on for
    /// gRPC, as Konnectivity's proxy-server does.
    pub tls_floor: Option<TlsFloor>,
    /// Tenant of the callers; the server's own trust domain when missing.
    pub tenant: Option<TrustDomain>,
    /// Destinations that callers may have; everything that agents serve when missing.
    pub allow: Option<Vec<AllowRule>>,
    /// Form of refusals of HTTP CONNECT.
    pub answers: Answers,
}

/// The mode of a Unix socket when none is configured.
const DEFAULT_MODE: u32 = 0o660;

/// Parses an octal mode. The text must begin with 0: YAML reads 0640 as octal or decimal, depending
/// on its version, and passes 416 on, which is then no octal mode.
fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").or_else(|| text.strip_prefix('0'));
    let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let mode = digits.and_then(|digits| u32::from_str_radix(digits, 8).ok());
    mode.filter(|mode| *mode <= 0o777).ok_or_else(|| {
        format!(
            "{text:?} is not a mode: write an octal number up to 0777 with a leading 0, such as mode: \"0660\""
        )
    })
}
