//! Frontends: each accepts clients, learns their destinations, dials, answers in its own protocol and
//! relays.

mod client;
pub(super) mod connection;
mod http_connect;
pub(super) mod listener;
pub(super) mod protocol;
pub(super) mod redirect;
pub(super) mod refusals;
pub(super) mod scope;
mod tls;
pub(super) mod unix;

pub(crate) use client::Restored;
pub(super) use scope::Scope;
pub(super) use tls::FrontendTls;
