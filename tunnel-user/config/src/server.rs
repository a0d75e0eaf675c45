//! The configuration of `cpc server`.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tunnel_proto::preface::MAX_DEADLINE;
use tunnel_proto::trust_domain::TrustDomain;

use super::frontend::{FrontendConfig, FrontendsConfig};
use super::konnectivity::{KonnectivityConfig, LeaseConfig};
use super::rule::{self, Rule};
use super::transport::MAX_DIALS;
use super::{
    AllowRule, AuditConfig, ConfigError, DatapathConfig, JoinConfig, LogConfig, TUNNEL_PORT,
    TlsConfig, TransportConfig, Version, base_of, check_shards,
};
use cpc_host::lifecycle::LONGEST_DRAIN;
use cpc_host::listen::everywhere;
use cpc_host::source_limiter::Bounds;
use cpc_host::{cores, memory};

/// Configuration of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Version of the schema.
    pub version: Version,
    /// UDP address of the tunnel; the same on TCP answers `/readyz` for load balancers.
    pub listen: SocketAddr,
    /// Server id for agents of Konnectivity; the one in the certificate of `tls` when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_id: Option<String>,
    /// Number of servers that an agent must find.
    pub server_count: u32,
    /// Threads that carry tunnels.
    pub shards: usize,
    /// Directory of the persisted secret.
    pub state_dir: PathBuf,
    /// Socket of the keeper that holds copies of connections over a crash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keeper: Option<PathBuf>,
    /// Certificate of the server and its CAs. Without it the server accepts no tunnel over QUIC,
    /// which makes sense only beside `konnectivity`.
    #[serde(deserialize_with = "super::section")]
    pub tls: TlsConfig,
    /// Packets of the tunnel.
    #[serde(deserialize_with = "super::section")]
    pub transport: TransportConfig,
    /// Forwarding of bytes.
    #[serde(deserialize_with = "super::section")]
    pub datapath: DatapathConfig,
    /// Grants of identities.
    #[serde(deserialize_with = "super::section")]
    pub policy: PolicyConfig,
    /// Choice of an agent.
    #[serde(deserialize_with = "super::section")]
    pub routing: RoutingConfig,
    /// Ways in, beside the redirect.
    #[serde(deserialize_with = "super::section")]
    pub frontends: FrontendsConfig,
    /// The eBPF redirect.
    #[serde(deserialize_with = "super::section")]
    pub redirect: RedirectConfig,
    /// The agents of Konnectivity.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub konnectivity: Option<KonnectivityConfig>,
    /// Workers without a certificate get one.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub join: Option<JoinConfig>,
    /// Leases that tell agents the number of servers.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub leases: Option<LeaseConfig>,
    /// Address of health, metrics and status.
    pub admin: SocketAddr,
    /// Address of health and metrics in the form of Konnectivity's programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<SocketAddr>,
    /// Bounds.
    #[serde(deserialize_with = "super::section")]
    pub limits: LimitsConfig,
    /// Logging.
    #[serde(deserialize_with = "super::section")]
    pub log: LogConfig,
    /// Record of connections and decisions.
    #[serde(deserialize_with = "super::section")]
    pub audit: AuditConfig,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            version: Version,
            listen: everywhere(TUNNEL_PORT),
            server_id: None,
            server_count: 1,
            shards: cores::usual_shards(),
            state_dir: "/var/lib/cpc".into(),
            keeper: None,
            tls: TlsConfig::default(),
            transport: TransportConfig::default(),
            datapath: DatapathConfig::default(),
            policy: PolicyConfig::default(),
            routing: RoutingConfig::default(),
            frontends: FrontendsConfig::default(),
            redirect: RedirectConfig::default(),
            konnectivity: None,
            join: None,
            leases: None,
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8135)),
            health: None,
            limits: LimitsConfig::default(),
            log: LogConfig::default(),
            audit: AuditConfig::default(),
        }
    }
}

/// `policy`: claims that an identity may have beyond the node addresses in its certificate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// Grants, by pattern of identities.
    #[serde(deserialize_with = "super::section")]
    pub grants: Vec<GrantConfig>,
}

/// Grants for the identities that match a pattern.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrantConfig {
    /// URI, in which `*` stands for any characters but `/`.
    pub identity: String,
    /// Address ranges. A single address needs no prefix length.
    #[serde(deserialize_with = "rule::nets")]
    pub cidrs: Vec<IpNet>,
    /// DNS names, `*.suffix` among them.
    #[serde(deserialize_with = "super::section")]
    pub names: Vec<String>,
    /// Every destination that no other agent serves.
    pub default_route: bool,
}

