//! Metrics of the issuer.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    kind: &'static str,
    outcome: &'static str,
}

/// Counter of requests for certificates, by outcome.
#[derive(Clone, Debug, Default)]
pub struct JoinMetrics(Family<Labels, Counter>);

impl JoinMetrics {
    /// Registers the counter.
    pub fn register(&self, registry: &mut Registry) {
        for kind in ["join", "renewal"] {
            for outcome in ["issued", "refused", "failed"] {
                // A counter that begins at its first event hides that event from a rate.
                drop(self.0.get_or_create(&Labels { kind, outcome }));
            }
        }
        let help = "Requests for certificates of agents";
        registry.register("certificate_requests", help, self.0.clone());
    }

    /// Counts a request to join. A handshake that failed or took too long counts as one.
    pub fn join(&self, outcome: Outcome) {
        self.count("join", outcome);
    }

    /// Counts a renewal.
    pub fn renewal(&self, outcome: Outcome) {
        self.count("renewal", outcome);
    }

    fn count(&self, kind: &'static str, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Issued => "issued",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
        };
        self.0.get_or_create(&Labels { kind, outcome }).inc();
    }
}

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A certificate was issued.
    Issued,
    /// The rules refused it.
    Refused,
    /// A fault prevented it.
    Failed,
}
