//! The configuration of `cpc agent`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::allow::AllowRule;
use super::konnectivity::ProxyServerConfig;
use super::rule;
use super::{
    AuditConfig, ConfigError, DatapathConfig, LogConfig, TlsConfig, TransportConfig, TunnelKind,
    Version, base_of, check_shards,
};
use cpc_host::lifecycle::LONGEST_DRAIN;
use cpc_host::{cores, memory};

/// The most tunnels to one server: two processes of an agent, as in a rollout, find room for theirs.
pub const MAX_TUNNELS: u8 = 16;

/// Configuration of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Version of the schema.
    pub version: Version,
    /// Servers. The agent resolves their names every 10 s.
    #[serde(deserialize_with = "super::section")]
    pub servers: Vec<ServerAddress>,
    /// Certificate of the agent and its CAs. Optional where every server is a proxy-server.
    #[serde(deserialize_with = "super::section")]
    pub tls: TlsConfig,
    /// Packets of the tunnel.
    #[serde(deserialize_with = "super::section")]
    pub transport: TransportConfig,
    /// Forwarding of bytes.
    #[serde(deserialize_with = "super::section")]
    pub datapath: DatapathConfig,
    /// Dials to proxy-servers of Konnectivity.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub konnectivity: Option<ProxyServerConfig>,
    /// Claims of the agent beyond the node addresses in its certificate.
    #[serde(deserialize_with = "super::section")]
    pub serve: ServeConfig,
    /// Threads that carry tunnels.
    pub shards: usize,
    /// Tunnels to each server, over QUIC.
    pub tunnels: u8,
    /// Directory of a lock that proves to servers that an earlier process of this agent has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Socket of the keeper that holds copies of connections over a crash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keeper: Option<PathBuf>,
    /// Allow-list of the agent's dials. When missing: the node addresses in its certificate, port
    /// 10250.
    #[serde(
        deserialize_with = "super::allow::list",
        skip_serializing_if = "Option::is_none"
    )]
    pub allow: Option<Vec<AllowRule>>,
    /// Address of health, metrics and status.
    pub admin: SocketAddr,
    /// Address of health and metrics in the form of Konnectivity's programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<SocketAddr>,
    /// Bounds.
    #[serde(deserialize_with = "super::section")]
    pub limits: AgentLimits,
    /// Logging.
    #[serde(deserialize_with = "super::section")]
    pub log: LogConfig,
    /// Record of connections and decisions.
    #[serde(deserialize_with = "super::section")]
    pub audit: AuditConfig,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            version: Version,
            servers: Vec::new(),
            tls: TlsConfig::default(),
            transport: TransportConfig::default(),
            datapath: DatapathConfig::default(),
            konnectivity: None,
            serve: ServeConfig::default(),
            shards: cores::usual_shards(),
            tunnels: 1,
            state_dir: None,
            keeper: None,
            allow: None,
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8136)),
            health: None,
            limits: AgentLimits::default(),
            log: LogConfig::default(),
            audit: AuditConfig::default(),
        }
    }
}

/// Address of a server, or a name behind which several servers stand, with or without a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ServerKeys", into = "ServerKeys")]
pub struct ServerAddress {
    /// `host:port`.
    pub address: String,
    /// Protocol of that address. When missing: QUIC, or with a `konnectivity` section either one.
    pub protocol: Option<Protocol>,
}

/// Protocol of a tunnel to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Our protocol, of `cpc server`.
    Quic,
    /// Konnectivity's, with a proxy-server.
    Konnectivity,
    /// QUIC where it is answered, else Konnectivity's.
    Auto,
}

impl Protocol {
    /// Returns the permitted kinds of tunnels, the preferred one first.
    pub fn kinds(self) -> &'static [TunnelKind] {
        match self {
            Self::Quic => &[TunnelKind::Quic],
            Self::Konnectivity => &[TunnelKind::Konnectivity],
            Self::Auto => &[TunnelKind::Quic, TunnelKind::Konnectivity],
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum ServerKeys {
    Plain(String),
    Keys {
        address: String,
        protocol: Option<Protocol>,
    },
}

impl From<ServerKeys> for ServerAddress {
    fn from(keys: ServerKeys) -> Self {
        match keys {
            ServerKeys::Plain(address) => address.into(),
            ServerKeys::Keys { address, protocol } => Self { address, protocol },
        }
    }
}

impl From<ServerAddress> for ServerKeys {
    fn from(ServerAddress { address, protocol }: ServerAddress) -> Self {
        match protocol {
            None => Self::Plain(address),
            protocol => Self::Keys { address, protocol },
        }
    }
}

impl From<String> for ServerAddress {
    fn from(address: String) -> Self {
        Self {
            address,
            protocol: None,
        }
    }
}

impl AgentConfig {
    /// Returns the protocols that the agent tries with `server`.
    pub fn protocol(&self, server: &ServerAddress) -> Protocol {
        let usual = match self.konnectivity {
            Some(_) => Protocol::Auto,
            None => Protocol::Quic,
        };
        server.protocol.unwrap_or(usual)
    }
}

/// `serve`: the offer. The server reduces it to the grants of the agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    /// Address ranges. A single address needs no prefix length.
    #[serde(deserialize_with = "rule::nets")]
    pub cidrs: Vec<IpNet>,
    /// DNS names, `*.suffix` among them.
    #[serde(deserialize_with = "super::section")]
    pub names: Vec<String>,
    /// Every destination that no other agent serves.
    pub default_route: bool,
}

/// `limits` of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentLimits {
    /// Time that a stopping agent gives connections to end. `None` (`forever` in the file): until a
    /// second signal, with or without connections.
    #[serde(with = "drain")]
    pub drain: Option<Duration>,
    /// Connections at once.
    pub connections: usize,
    /// Bytes of memory that unread data may take: of stopped targets, and of streams with gaps.
    pub stalled_bytes: u64,
    /// Time for which a connection whose tunnel was lost waits for another one; 0: it ends with its tunnel.
    #[serde(with = "humantime_serde")]
    pub resume: Duration,
    /// Bytes that one connection keeps until the server has confirmed them.
    pub session_bytes: u64,
    /// Maximum number of bytes of one connection on their way to the other end's socket.
    pub stream_window: u32,
    /// Connections at once that wait for another tunnel.
    pub waiting_sessions: usize,
}

