//! What is recorded beside connections: one function for each event.

use std::error::Error;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::SystemTime;

use tunnel_proto::close::CloseReason;
use tunnel_proto::session::Refusal;

use super::AUDIT;
use cpc_host::report::report;

/// Bytes of refused claims that a record names; it counts all.
const NAMED: usize = 2048;

/// This process serves from now on, or no longer.
pub fn process(event: &'static str, role: &'static str, identity: &dyn Display) {
    tracing::info!(
        target: AUDIT, event, role, %identity, version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
    );
}

/// An agent is connected.
pub fn agent_connected(
    agent: &dyn Display,
    remote: SocketAddr,
    kind: &'static str,
    accepted: usize,
) {
    tracing::info!(
        target: AUDIT, event = "agent_connected", %agent, %remote, kind, accepted,
    );
}

/// An agent is not connected any more.
pub fn agent_disconnected(agent: &dyn Display, reason: CloseReason) {
    tracing::info!(
        target: AUDIT, event = "agent_disconnected", %agent, reason = reason.label(),
    );
}

/// A worker without a certificate got one. `by` is the id of its token, or who vouched for it.
pub fn joined(agent: &str, remote: SocketAddr, by: &str, (serial, until): (&str, SystemTime)) {
    let until = humantime::format_rfc3339_seconds(until);
    tracing::info!(
        target: AUDIT, event = "joined", agent, %remote, token = by, serial, %until,
    );
}

/// An agent's certificate was renewed over its tunnel.
pub fn renewed(agent: &str, (serial, until): (&str, SystemTime)) {
    let until = humantime::format_rfc3339_seconds(until);
    tracing::info!(target: AUDIT, event = "renewed", agent, serial, %until);
}

/// Something of a peer's that was under way has been ended, because the peer counts no more.
pub fn cut(what: &'static str, remote: SocketAddr, revoked: &dyn Display) {
    tracing::info!(
        target: AUDIT, event = "revoked", what, %remote, why = %revoked,
    );
}

/// Where somebody came who was not let in.
#[derive(Clone, Copy, Debug)]
pub enum Listener {
    /// For our agents.
    Tunnel,
    /// For Konnectivity's.
    Konnectivity,
    /// For workers without a certificate.
    Join,
    /// For clients.
    Frontend,
}

impl Listener {
    fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Konnectivity => "konnectivity",
            Self::Join => "join",
            Self::Frontend => "frontend",
        }
    }
}

/// Somebody who wanted to be an agent, or a client with a certificate, was not let in.
pub fn peer_refused(listener: Listener, remote: SocketAddr, why: &(dyn Error + 'static)) {
    tracing::info!(
        target: AUDIT, event = "peer_refused", listener = listener.label(), %remote, why = report(why),
    );
}

/// An agent wanted to serve what it may not.
pub fn claims_refused(agent: &dyn Display, refused: &[Refusal]) {
    let Some(first) = refused.first() else {
        return;
    };
    let mut claims = String::new();
    for refusal in refused {
        if claims.len() + refusal.claim.len() >= NAMED {
            break;
        }
        let space = if claims.is_empty() { "" } else { " " };
        claims.extend([space, &refusal.claim]);
    }
    tracing::info!(
        target: AUDIT, event = "claims_refused", %agent, refused = refused.len(), claims,
        why = %first.why,
    );
}

/// A CA vouches for peers from now on, or no longer: its trust domain, subject, key and last valid
/// moment.
pub fn ca_changed(
    event: &'static str,
    domain: &dyn Display,
    ca: &str,
    key: &dyn Display,
    until: SystemTime,
) {
    let until = humantime::format_rfc3339_seconds(until);
    tracing::info!(target: AUDIT, event, %domain, ca, %key, %until);
}

/// A server offered a CA that none of ours vouches for.
pub fn ca_refused(server: &str, ca: &str, key: &dyn Display, why: &(dyn Error + 'static)) {
    tracing::info!(target: AUDIT, event = "ca_refused", server, ca, %key, why = report(why));
}

/// Records of one kind were left out, because too many came.
pub(super) fn suppressed(of: &str, records: u64, last: &str) {
    tracing::info!(target: AUDIT, event = "suppressed", suppressed = records, of, last);
}

/// Something was to be changed while we run: whether it was.
pub fn changed(what: &'static str, outcome: Result<(), &(dyn Error + 'static)>) {
    let error = outcome.err().map(report);
    tracing::info!(
        target: AUDIT, event = "configuration", what, done = error.is_none(), error,
    );
}
