//! What is recorded beside connections: one function for each event.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tunnel_proto::close::CloseReason;
use tunnel_proto::session::Refusal;

use super::AUDIT;
use crate::tls::Identity;
use crate::tls::revoked::Revoked;

/// Refused claims that a record names; it counts all.
const NAMED: usize = 100;

/// Refused strangers are recorded up to [`MOST`] in each of these.
const INTERVAL: Duration = Duration::from_secs(60);

/// So many of them.
const MOST: u32 = 100;

/// This process serves from now on, or no longer.
pub fn process(event: &'static str, role: &'static str, identity: &dyn Display) {
    tracing::info!(
        target: AUDIT, event, role, %identity, version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
    );
}

/// An agent is connected.
pub fn agent_connected(agent: &Identity, remote: SocketAddr, kind: &'static str, accepted: usize) {
    tracing::info!(
        target: AUDIT, event = "agent_connected", %agent, %remote, kind, accepted,
    );
}

/// An agent is not connected any more.
pub fn agent_disconnected(agent: &Identity, reason: CloseReason) {
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
pub fn cut(what: &'static str, remote: SocketAddr, revoked: &Revoked) {
    tracing::info!(
        target: AUDIT, event = "revoked", what, %remote, why = %revoked,
    );
}

/// Somebody who wanted to be an agent, or a client with a certificate, was not let in. Strangers can't
/// fill the audit: of a crowd the first few are recorded, and how many there were.
pub fn peer_refused(remote: SocketAddr, why: &dyn Display) {
    static CROWD: Mutex<Option<Crowd>> = Mutex::new(None);
    let mut crowd = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(unrecorded) = crowd.get_or_insert_with(Crowd::new).admit(Instant::now()) {
        tracing::info!(target: AUDIT, event = "peer_refused", %remote, %why, unrecorded);
    }
}

/// Refused strangers of one interval.
struct Crowd {
    since: Instant,
    recorded: u32,
    unrecorded: u64,
}

impl Crowd {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            recorded: 0,
            unrecorded: 0,
        }
    }

    /// Whether one more is recorded: then how many were not since the last that was.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= INTERVAL {
            (self.since, self.recorded) = (now, 0);
        }
        if self.recorded == MOST {
            self.unrecorded += 1;
            return None;
        }
        self.recorded += 1;
        Some(std::mem::take(&mut self.unrecorded))
    }
}

/// An agent wanted to serve what it may not.
pub fn claims_refused(agent: &Identity, refused: &[Refusal]) {
    let Some(first) = refused.first() else {
        return;
    };
    let claims: Vec<_> = refused.iter().take(NAMED).map(|r| &*r.claim).collect();
    tracing::info!(
        target: AUDIT, event = "claims_refused", %agent, refused = refused.len(),
        claims = claims.join(" "), why = %first.why,
    );
}

/// Something was to be changed while we run: whether it was.
pub fn changed(what: &'static str, outcome: Result<(), &dyn Display>) {
    let error = outcome.err().map(tracing::field::display);
    tracing::info!(
        target: AUDIT, event = "configuration", what, done = error.is_none(), error,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_counted() {
        let mut crowd = Crowd::new();
        let start = crowd.since;
        let recorded = (0..MOST + 5).filter_map(|_| crowd.admit(start));
        assert_eq!(recorded.collect::<Vec<_>>(), [0; MOST as usize]);
        assert_eq!(crowd.admit(start + INTERVAL), Some(5));
        assert_eq!(crowd.admit(start + INTERVAL), Some(0));
    }
}