impl Default for AgentLimits {
    fn default() -> Self {
        Self {
            drain: Some(Duration::from_secs(30)),
            connections: 10_000,
            stalled_bytes: memory::share(1 << 30),
            resume: Duration::from_secs(120),
            session_bytes: 4 << 20,
            stream_window: 4 << 20,
            waiting_sessions: 10_000,
        }
    }
}

impl AgentConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config: Self = super::load(path)?;
        config.resolve(&base_of(path));
        Ok(config)
    }

    fn resolve(&mut self, base: &Path) {
        self.tls.resolve(base);
        self.audit.resolve(base);
        for path in [&mut self.state_dir, &mut self.keeper]
            .into_iter()
            .flatten()
        {
            *path = base.join(&path);
        }
        if let Some(konnectivity) = &mut self.konnectivity {
            konnectivity.resolve(base);
        }
    }

    /// Makes every path absolute, so that it does not depend on the working directory of its
    /// reader.
    pub fn make_absolute(&mut self, working_directory: &Path) {
        self.resolve(working_directory);
    }

    /// Checks what serde can't check.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_shards(self.shards)?;
        if !(1..=MAX_TUNNELS).contains(&self.tunnels) {
            let why = format!("must be 1 to {MAX_TUNNELS}");
            return Err(ConfigError::value("tunnels", why));
        }
        if self.limits.drain > Some(LONGEST_DRAIN) {
            return Err(ConfigError::value("limits.drain", "must be at most 24 h"));
        }
        super::above_zero([("limits.connections", Some(self.limits.connections))])?;
        super::above_zero([
            ("limits.stalled_bytes", Some(self.limits.stalled_bytes)),
            ("limits.session_bytes", Some(self.limits.session_bytes)),
        ])?;
        super::above_zero([(
            "limits.waiting_sessions",
            Some(self.limits.waiting_sessions),
        )])?;
        super::check_resume(self.limits.resume)?;
        super::check_stream_window(self.limits.stream_window)?;
        self.transport.check()?;
        self.audit.check()?;
        if self.tls.renew && self.tls.cert != self.tls.key {
            return Err(ConfigError::value(
                "tls.renew",
                "needs key and certificate in one file, as `cpc agent join` writes it, named by \
                 tls.cert and tls.key: two can't be replaced in one step",
            ));
        }
        if self.servers.is_empty() {
            let why = "is empty: name at least one, such as cp.example.org:8132";
            return Err(ConfigError::value("servers", why));
        }
        for (at, server) in self.servers.iter().enumerate() {
            let address = &server.address;
            if super::address::split(address).is_none() {
                let key = format!("servers[{at}]");
                let why = format!("{address:?} is not host:port");
                return Err(ConfigError::value(key, why));
            }
            match self.protocol(server) {
                Protocol::Konnectivity | Protocol::Auto if self.konnectivity.is_none() => {
                    let why = format!("is needed to reach {address} over gRPC");
                    return Err(ConfigError::value("konnectivity", why));
                }
                Protocol::Quic | Protocol::Auto => drop(self.tls.files()?),
                Protocol::Konnectivity => {}
            }
        }
        if let Some(konnectivity) = &self.konnectivity {
            konnectivity.check()?;
        }
        Ok(())
    }
}

/// `limits.drain`: a duration, or `forever`.
mod drain {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        drain: &Option<Duration>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match drain {
            None => s.serialize_str("forever"),
            Some(drain) => humantime_serde::serialize(drain, s),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Duration>, D::Error> {
        match String::deserialize(d)?.as_str() {
            "forever" => Ok(None),
            text => humantime::parse_duration(text).map(Some).map_err(|error| {
                D::Error::custom(format!("{text:?}: {error}; 30s and forever are"))
            }),
        }
    }
}