/// `routing`: the choice of an agent for a destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingConfig {
    /// Strategies in the order in which they apply; the first that finds an agent decides.
    #[serde(deserialize_with = "super::section")]
    pub strategies: Vec<Strategy>,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        Self {
            strategies: vec![Strategy::DestHost, Strategy::DefaultRoute],
        }
    }
}

/// Way to choose an agent, by its name in Konnectivity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Strategy {
    /// Any agent that may serve every destination.
    Default,
    /// An agent that serves the destination by its address, a range or its name.
    DestHost,
    /// An agent that serves the default route.
    DefaultRoute,
}

impl Strategy {
    /// Returns the name in configurations and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::DestHost => "destHost",
            Self::DefaultRoute => "defaultRoute",
        }
    }
}

/// `redirect`: the eBPF redirect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedirectConfig {
    /// Directory on a bpffs where programs and maps outlive the process.
    pub pin: PathBuf,
    /// Group that may use the maps, so that a server needs no capability; none when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupConfig>,
    /// Attachments: the cgroups whose sockets are redirected.
    #[serde(deserialize_with = "super::section")]
    pub attachments: Vec<AttachmentConfig>,
}

impl Default for RedirectConfig {
    fn default() -> Self {
        Self {
            pin: "/sys/fs/bpf/cpc".into(),
            group: None,
            attachments: Vec::new(),
        }
    }
}

impl RedirectConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let mut names = HashSet::new();
        for (at, attachment) in self.attachments.iter().enumerate() {
            let wrong = |key, why: &str| {
                let key = format!("redirect.attachments[{at}].{key}");
                Err(ConfigError::value(key, why))
            };
            if !names.insert(&attachment.name) {
                return wrong("name", "must be unique");
            }
            if attachment.capture.is_empty() {
                return wrong("capture", "must name at least one range to redirect");
            }
            let listen = &attachment.listen;
            let families = |v4: bool| listen.iter().filter(|a| a.is_ipv4() == v4).count();
            let accepts = |a: &SocketAddr| a.ip().is_loopback() && a.port() != 0;
            if listen.is_empty()
                || families(true) > 1
                || families(false) > 1
                || !listen.iter().all(accepts)
            {
                let why = "must be one loopback address with a port for each family";
                return wrong("listen", why);
            }
        }
        Ok(())
    }
}

/// A group of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GroupConfig {
    /// Number of the group.
    Id(u32),
    /// Name of the group.
    Name(String),
}

/// Attachment of the redirect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentConfig {
    /// Name in pins, logs and metrics.
    pub name: String,
    /// The cgroup v2 directory whose processes are redirected.
    pub cgroup: PathBuf,
    /// Path of the processes' network namespace; the server's own when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// Tenant of the processes; the server's own trust domain when missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<TrustDomain>,
    /// Destinations that redirected connections may have; everything that agents serve when missing.
    #[serde(
        default,
        deserialize_with = "super::allow::list",
        skip_serializing_if = "Option::is_none"
    )]
    pub allow: Option<Vec<AllowRule>>,
    /// Listeners of redirected connections: one loopback address per family.
    #[serde(default = "default_redirect_listen")]
    pub listen: Vec<SocketAddr>,
    /// Destinations that are redirected.
    pub capture: Vec<Rule>,
    /// Destinations that stay direct although `capture` covers them. Loopback always stays direct.
    #[serde(default, deserialize_with = "super::section")]
    pub exclude: Vec<Rule>,
    /// Fate of captured connections while the server is dead or stuck.
    #[serde(default)]
    pub fail: FailMode,
}

/// Fate of captured connections while the server is dead or stuck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// Refuses connections (ECONNREFUSED).
    #[default]
    Closed,
    /// Lets connections leave by the ordinary route.
    Open,
}

/// Maximum number of routes. Beside them the kernel's table (65,536) has room for the routes of
/// 20,000 departed agents and the default routes of each tenant.
pub const MAX_ROUTES: usize = 44_000;

