//! The status of a process, as JSON and as `cpc status` reads it.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// Status of either program.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Status {
    /// Status of a server.
    Server(ServerStatus),
    /// Status of an agent.
    Agent(AgentStatus),
}

/// Status of a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Identity of the server.
    pub identity: String,
    /// Release of the server.
    pub version: String,
    /// Whether the server is ready: at least one agent answers heartbeats.
    pub ready: bool,
    /// Reason why the server is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Number of threads that carry tunnels.
    #[serde(default)]
    pub shards: usize,
    /// System interface that moves bytes: `epoll` or `io_uring`.
    #[serde(default)]
    pub engine: String,
    /// Number of destinations whose breaker is open.
    #[serde(default)]
    pub breakers_open: i64,
    /// Number of connections.
    #[serde(default)]
    pub connections: ConnectionCounts,
    /// Certificates of the server, and the CAs that it trusts.
    #[serde(default)]
    pub certificates: Vec<CertificateRow>,
    /// Connected agents, by name.
    pub agents: Vec<AgentRow>,
    /// Attachments of the redirect, as the kernel has them.
    pub attachments: Vec<serde_json::Value>,
    /// Error that prevented reading the attachments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachments_error: Option<String>,
}

/// Number of connections, by what becomes of them when their tunnel is lost.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ConnectionCounts {
    /// All open ones.
    pub open: usize,
    /// Those that outlive their tunnel.
    pub held: i64,
    /// Those of these that wait for another tunnel.
    pub waiting: usize,
    /// Start of the longest of these waits, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_since: Option<String>,
    /// Connections that outlive a crash of the process.
    #[serde(default)]
    pub kept: usize,
    /// State of the keeper.
    #[serde(default)]
    pub keeper: Keeper,
    /// Address families over which kept bytes are copied once.
    #[serde(default)]
    pub peek_offset: PeekOffset,
}

/// Address families for which the kernel has `SO_PEEK_OFF` with TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeekOffset {
    /// IPv4, from Linux 6.10 on.
    pub ipv4: bool,
    /// IPv6, from Linux 6.12 on.
    pub ipv6: bool,
}

/// State of a keeper of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keeper {
    /// None is configured.
    #[default]
    Unconfigured,
    /// The configured one is not there.
    Missing,
    /// The keeper is there.
    Live,
}

/// One certificate in use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertificateRow {
    /// `tunnel`, `frontend` or `konnectivity`.
    pub purpose: String,
    /// `own` or `ca`.
    pub kind: String,
    /// Identity or subject of the certificate.
    pub subject: String,
    /// Hash of the key, for a CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// File of the certificate.
    pub file: String,
    /// Last moment of validity, RFC 3339.
    pub not_after: String,
    /// `valid`, `expires soon`, `expired` or `not valid yet`.
    pub state: String,
}

/// One connected agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentRow {
    /// Identity of the agent.
    pub identity: String,
    /// `quic` or `konnectivity`.
    #[serde(default)]
    pub protocol: String,
    /// Address of the agent as the server sees it.
    pub address: String,
    /// Shard of the tunnel.
    #[serde(default)]
    pub shard: usize,
    /// `live`, `silent` or `draining`.
    pub state: String,
    /// Round-trip time, milliseconds.
    pub rtt_ms: f64,
    /// Size of the largest IP packet sent on this path, in bytes, where our transport decides on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Open streams.
    pub streams: i64,
    /// Bytes from clients to targets.
    pub up_bytes: u64,
    /// Bytes from targets to clients.
    pub down_bytes: u64,
    /// Routes that the agent serves.
    pub routes: Vec<String>,
    /// Claims that the server refused.
    pub refused: Vec<Refused>,
    /// Start of the tunnel, RFC 3339.
    pub since: String,
}

/// A claim that was refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// The claim.
    pub claim: String,
    /// Reason of the refusal.
    pub why: String,
}

/// Status of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Identity of the agent.
    pub identity: String,
    /// Release of the agent.
    pub version: String,
    /// Whether the agent is ready: at least one server is connected.
    pub ready: bool,
    /// Reason why the agent is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Number of servers, according to the servers or their leases.
    pub server_count: u32,
    /// Number of threads that carry tunnels.
    #[serde(default)]
    pub shards: usize,
    /// System interface that moves bytes: `epoll` or `io_uring`.
    #[serde(default)]
    pub engine: String,
    /// Number of connections.
    #[serde(default)]
    pub connections: ConnectionCounts,
    /// Certificates of the agent, and the CAs that it trusts.
    #[serde(default)]
    pub certificates: Vec<CertificateRow>,
    /// Tunnels, by server.
    pub servers: Vec<ServerRow>,
    /// Destinations that the allow-list permits.
    pub allow: Vec<String>,
}

/// One tunnel to a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerRow {
    /// Name of the server.
    pub server_id: String,
    /// Address of the server.
    pub address: String,
    /// Shard of the tunnel.
    #[serde(default)]
    pub shard: usize,
    /// `quic` or `konnectivity`.
    pub protocol: String,
    /// `live`, `silent` or `draining`.
    pub state: String,
    /// Round-trip time, milliseconds, where the protocol measures it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// Size of the largest IP packet sent on this path, in bytes, where our transport decides on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Open streams.
    pub streams: i64,
    /// Bytes from clients to targets.
    pub up_bytes: u64,
    /// Bytes from targets to clients.
    pub down_bytes: u64,
    /// Routes that the agent serves over this tunnel.
    pub routes: Vec<String>,
    /// Claims that the server refused.
    pub refused: Vec<Refused>,
    /// Start of the tunnel, RFC 3339.
    pub since: String,
}

/// Formats a time as RFC 3339, in whole seconds.
pub fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Returns the start of something that has lasted for `time`.
pub fn since(time: Duration) -> String {
    rfc3339(
        SystemTime::now()
            .checked_sub(time)
            .unwrap_or(SystemTime::UNIX_EPOCH),
    )
}
