//! Agents of Konnectivity: `AgentService` over TLS, on a TCP port of its own.
//!
//! ```text
//! accept -> TLS -> HTTP/2 -> call -> who is it? -> headers -> session -> registered
//! ```
//!
//! [`Agents`](accept::Agents) takes them in by the [`Acceptor`](acceptor::Acceptor); [`who`] says who they are; [`session`] drives the machine of one stream
//! ([`ServerEnd`]) and shows it to the control task; [`KonnectivityLink`](link::KonnectivityLink) is what dials use of it.
//!
//! An agent closes a stream to a server that it has a stream to already, which it knows by the
//! server's id. So several ids are presented ([`server_ids`]): connections on different streams
//! can't hold each other up. What comes of it is no agent before it has answered once, so that a
//! stream which the agent is about to close is never dialled on.
//!
//! What is lost of a connection that its client closes stands with [`ServerEnd`]'s description; all
//! else is as with an agent of ours: an agent that is not heard is left out, and its streams end
//! when TCP or the machine gives it up.
//!
//! [`ServerEnd`]: tunnel_proto::konnectivity::server_end

pub(crate) mod accept;
pub(crate) mod acceptor;
pub(crate) mod link;
mod path;
mod server_ids;
mod session;
pub(crate) mod stream;
pub(crate) mod tls;
mod who;