/// `limits`: bounds and timeouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// A dial that has not succeeded by then has failed.
    #[serde(with = "humantime_serde")]
    pub dial_timeout: Duration,
    /// Time that a stopping server gives connections to end.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// Time for which the server remembers a departed agent: until then its addresses are answered with
    /// "no agent" (EHOSTUNREACH), after that with "no route" (ENETUNREACH).
    #[serde(with = "humantime_serde")]
    pub forget: Duration,
    /// Connections at once.
    pub connections: usize,
    /// The same for each tenant, if it is to be less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_per_tenant: Option<usize>,
    /// Connections over one tunnel at once, below [`MAX_DIALS`].
    ///
    pub connections_per_tunnel: usize,
    /// Maximum number of concurrent dials.
    pub dials: usize,
    /// The same for each tenant, if it is to be less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dials_per_tenant: Option<usize>,
    /// Dials at once that the agent of one tunnel has not answered.
    pub dials_per_tunnel: usize,
    /// Tunnels of agents at once; one of Konnectivity counts once, however many streams it has.
    pub agents: usize,
    /// The same for each tenant, if it is to be less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agents_per_tenant: Option<usize>,
    /// Routes at once, names among them, at most [`MAX_ROUTES`]; the default route counts twice.
    pub routes: usize,
    /// Maximum number of routes of each tenant, where it is less than three quarters of what the
    /// other tenants leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routes_per_tenant: Option<usize>,
    /// The same for each identity; for each process of Konnectivity's agents.
    pub routes_per_agent: usize,
    /// Bytes of memory that unread data may take: of stopped readers, and of streams with gaps.
    pub stalled_bytes: u64,
    /// The same for each tenant, if it is to be less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stalled_bytes_per_tenant: Option<u64>,
    /// The same for each tunnel; a quarter of `stalled_bytes` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stalled_bytes_per_tunnel: Option<u64>,
    /// Time for which a connection whose tunnel was lost waits for another one; 0: it ends with its tunnel.
    #[serde(with = "humantime_serde")]
    pub resume: Duration,
    /// Bytes that one connection keeps until its agent has confirmed them.
    pub session_bytes: u64,
    /// Maximum number of bytes of one connection on their way to the other end's socket.
    pub stream_window: u32,
    /// Connections at once that wait for another tunnel.
    pub waiting_sessions: usize,
    /// The same for each tenant, if it is to be less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_sessions_per_tenant: Option<usize>,
    /// The same for each identity of an agent, over all its processes.
    pub waiting_sessions_per_agent: usize,
    /// Bounds on handshakes, at each port that unauthenticated peers reach.
    #[serde(deserialize_with = "super::section")]
    pub handshakes: HandshakesConfig,
    /// Dials of a destination that time out in a row before it is not dialled for a while; 0: it
    /// always is.
    pub breaker_failures: u32,
    /// Time for which an open breaker refuses dials.
    #[serde(with = "humantime_serde")]
    pub breaker_retry: Duration,
    /// Bound up to which that time doubles while the destination does not answer.
    #[serde(with = "humantime_serde")]
    pub breaker_max_retry: Duration,
}

/// `limits.handshakes`: handshakes of unauthenticated peers at a port, in total and per source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandshakesConfig {
    /// Maximum number of concurrent handshakes of all sources.
    pub at_once: usize,
    /// Long-term rate of one source, per second.
    pub per_second: u32,
    /// Burst of a source that was quiet before.
    pub burst: u32,
    /// Length of the prefix that is a source of IPv4.
    pub ipv4_prefix: u8,
    /// Length of the prefix that is a source of IPv6.
    pub ipv6_prefix: u8,
}

impl Default for HandshakesConfig {
    fn default() -> Self {
        Self {
            at_once: 1024,
            // An eighth of a core: a handshake takes 0.6 ms.
            per_second: 200,
            // For 2,000 agents behind one address that come back, each with a second try.
            burst: 4000,
            ipv4_prefix: 32,
            // What a customer of a provider gets.
            ipv6_prefix: 56,
        }
    }
}

impl HandshakesConfig {
    /// Returns the same bounds with at most `max` concurrent handshakes.
    pub fn at_most(&self, max: usize) -> Self {
        Self {
            at_once: self.at_once.min(max),
            ..self.clone()
        }
    }

    /// Returns the bounds for the limiter of a port.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            at_once: self.at_once,
            per_second: self.per_second,
            burst: self.burst,
            ipv4_prefix: self.ipv4_prefix,
            ipv6_prefix: self.ipv6_prefix,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if self.at_once == 0 {
            return wrong("limits.handshakes.at_once", "must be at least 1");
        }
        if !(1..=1_000_000).contains(&self.per_second) {
            return wrong("limits.handshakes.per_second", "must be 1 to 1000000");
        }
        if self.burst < 2 {
            return wrong("limits.handshakes.burst", "must be at least 2");
        }
        if self.ipv4_prefix > 32 {
            return wrong("limits.handshakes.ipv4_prefix", "must be at most 32");
        }
        if self.ipv6_prefix > 128 {
            return wrong("limits.handshakes.ipv6_prefix", "must be at most 128");
        }
        Ok(())
    }
}

