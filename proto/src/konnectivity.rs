//! Konnectivity, Kubernetes' own tunnel (apiserver-network-proxy): its packets, their framing, and
//! the metadata and texts that go with them.
//!
//! Frontends (kube-apiserver) and agents each hold one bidirectional gRPC stream to a proxy-server.
//! The stream of an agent carries all its connections, each with a number. A connection has no
//! credit of its own and no half-close, except between a server and an agent of this program
//! ([`metadata::HALVES`]).
//!
//! [`Packet`] is the content of the wire, checked for form alone: a text may have any length up to
//! [`MAX_MESSAGE`], and a number any value.

pub mod agent_end;
mod frame;
mod identifiers;
mod packet;
pub mod server_end;
pub mod text;

pub use self::frame::{DecodeError, Decoder, MAX_DATA, MAX_MESSAGE, data_head};
pub use self::identifiers::{IdentifierError, Identifiers, MAX_IDENTIFIERS};
pub use self::packet::Packet;

/// The path of the stream between a frontend and a server.
pub const PROXY: &str = "/ProxyService/Proxy";

/// The path of the stream between an agent and a server.
pub const CONNECT: &str = "/AgentService/Connect";

/// Names of the metadata on an agent's stream: fields of the HTTP/2 headers.
pub mod metadata {
    /// Agent to server, exactly one: the agent's name.
    pub const AGENT_ID: &str = "agentid";
    /// Agent to server, at most one, may be empty: [`Identifiers`](super::Identifiers).
    pub const AGENT_IDENTIFIERS: &str = "agentidentifiers";
    /// Agent to server, at most one: [`BEARER`] and a service account's token.
    pub const AUTHORIZATION: &str = "authorization";
    /// Server to agent, exactly one: the server's name.
    pub const SERVER_ID: &str = "serverid";
    /// Server to agent, exactly one: how many servers there are, in decimal.
    pub const SERVER_COUNT: &str = "servercount";
    /// Agent to server and back, `1`, between programs of ours alone: DATA without data ends the
    /// direction of a connection towards the target, and not the connection. An agent offers the
    /// feature, and a server accepts the offer.
    pub const HALVES: &str = "cpc-half-close";
    /// Prefix of a token.
    pub const BEARER: &str = "Bearer ";
}

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/konnectivity.rs"));
}
