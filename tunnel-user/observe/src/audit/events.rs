//! Audit records beside those of connections: one function for each event.

use std::error::Error;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::SystemTime;

use tunnel_proto::close::CloseReason;
use tunnel_proto::session::Refusal;

use super::AUDIT;
use cpc_host::report::report;

/// Maximum size of the refused claims that a record names, in bytes. The record counts all.
const NAMED: usize = 2048;

/// Records that this process starts or stops serving.
pub fn process(event: &'static str, role: &'static str, identity: &dyn Display) {
    tracing::info!(
        target: AUDIT, event, role, %identity, version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
    );
}

/// Records that an agent connected.
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

/// Records that an agent disconnected.
pub fn agent_disconnected(agent: &dyn Display, reason: CloseReason) {
    tracing::info!(
        target: AUDIT, event = "agent_disconnected", %agent, reason = reason.label(),
    );
}

/// Records that a worker without a certificate received one. `by` is the id of its token, or the
/// identity that vouched for it.
pub fn joined(agent: &str, remote: SocketAddr, by: &str, (serial, until): (&str, SystemTime)) {
    let until = humantime::format_rfc3339_seconds(until);
    tracing::info!(
        target: AUDIT, event = "joined", agent, %remote, token = by, serial, %until,
    );
}

/// Records that the certificate of an agent was renewed over its tunnel.
pub fn renewed(agent: &str, (serial, until): (&str, SystemTime)) {
    let until = humantime::format_rfc3339_seconds(until);
    tracing::info!(target: AUDIT, event = "renewed", agent, serial, %until);
}

/// Records that a connection or handshake of a peer was ended after a revocation.
pub fn cut(what: &'static str, remote: SocketAddr, revoked: &dyn Display) {
    tracing::info!(
        target: AUDIT, event = "revoked", what, %remote, why = %revoked,
    );
}

/// Listener that refused a peer.
#[derive(Clone, Copy, Debug)]
pub enum Listener {
    /// For agents of `cpc`.
    Tunnel,
    /// For agents of Konnectivity.
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

/// Records that an agent, or a client with a certificate, was refused.
pub fn peer_refused(listener: Listener, remote: SocketAddr, why: &(dyn Error + 'static)) {
    tracing::info!(
        target: AUDIT, event = "peer_refused", listener = listener.label(), %remote, why = report(why),
    );
}

/// Records the claims of an agent that the server refused.
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

/// Records that a CA gained or lost trust: its trust domain, subject, key and last valid moment.
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

/// Records that a server offered a CA that no trusted one vouches for.
pub fn ca_refused(server: &str, ca: &str, key: &dyn Display, why: &(dyn Error + 'static)) {
    tracing::info!(target: AUDIT, event = "ca_refused", server, ca, %key, why = report(why));
}

/// Records the number of records of one kind that were suppressed because there were too many.
pub(super) fn suppressed(of: &str, records: u64, last: &str) {
    tracing::info!(target: AUDIT, event = "suppressed", suppressed = records, of, last);
}

/// Records an attempted change of the running process, and its outcome.
pub fn changed(what: &'static str, outcome: Result<(), &(dyn Error + 'static)>) {
    let error = outcome.err().map(report);
    tracing::info!(
        target: AUDIT, event = "configuration", what, done = error.is_none(), error,
    );
}