/// Thresholds and times of the circuit breaker of a destination.
#[derive(Clone, Copy, Debug)]
pub struct BreakerSettings {
    /// Time-outs in a row; 0: never.
    pub failures: u32,
    /// The first wait.
    pub retry: Duration,
    /// The longest wait.
    pub max_retry: Duration,
}

/// The longest that a destination may go undialled.
const LONGEST_RETRY: Duration = Duration::from_secs(3600);

impl LimitsConfig {
    /// Checks that nothing is bounded to none.
    fn check_counts(&self) -> Result<(), ConfigError> {
        super::above_zero([
            ("limits.connections", Some(self.connections)),
            (
                "limits.connections_per_tunnel",
                Some(self.connections_per_tunnel),
            ),
            ("limits.connections_per_tenant", self.connections_per_tenant),
            ("limits.dials", Some(self.dials)),
            ("limits.dials_per_tunnel", Some(self.dials_per_tunnel)),
            ("limits.dials_per_tenant", self.dials_per_tenant),
            ("limits.agents", Some(self.agents)),
            ("limits.agents_per_tenant", self.agents_per_tenant),
            ("limits.routes", Some(self.routes)),
            ("limits.routes_per_tenant", self.routes_per_tenant),
            ("limits.routes_per_agent", Some(self.routes_per_agent)),
            ("limits.waiting_sessions", Some(self.waiting_sessions)),
            (
                "limits.waiting_sessions_per_tenant",
                self.waiting_sessions_per_tenant,
            ),
            (
                "limits.waiting_sessions_per_agent",
                Some(self.waiting_sessions_per_agent),
            ),
        ])?;
        super::check_stream_window(self.stream_window)?;
        super::above_zero([
            ("limits.session_bytes", Some(self.session_bytes)),
            ("limits.stalled_bytes", Some(self.stalled_bytes)),
            (
                "limits.stalled_bytes_per_tenant",
                self.stalled_bytes_per_tenant,
            ),
            (
                "limits.stalled_bytes_per_tunnel",
                self.stalled_bytes_per_tunnel,
            ),
        ])
    }

    /// Returns the settings of the circuit breaker.
    pub fn breaker(&self) -> BreakerSettings {
        BreakerSettings {
            failures: self.breaker_failures,
            retry: self.breaker_retry,
            max_retry: self.breaker_max_retry,
        }
    }

    /// Bytes of memory that unread data of one tunnel may take.
    pub fn stalled_bytes_per_tunnel(&self) -> u64 {
        self.stalled_bytes_per_tunnel
            .unwrap_or(self.stalled_bytes / 4)
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            dial_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(30),
            forget: Duration::from_secs(3600),
            connections: 16_000,
            connections_per_tenant: None,
            connections_per_tunnel: 8000,
            dials: 8000,
            dials_per_tenant: None,
            // Half of all: an agent that answers nothing leaves the others theirs.
            dials_per_tunnel: 4000,
            agents: 10_000,
            agents_per_tenant: None,
            routes: 40_000,
            routes_per_tenant: None,
            routes_per_agent: 1000,
            stalled_bytes: memory::share(2 << 30),
            stalled_bytes_per_tenant: None,
            stalled_bytes_per_tunnel: None,
            resume: Duration::from_secs(120),
            session_bytes: 4 << 20,
            stream_window: 4 << 20,
            waiting_sessions: 16_000,
            waiting_sessions_per_tenant: None,
            waiting_sessions_per_agent: 8000,
            handshakes: HandshakesConfig::default(),
            breaker_failures: 5,
            breaker_retry: Duration::from_secs(5),
            breaker_max_retry: Duration::from_secs(60),
        }
    }
}

impl ServerConfig {
    /// Whether a part of Konnectivity is configured, so that the server exposes its metrics beside
    /// ours.
    pub fn is_konnectivity(&self) -> bool {
        self.konnectivity.is_some() || self.leases.is_some() || !self.frontends.grpc.is_empty()
    }

