//! The status of a process, as JSON and as `cpc status` reads it.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// What either program tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Status {
    /// A server's.
    Server(ServerStatus),
    /// An agent's.
    Agent(AgentStatus),
}

/// What a server tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Who it is.
    pub identity: String,
    /// Its release.
    pub version: String,
    /// Whether it can do its job: at least one agent answers heartbeats.
    pub ready: bool,
    /// Why it can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// Threads that carry tunnels.
    #[serde(default)]
    pub shards: usize,
    /// What moves bytes: `epoll` or `io_uring`.
    #[serde(default)]
    pub engine: String,
    /// Destinations that are not dialled because their dials kept timing out.
    #[serde(default)]
    pub breakers_open: i64,
    /// Its certificates, and the CAs that it trusts.
    #[serde(default)]
    pub certificates: Vec<CertificateRow>,
    /// Connected agents, by name.
    pub agents: Vec<AgentRow>,
    /// Attachments of the redirect, as the kernel has them.
    pub attachments: Vec<serde_json::Value>,
    /// Why the attachments can't be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachments_error: Option<String>,
}

/// One certificate in use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertificateRow {
    /// `tunnel`, `frontend` or `konnectivity`.
    pub purpose: String,
    /// `own` or `ca`.
    pub kind: String,
    /// Its identity or subject.
    pub subject: String,
    /// The hash of its key, of a CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Its file.
    pub file: String,
    /// The last moment at which it is valid, RFC 3339.
    pub not_after: String,
    /// `valid`, `expires soon`, `expired` or `not valid yet`.
    pub state: String,
}

/// One connected agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentRow {
    /// Who it is.
    pub identity: String,
    /// `quic` or `konnectivity`.
    #[serde(default)]
    pub protocol: String,
    /// Its address as the server sees it.
    pub address: String,
    /// Where this tunnel lives.
    #[serde(default)]
    pub shard: usize,
    /// `live`, `silent` or `draining`.
    pub state: String,
    /// Round-trip time, milliseconds.
    pub rtt_ms: f64,
    /// The largest IP packet that is sent on this path, in bytes, where we decide on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Open streams.
    pub streams: i64,
    /// Bytes from clients to targets.
    pub up_bytes: u64,
    /// Bytes from targets to clients.
    pub down_bytes: u64,
    /// What it serves.
    pub routes: Vec<String>,
    /// What it may not serve.
    pub refused: Vec<Refused>,
    /// Since when, RFC 3339.
    pub since: String,
}

/// A claim that was refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// What was claimed.
    pub claim: String,
    /// Why it was refused.
    pub why: String,
}

/// What an agent tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Who it is.
    pub identity: String,
    /// Its release.
    pub version: String,
    /// Whether it can do its job: at least one server is reached.
    pub ready: bool,
    /// Why it can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
    /// How many servers there are, as they say or by their leases.
    pub server_count: u32,
    /// Threads that carry tunnels.
    #[serde(default)]
    pub shards: usize,
    /// What moves bytes: `epoll` or `io_uring`.
    #[serde(default)]
    pub engine: String,
    /// Its certificates, and the CAs that it trusts.
    #[serde(default)]
    pub certificates: Vec<CertificateRow>,
    /// Tunnels, by server.
    pub servers: Vec<ServerRow>,
    /// What may be dialled.
    pub allow: Vec<String>,
}

/// One tunnel to a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerRow {
    /// The server's name.
    pub server_id: String,
    /// Where it was reached.
    pub address: String,
    /// Where this tunnel lives.
    #[serde(default)]
    pub shard: usize,
    /// `quic` or `konnectivity`.
    pub protocol: String,
    /// `live`, `silent` or `draining`.
    pub state: String,
    /// Round-trip time, milliseconds, where the protocol measures it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// The largest IP packet that is sent on this path, in bytes, where we decide on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Open streams.
    pub streams: i64,
    /// Bytes from clients to targets.
    pub up_bytes: u64,
    /// Bytes from targets to clients.
    pub down_bytes: u64,
    /// What we serve there.
    pub routes: Vec<String>,
    /// What we may not serve.
    pub refused: Vec<Refused>,
    /// Since when, RFC 3339.
    pub since: String,
}

/// RFC 3339, in whole seconds.
pub fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}