    /// Returns the trust domains of possible peers. The server belongs to `own`.
    pub fn tenants(&self, own: &TrustDomain) -> HashSet<TrustDomain> {
        let frontends = &self.frontends;
        let frontends = frontends.http_connect.iter().chain(&frontends.grpc);
        let konnectivity = self.konnectivity.iter().filter_map(|it| it.tenant.as_ref());
        let trusted = self.tls.trust.iter().map(|trust| &trust.domain);
        { frontends.filter_map(FrontendConfig::tenant) }
            .chain(konnectivity)
            .chain(trusted)
            .chain([own])
            .cloned()
            .collect()
    }

    /// Returns the directory of join tokens and of records of issued certificates.
    pub fn join_directory(&self) -> PathBuf {
        self.state_dir.join("join")
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config: Self = super::load(path)?;
        config.resolve(&base_of(path));
        Ok(config)
    }

    /// Checks what serde can't check.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let value = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if self.server_count == 0 {
            return value("server_count", "must be at least 1");
        }
        check_shards(self.shards)?;
        if self.limits.dial_timeout.is_zero() || self.limits.dial_timeout > MAX_DEADLINE {
            return value("limits.dial_timeout", "must be over 0 s and at most 10 min");
        }
        let breaker = self.limits.breaker();
        if breaker.retry.is_zero() || breaker.retry > breaker.max_retry {
            return value(
                "limits.breaker_retry",
                "must be over 0 s and at most limits.breaker_max_retry",
            );
        }
        if breaker.max_retry > LONGEST_RETRY {
            return value("limits.breaker_max_retry", "must be at most 1 h");
        }
        if self.limits.drain > LONGEST_DRAIN {
            return value("limits.drain", "must be at most 24 h");
        }
        if self.tls.cert.is_none() && self.konnectivity.is_none() {
            self.tls.files()?;
        }
        if self.tls.cert.is_none() && self.server_id.is_none() {
            return value("server_id", "is needed where `tls` has no certificate");
        }
        if self.routing.strategies.is_empty() {
            return value("routing.strategies", "must name at least one");
        }
        self.limits.check_counts()?;
        super::check_resume(self.limits.resume)?;
        if self.limits.routes > MAX_ROUTES {
            return value("limits.routes", "must be at most 44000");
        }
        if self.limits.connections_per_tunnel > MAX_DIALS as usize {
            // Agents let no more streams in: further ones would wait.
            return value("limits.connections_per_tunnel", "must be at most 8192");
        }
        self.limits.handshakes.check()?;
        self.transport.check()?;
        self.audit.check()?;
        self.frontends.check()?;
        if let Some(konnectivity) = &self.konnectivity {
            konnectivity.check()?;
            if konnectivity.cert.is_none() && self.tls.cert.is_none() {
                return value("konnectivity.cert", "is needed where `tls` has none");
            }
        }
        if let Some(leases) = &self.leases {
            leases.labels()?;
        }
        if let Some(join) = &self.join {
            join.check()?;
            if self.tls.cert.is_none() {
                return value("join", "needs a certificate to show: tls.cert");
            }
        }
        if self.tls.renew {
            return value("tls.renew", "is for agents");
        }
        self.redirect.check()
    }

    /// Makes every path absolute, including those of the redirect, so that it does not depend on
    /// the working directory of its reader.
    pub fn make_absolute(&mut self, working_directory: &Path) {
        self.resolve(working_directory);
        let redirect = &mut self.redirect;
        redirect.pin = working_directory.join(&redirect.pin);
        for attachment in &mut redirect.attachments {
            attachment.cgroup = working_directory.join(&attachment.cgroup);
            if let Some(netns) = &mut attachment.netns {
                *netns = working_directory.join(&netns);
            }
        }
    }

    fn resolve(&mut self, base: &Path) {
        self.tls.resolve(base);
        self.state_dir = base.join(&self.state_dir);
        if let Some(keeper) = &mut self.keeper {
            *keeper = base.join(&keeper);
        }
        self.audit.resolve(base);
        self.frontends.resolve(base);
        if let Some(join) = &mut self.join {
            join.resolve(base);
        }
        if let Some(konnectivity) = &mut self.konnectivity {
            konnectivity.resolve(base);
        }
        if let Some(leases) = &mut self.leases {
            leases.resolve(base);
        }
    }
}

fn default_redirect_listen() -> Vec<SocketAddr> {
    vec![
        SocketAddr::from(([127, 0, 0, 1], 8137)),
        SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 8137)),
    ]
}
